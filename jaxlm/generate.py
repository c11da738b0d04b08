"""Continues token sequences with a key-value cache: one prefill for all prompts, then one compiled step per token.

Prompts of different lengths share a batch: they are padded on the right with segment 0, which no query sees, and each row goes on at its own
position. Lengths are rounded up to powers of two, so a new prompt seldom compiles anything.

A model with an encoder reads the prompts there and its decoder begins with `model.start`; the first call leaves what it needs of them in the cache.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import peers
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.models import cache as caches
from jaxlm.models.decoder import Model
from jaxlm.ops import sampling
from jaxlm.sharding import RULES, constrain


@dataclass(frozen=True)
class Settings:
    """How the next token is drawn; see `ops/sampling.py` for what each filter does and in which order. The default is the model's own distribution."""
    temperature: float = 1.0  # 0: always the likeliest token
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # 0: off
    repetition_penalty: float = 1.0  # of tokens in the prompt or drawn before; 1: off
    seed: int = 0

    def __post_init__(self):
        # Each comparison is false for NaN.
        _need(0 <= self.temperature < math.inf, f"temperature={self.temperature} must be 0 (always the likeliest token) or more; 0.8 is usual")
        _need(self.top_k >= 0, f"top_k={self.top_k} must be 0 (off) or the number of tokens to choose from")
        _need(0 < self.top_p <= 1, f"top_p={self.top_p} must be in (0, 1]; 1 is off")
        _need(0 <= self.min_p <= 1, f"min_p={self.min_p} must be in [0, 1]; 0 is off")
        _need(0 < self.repetition_penalty < math.inf, f"repetition_penalty={self.repetition_penalty} must be positive; 1 is off, 1.2 is strong")
        _need(0 <= self.seed < 2**32, f"seed={self.seed} must be in [0, 2^32)")


def _need(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def generate(model: Model, params: Any, prompts: Sequence[Sequence[int]], *, max_tokens: int, context: int, settings: Settings = Settings(),
             stop_ids: Collection[int] = (), vocab_size: int = 0, on_token: Callable[[int, int | None], bool | None] | None = None) -> list[list[int]]:
    """Continues (with an encoder: answers) each prompt until a stop id, `on_token` or `max_tokens` ends it.

    Row i draws with the key `(settings.seed, i)`: what it draws does not depend on the other rows. In several processes all call this together.

    Args:
      prompts: token ids, each at least one.
      context: longest sequence that the model may see; with an encoder, prompt and answer may each have so many tokens.
      stop_ids: end a row; they are not part of the result.
      vocab_size: ids from here on are never drawn (rows of the embedding that only round its size up); 0: all may be.
      on_token: called with row and id as tokens arrive, and with None when the row has ended; True ends the row, the token stays in the result.

    Returns:
      New ids of each prompt, at most `max_tokens`.

    Raises:
      ValueError: one line, for an empty prompt or one that leaves no room for `max_tokens`.
    """
    on_token = on_token or (lambda row, token: None)
    _need(max_tokens >= 1, f"max_tokens={max_tokens} must be at least 1")
    for row, prompt in enumerate(prompts):
        _check_room(row, len(prompt), max_tokens, context, model.start is not None)
    if not prompts:
        return []
    with mesh_of(params):
        mesh = jax.sharding.get_abstract_mesh()
        ways = 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in RULES["batch"] or ())
        rows = -(-len(prompts) // ways) * ways
        width = bucket(max(map(len, prompts)))
        tokens, lengths = np.zeros((rows, width), np.int32), np.ones(rows, np.int32)  # a row that only fills up is a prompt of one token
        for row, prompt in enumerate(prompts):
            tokens[row, :len(prompt)], lengths[row] = prompt, len(prompt)
        draw = {"temperature": np.float32(settings.temperature), "top_k": np.int32(settings.top_k), "top_p": np.float32(settings.top_p),
                "min_p": np.float32(settings.min_p), "penalty": np.float32(settings.repetition_penalty), "seed": np.uint32(settings.seed),
                "vocab": np.int32(vocab_size or np.iinfo(np.int32).max)}
        peers.worked()  # what follows all processes do together
        if jax.default_backend() == "cpu":  # where a step would copy the weights out of their stacks; a second copy of them is no matter there
            params = _unstack(model, params)
        token_B, decoding = _prefill(model, params, tokens, lengths, draw, slots=bucket((width if model.start is None else 1) + max_tokens - 1))
        results: list[list[int]] = [[] for _ in prompts]
        running = set(range(len(prompts)))
        for count in range(1, max_tokens + 1):
            # The next step is on its way before this token is read: the device works while the host looks.
            following = _step(model, params, token_B, decoding, draw) if count < max_tokens else None
            for row, token in enumerate(np.asarray(token_B)[:len(prompts)].tolist()):
                if row not in running:
                    continue
                ended = token in stop_ids
                if not ended:
                    results[row].append(token)
                    ended = bool(on_token(row, token)) or count == max_tokens
                if ended:
                    running.discard(row)
                    on_token(row, None)
            if not running:
                break
            if following is not None:
                token_B, decoding = following
    return results


def complete(model: Model, params: Any, tokenizer: Tokenizer, prompts: Sequence[str], *, max_tokens: int, context: int,
             settings: Settings = Settings(), stop: Sequence[str] = (), special: bool = False, on_text: Callable[[int, str | None], None] | None = None) -> list[str]:
    """Continues texts: `generate` between the tokenizer's two ends.

    Args:
      prompts: each follows the begin-of-sequence token, where the tokenizer's model saw one; "" asks for a text from nothing. For an encoder each
        ends with the end-of-sequence token.
      special: special tokens spelled out in an encoder's prompts, such as <extra_id_0>, become their ids; see `Tokenizer.encode_batch`.
      stop: texts that end a row, besides the end-of-sequence token; neither they nor what follows them is part of the result.
      on_text: called with row and text as it comes, whole characters only and nothing that may turn out to begin a stop text, and with None when
        the row has ended.

    Returns:
      The continuations, without their prompts.
    """
    _need(all(stop), "a stop text is empty: it would end everything at once")
    decoders = [tokenizer.stream_decoder() for _ in prompts]
    if model.start is None:
        begin = [tokenizer.bos] if tokenizer.adds_bos else []
        rows = [[*begin, *tokenizer.encode(prompt)] or [tokenizer.bos] for prompt in prompts]
        for decode, ids in zip(decoders, rows):
            decode(ids)  # a tokenizer that puts a space before a text must not take it from the continuation
    else:
        rows = [[*tokenizer.encode(prompt, special), tokenizer.eos] for prompt in prompts]
    texts, held, stopped = [""] * len(rows), [""] * len(rows), set()

    def on_token(row: int, token: int | None) -> bool:
        if row not in stopped:
            ready, held[row], found = release(held[row] + decoders[row](() if token is None else (token,), final=token is None), stop)
            if found:
                stopped.add(row)
            if token is None:
                ready, held[row] = ready + held[row], ""
            texts[row] += ready
            if ready and on_text is not None:
                on_text(row, ready)
        if token is None and on_text is not None:
            on_text(row, None)
        return row in stopped

    generate(model, params, rows, max_tokens=max_tokens, context=context, settings=settings, stop_ids={tokenizer.eos},
             vocab_size=tokenizer.vocab_size, on_token=on_token)
    return texts


def release(text: str, stop: Sequence[str]) -> tuple[str, str, bool]:
    """Splits text that has arrived into what may be shown and what must wait.

    Returns:
      The text before the stop text that is complete first (of two that end together, the longer), "" and True; or, without one, the text
      before the longest ending that may be the beginning of a stop text, that ending, and False. So the result does not depend on the
      pieces in which text arrives.
    """
    found = min(((start + len(s), start) for s in stop if (start := text.find(s)) >= 0), default=None)
    if found:
        return text[:found[1]], "", True
    size = max((n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
    return text[:len(text) - size], text[len(text) - size:], False


def bucket(length: int) -> int:
    """The power of two, 16 or more, that holds `length`."""
    return 1 << max(4, (length - 1).bit_length())


def _check_room(row: int, length: int, max_tokens: int, context: int, encoder: bool) -> None:
    if encoder:
        _need(0 < length <= context, f"prompt {row} has {length} tokens and the model's encoder reads 1 to {context}")
        _need(max_tokens <= context, f"max_tokens={max_tokens} is more than the model's context of {context} tokens")
        return
    _need(length > 0, f"prompt {row} has no tokens: begin with the begin-of-sequence token at least")
    _need(length < context, f"prompt {row} has {length} tokens and the model's context holds {context}: shorten it to {context - 1} or fewer")
    _need(length + max_tokens <= context, f"prompt {row} has {length} tokens, with max_tokens={max_tokens} that makes {length + max_tokens}, and the "
          f"model's context holds {context}: ask for at most {context - length} tokens or shorten the prompt")


def mesh_of(params: Any) -> contextlib.AbstractContextManager:
    """The mesh on which the parameters lie, as a context; they may also be plain arrays."""
    sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)
    mesh = sharding.mesh if isinstance(sharding, jax.sharding.NamedSharding) else None
    return jax.set_mesh(mesh) if isinstance(mesh, jax.sharding.Mesh) else contextlib.nullcontext()


@functools.partial(jax.jit, static_argnames=("model",))
def _unstack(model: Model, params):
    return model.unstack(params)


class _Decoding(NamedTuple):
    """What a step hands to the next; donated, so the cache is updated in place."""
    cache: dict
    seen_BV: jax.Array  # bool, tokens of the prompt or drawn
    positions_B: jax.Array  # int32, where the token just drawn stands
    drawn: jax.Array  # int32 scalar, tokens drawn so far


@functools.partial(jax.jit, static_argnames=("model", "slots"))
def _prefill(model: Model, params, tokens_BP, lengths_B, draw: dict, *, slots: int):
    """The first token of each row `[B]`, and the state after the prompts."""
    rows, width = tokens_BP.shape
    inside = jnp.arange(width)[None] < lengths_B[:, None]
    inputs = {"tokens": tokens_BP, "positions": jnp.where(inside, jnp.arange(width, dtype=jnp.int32)[None], 0), "segments": inside.astype(jnp.int32)}
    if model.start is not None:
        one = jnp.ones((rows, 1), jnp.int32)
        inputs = {f"encoder_{name}": leaf for name, leaf in inputs.items()} | {"tokens": one * model.start, "positions": one * 0, "segments": one}
        tokens_BP, inside, lengths_B = inputs["tokens"], jnp.ones((rows, 1), bool), jnp.ones(rows, jnp.int32)
    hidden, cache, _ = model.apply(params, inputs, cache=model.init_cache(rows, slots))
    last_BD = jnp.take_along_axis(hidden, (lengths_B - 1)[:, None, None], axis=1)[:, 0]
    logits = model.head(params, last_BD)
    # Padding points behind the vocabulary and is dropped.
    seen = jnp.zeros(logits.shape, bool).at[jnp.arange(rows)[:, None], jnp.where(inside, tokens_BP, logits.shape[1])].set(True, mode="drop")
    return _draw(logits, _Decoding(cache, seen, lengths_B, jnp.zeros((), jnp.int32)), draw)


@functools.partial(jax.jit, static_argnames=("model",), donate_argnames=("decoding",))
def _step(model: Model, params, token_B, decoding: _Decoding, draw: dict):
    """Feeds each row its last token and draws the next."""
    positions = decoding.positions_B[:, None]
    inputs = {"tokens": token_B[:, None], "positions": positions, "segments": jnp.ones_like(positions)}
    hidden, cache, _ = model.apply(params, inputs, cache=decoding.cache)
    return _draw(model.head(params, hidden[:, 0]), decoding._replace(cache=cache, positions_B=decoding.positions_B + 1), draw)


def _draw(logits_BV, decoding: _Decoding, draw: dict):
    rows, vocabulary = logits_BV.shape
    logits = jnp.where(jnp.arange(vocabulary)[None] < draw["vocab"], constrain(logits_BV, "batch", None), -jnp.inf)
    logits = sampling.penalise(logits, decoding.seen_BV, draw["penalty"])
    fold = jax.random.fold_in
    keys = jax.vmap(lambda row: fold(fold(jax.random.key(draw["seed"]), row), decoding.drawn))(jnp.arange(rows))
    token = sampling.sample(logits, keys, temperature=draw["temperature"], top_k=draw["top_k"], top_p=draw["top_p"], min_p=draw["min_p"])
    seen = decoding.seen_BV.at[jnp.arange(rows), token].set(True)
    # Fixed places, so that every process can read the tokens.
    return constrain(token, None), _Decoding(caches.placed(decoding.cache), constrain(seen, "batch", None), constrain(decoding.positions_B, "batch"),
                                             decoding.drawn + 1)
