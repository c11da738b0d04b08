"""Continuous batching: one thread owns the device and serves all requests together.

Each turn it lets waiting requests in while there are rows and pages for them, feeds about `chunk` tokens of prompts, several at a time, and draws one token
for every request whose prompt is done. The next step is on its way before the last one's tokens are read. A request reserves pages for its prompt and all it
may say, so nothing that was let in ever has to wait for memory; prompts that begin alike share pages (`pages.py`).
"""

import collections
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlm import lora, trees
from jaxlm.config import LoraConfig, TransformerConfig
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.generate import Settings, mesh_of, release
from jaxlm.models import cache as caches
from jaxlm.models.decoder import Model
from jaxlm.serve import device
from jaxlm.serve.pages import Pages
from jaxlm.serve.stats import Stats

FEEDS = (16, 64)  # sizes to which a prompt's part is rounded up, and `chunk`
BATCHES = (1, 8, 32, 128, 512)  # likewise rows of a step
WINDOW = 256  # likewise tokens that a row may attend to: this times a power of two; at the beginning of prompts, the part that is fed


class TooLong(ValueError):
    """A prompt that leaves no room in the model's context for what was asked."""


class Busy(Exception):
    """Too many requests wait already, or the engine is closing."""


@dataclass(frozen=True)
class Limits:
    """What an engine holds at a time, and in which types."""
    rows: int = 32  # requests that are answered at a time
    queue: int = 256  # requests that may wait
    cache_bytes: int = 2**30  # for keys and values
    page: int = 32  # tokens of a page
    chunk: int = 256  # tokens of prompts fed between two steps
    int8_weights: bool = False  # matrices of the layers as int8 in blocks (`ops/quantise.py`), the others bfloat16: a quarter of float32, results a little off
    int8_cache: bool = False  # keys and values as int8: a quarter of the memory of float32, results a little off


@dataclass(frozen=True)
class Ask:
    """A request for one continuation."""
    prompt: Sequence[int]  # token ids, at least one
    max_tokens: int
    settings: Settings = Settings(temperature=0.0)
    presence: float = 0.0  # penalties of OpenAI's interface, see `device.Draw`
    frequency: float = 0.0
    stop: Sequence[str] = ()  # texts that end it; not part of the result
    stop_ids: frozenset[int] = frozenset()  # tokens that end it
    logprobs: bool = False
    timeout: float = 600.0  # seconds from submission


class Token(NamedTuple):
    """A drawn token with its log-probability, and the likeliest ones."""
    id: int
    logprob: float
    top: list[tuple[int, float]]


class Piece(NamedTuple):
    """What a listener gets: text that is ready, its tokens where log-probabilities are wanted, and at last why it ended and how many tokens it has."""
    text: str
    tokens: list[Token]
    finish: str = ""  # stop, length, cancelled, timeout or error
    prompt_tokens: int = 0
    cached_tokens: int = 0
    drawn_tokens: int = 0


@dataclass(eq=False)
class Row:
    """A request on its way. Only the engine's thread changes it, but for `cancelled`."""
    ask: Ask
    listener: Callable[[Piece], None]
    decode: Callable[..., str]
    begun: float
    ids: list[int]  # of the prompt and what was drawn and read
    pages: list[int] = field(default_factory=list)
    fed: int = 0  # tokens of the prompt that are on pages
    cached: int = 0  # of these, those that were there already
    launched: int = 0  # tokens drawn, read or not
    held: str = ""  # text that may begin a stop text
    tokens: list[Token] = field(default_factory=list)  # those of text that is held
    last: float = 0.0  # when the last token was read
    cancelled: bool = False
    done: bool = False


class Engine:
    """Serves a decoder. `submit` and `cancel` may be called from any thread.

    Args:
      params: on a mesh or plain; the engine unstacks them, see `Model.unstack`.
      context: longest sequence that the model may see.

    Raises:
      ValueError: one line: a cache too small for one full sequence.
    """

    def __init__(self, model: Model, params: Any, cfg: TransformerConfig, tokenizer: Tokenizer, limits: Limits = Limits()):
        self.cfg, self.tokenizer, self.limits = cfg.filled(), tokenizer, limits
        self.context = cfg.context
        self.pages = Pages(_pages(self.cfg, limits), limits.page)
        self._mesh = lambda: mesh_of(self._params)
        with mesh_of(params):
            self.model, self._params = _prepared(model, params, cfg.dtype, limits.int8_weights)
        self.stats = Stats()
        self._storage = self._new_storage()
        self._waiting: collections.deque[Row] = collections.deque()
        self._rows: list[Row] = []  # let in, in order
        self._flight: tuple[list[Row], device.Drawn] | None = None
        self._wake, self._closing = threading.Condition(), False
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    # --- from any thread ---

    def check(self, ask: Ask) -> None:
        """Raises ValueError, one line, for a request that can never be served."""
        size, room = len(ask.prompt), self.context - len(ask.prompt)
        if not size:
            raise ValueError("the prompt has no tokens")
        if ask.max_tokens < 1 or ask.max_tokens > room:
            do = f"ask for at most {room} tokens or shorten the prompt" if room > 0 else f"shorten it to {self.context - 1} or fewer"
            raise TooLong(f"the prompt has {size} tokens, with max_tokens={ask.max_tokens} that makes {size + ask.max_tokens}, and the model's "
                             f"context holds {self.context}: {do}")

    def submit(self, asks: Sequence[Ask], listeners: Sequence[Callable[[Piece], None]]) -> list[Row]:
        """Queues requests, all or none. A listener is called by the engine's thread and must not block; its last piece has `finish`.

        Raises:
          ValueError: one line, a request that can never be served.
          Busy: too many wait, or the engine is closing.
        """
        for ask in asks:
            self.check(ask)
        rows = []
        for ask, listener in zip(asks, listeners, strict=True):
            decode = self.tokenizer.stream_decoder()
            decode(ask.prompt)  # a tokenizer that puts a space before a text must not take it from the continuation
            rows.append(Row(ask, listener, decode, time.monotonic(), list(ask.prompt)))
        with self._wake:
            if self._closing:
                raise Busy("the server is shutting down")
            if len(self._waiting) + len(rows) > self.limits.queue:
                raise Busy(f"{len(self._waiting)} requests are waiting already")
            self._waiting.extend(rows)
            self._wake.notify()
        return rows

    def cancel(self, rows: Sequence[Row]) -> None:
        """Ends requests; their listeners hear of it, unless they had ended."""
        with self._wake:
            for row in rows:
                row.cancelled = True
            self._wake.notify()

    def close(self, timeout: float = 0.0) -> None:
        """Takes no more requests, finishes those it has for up to `timeout` seconds, cancels the rest, and ends the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(timeout)
        with self._wake:
            for row in (*self._waiting, *self._rows):
                row.cancelled = True
            self._wake.notify()
        self._thread.join()

    def load(self) -> dict[str, int]:
        """What it holds now."""
        return {"waiting": len(self._waiting), "running": len(self._rows), "pages_used": self.pages.used, "pages": self.pages.count}

    # --- the engine's thread ---

    def _loop(self) -> None:
        while True:
            with self._wake:
                while not (self._waiting or self._rows or self._flight):
                    if self._closing:
                        return
                    self._wake.wait()
            try:
                with self._mesh():
                    self._turn()
            except Exception as error:  # out of memory on the device, say: these requests fail, the next may not
                self._recover(error)

    def _recover(self, error: Exception) -> None:
        """Begins again with an empty cache; what was asked so far ends with an error."""
        self.stats.failed(error)
        with self._wake:  # what is submitted from here on is not among them
            lost = [*self._rows, *self._waiting]
            self._rows, self._flight = [], None
            self._waiting.clear()
        self._storage = None  # the old pages go before there are new ones
        self._storage, self.pages = self._new_storage(), Pages(self.pages.count, self.pages.size)
        for row in lost:
            row.pages = []
            self._end(row, "error")

    def _turn(self) -> None:
        self._sweep()
        self._admit()
        budget = self.limits.chunk
        while budget > 0 and (unfed := [row for row in self._rows if row.fed < len(row.ask.prompt)]):
            budget -= self._feed(unfed)
        ready = [row for row in self._rows if row.launched and row.launched < row.ask.max_tokens]
        flight = self._flight
        if flight and (ready != flight[0] or any(map(_penalised, ready))):  # these tokens must be known first
            self._read(*flight)
            flight, ready = None, [row for row in ready if not row.done]
        self._flight = self._launch(ready, flight) if ready else None
        if flight:
            self._read(*flight)

    def _sweep(self) -> None:
        now = time.monotonic()
        for row in (*self._rows, *self._waiting):
            if row.cancelled:
                self._end(row, "cancelled")
            elif now - row.begun > row.ask.timeout:
                self._end(row, "timeout")
        with self._wake:
            if any(row.done for row in self._waiting):
                self._waiting = collections.deque(row for row in self._waiting if not row.done)

    def _admit(self) -> None:
        while self._waiting and len(self._rows) < self.limits.rows:
            row = self._waiting[0]
            found = self.pages.take(row.ask.prompt, len(row.ask.prompt) + row.ask.max_tokens)
            if found is None:
                break
            row.pages, row.fed = found
            row.cached = row.fed
            self.stats.count(prompt_tokens=len(row.ask.prompt), cached_tokens=row.cached)
            with self._wake:
                self._waiting.popleft()
            self._rows.append(row)

    def _feed(self, unfed: list[Row]) -> int:
        """Feeds the next part of the first prompt, and of others whose part is of the same size, up to `chunk` tokens together; a row whose last part it was
        has its first token then. Returns how many tokens it fed."""
        chunk = self.limits.chunk
        width_of = lambda row: next((n for n in FEEDS if len(row.ask.prompt) - row.fed <= n < chunk), chunk)
        width = width_of(unfed[0])
        batch = chunk // width
        members = [row for row in unfed if width_of(row) == width][:batch]
        if 2 * len(members) <= batch:  # one after the other is less work than a call that is half padding
            members, batch = members[:1], 1
        tokens, positions, segments = np.zeros((3, batch, width), np.int32)
        last, fresh = np.zeros(batch, np.int32), not any(row.fed for row in members)
        for i, row in enumerate(members):
            size = min(len(row.ask.prompt) - row.fed, width)
            tokens[i, :size], positions[i, :size], segments[i, :size] = row.ask.prompt[row.fed:row.fed + size], np.arange(row.fed, row.fed + size), 1
            last[i] = size - 1
            row.fed += size
        table = self._table(members, batch, width if fresh else int(positions.max()) + 1, width if fresh else WINDOW)
        drawn = self._step(device.Rows(tokens, positions, segments, last, table), members, batch)
        ended = [row for row in members if row.fed == len(row.ask.prompt)]
        for row in ended:
            row.launched = 1
            self.pages.name(row.ask.prompt, row.pages)
        if ended:
            self._read(members, drawn)
        return int(segments.sum())

    def _launch(self, ready: list[Row], flight: tuple | None) -> tuple[list[Row], device.Drawn]:
        batch = next(n for n in (*BATCHES, len(ready)) if n >= len(ready))
        positions, segments = np.zeros((batch, 1), np.int32), np.zeros((batch, 1), np.int32)
        segments[:len(ready)] = 1
        positions[:len(ready), 0] = [len(row.ask.prompt) + row.launched - 1 for row in ready]
        if flight:
            tokens = flight[1].token
        else:
            tokens = np.zeros(batch, np.int32)
            tokens[:len(ready)] = [row.ids[-1] for row in ready]
        rows = device.Rows(tokens, positions, segments, np.zeros(batch, np.int32), self._table(ready, batch, int(positions.max()) + 1))
        drawn = self._step(rows, ready, batch)
        for row in ready:
            row.launched += 1
        return ready, drawn

    def _step(self, rows: device.Rows, members: list[Row], batch: int) -> device.Drawn:
        logprobs = any(row.ask.logprobs for row in members)
        drawn, self._storage = device.step(self.model, self._params, self._storage, rows, _draw(members, batch), vocab=self.tokenizer.vocab_size,
                                           logprobs=logprobs)
        return drawn

    def _table(self, members: list[Row], batch: int, tokens: int, window: int = WINDOW) -> np.ndarray:
        while window < tokens:
            window *= 2
        table = np.zeros((batch, -(-window // self.limits.page)), np.int32)
        for i, row in enumerate(members):
            held = row.pages[:table.shape[1]]
            table[i, :len(held)] = held
        return table

    def _read(self, members: list[Row], drawn: device.Drawn) -> None:
        """Waits for a step and hands out what it drew for rows whose prompt is fed."""
        tokens = np.asarray(drawn.token).tolist()
        shares = None if drawn.logprob is None else tuple(np.asarray(a).tolist() for a in (drawn.logprob, drawn.top[1], drawn.top[0]))
        now = time.monotonic()
        for i, row in enumerate(members):
            if row.done or not row.launched:
                continue
            self.stats.token(now - (row.last or row.begun), first=not row.last)
            row.last = now
            self._accept(row, Token(tokens[i], shares[0][i], list(zip(shares[1][i], shares[2][i]))) if row.ask.logprobs else Token(tokens[i], 0.0, []))

    def _accept(self, row: Row, token: Token) -> None:
        if token.id in row.ask.stop_ids:
            return self._end(row, "stop")
        row.ids.append(token.id)
        row.tokens += [token] if row.ask.logprobs else []
        ready, row.held, found = release(row.held + row.decode((token.id,)), row.ask.stop)
        if found or len(row.ids) - len(row.ask.prompt) == row.ask.max_tokens:
            return self._end(row, "stop" if found else "length", ready)
        if ready:
            tokens, row.tokens = row.tokens, []
            row.listener(Piece(ready, tokens))

    def _end(self, row: Row, why: str, text: str = "") -> None:
        if row.done:
            return
        row.done = True
        if why in ("length", "stop") and not (why == "stop" and text):
            rest, held, found = release(row.held + row.decode((), final=True), row.ask.stop)
            text += rest + ("" if found else held)
        if row.pages:
            if row.launched:  # the last token was drawn but not fed
                self.pages.name(row.ids[:-1], row.pages)
            self.pages.give(row.pages)
        if row in self._rows:
            self._rows.remove(row)
        drawn = len(row.ids) - len(row.ask.prompt)
        self.stats.ended(why, drawn)
        row.listener(Piece(text, row.tokens, why, len(row.ask.prompt), row.cached, drawn))

    def _new_storage(self) -> tuple[dict, ...]:
        with self._mesh():
            return jax.jit(lambda: caches.placed_pages(caches.empty_pages(self.cfg, self.pages.count + 1, self.limits.page, self.limits.int8_cache)))()


def _prepared(model: Model, params: Any, dtype: str, int8: bool) -> tuple[Model, Any]:
    """The model and its parameters as steps want them: unstacked, and in int8 or cast once to what they would be cast to at each step."""
    if int8:
        axes = trees.match(model.axes, trees.flatten(params), "axes of the model")
        form = lora.form(model, LoraConfig(), "int8", axes, dict.fromkeys(axes, False), dtype)
        return form.model, jax.jit(lambda params: model.unstack(form.dress(params, None)))(params)
    cast = lambda params: {name: jax.tree.map(lambda w: w.astype(dtype), params[name]) for name in ("embed", "layers", "head") if name in params}
    return model, jax.jit(lambda params: model.unstack(params | cast(params)))(params)


def _pages(cfg: TransformerConfig, limits: Limits) -> int:
    """Pages that fit, at most what all rows can use."""
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(lambda: caches.empty_pages(cfg, 1, limits.page, limits.int8_cache))))
    one = -(-cfg.context // limits.page)
    count = min(limits.cache_bytes // size - 1, limits.rows * one)
    if count < one:
        raise ValueError(f"a cache of {limits.cache_bytes / 2**30:.3g} GiB holds {max(0, count) * limits.page} tokens, fewer than the model's context of "
                         f"{cfg.context}: give it {(one + 1) * size / 2**30:.3g} GiB or more")
    return count


def _penalised(row: Row) -> bool:
    return row.ask.settings.repetition_penalty != 1 or row.ask.presence != 0 or row.ask.frequency != 0


def _draw(members: list[Row], batch: int) -> device.Draw:
    def column(dtype, default, of):
        values = np.full(batch, default, dtype)
        values[:len(members)] = [of(row) for row in members]
        return values

    setting = lambda name: lambda row: getattr(row.ask.settings, name)
    history = np.zeros((batch, 0), np.int32)
    if any(map(_penalised, members)):
        width = WINDOW
        while width < max(len(row.ids) for row in members):
            width *= 2
        history = np.full((batch, width), np.iinfo(np.int32).max, np.int32)
        for i, row in enumerate(members):
            size = len(row.ask.prompt)
            history[i, :size] = -1 - np.asarray(row.ids[:size])
            history[i, size:len(row.ids)] = row.ids[size:]
    return device.Draw(
        column(np.float32, 0, setting("temperature")), column(np.int32, 0, setting("top_k")), column(np.float32, 1, setting("top_p")),
        column(np.float32, 0, setting("min_p")), column(np.uint32, 0, setting("seed")), column(np.int32, 0, lambda row: row.launched),
        column(np.float32, 1, setting("repetition_penalty")), column(np.float32, 0, lambda row: row.ask.presence),
        column(np.float32, 0, lambda row: row.ask.frequency), history)
