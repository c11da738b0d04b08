"""The HTTP side: OpenAI's interface over one model, the addresses that cloud services call, and the chat page. Nothing here touches the device; the
engine's thread and `texts.py` do.

Home of starlette: pip install 'jaxlm[serve]'.
"""

import asyncio
import base64
import contextlib
import dataclasses
import functools
import hashlib
import hmac
import json
import logging
import re
import secrets
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from jaxlm.generate import Settings
from jaxlm.serve import fields, openapi, shapes
from jaxlm.serve.engine import Ask, Busy, Engine, Piece, Row, TooLong
from jaxlm.serve.fields import Refused
from jaxlm.serve.stats import Stats
from jaxlm.serve.texts import Texts

OPEN = ("/", "/health", "/ping")  # need no key
_BODY_SECONDS = 30.0  # a body must have arrived by then

_log = logging.getLogger("jaxlm.serve")


@dataclass(frozen=True)
class Options:
    """How a server presents itself, and what it grants one request."""
    name: str  # the model's id
    api_key: str = ""  # empty: none is needed
    hosts: tuple[str, ...] = ()  # names that a request may call the server by; empty: any
    origins: tuple[str, ...] = ()  # web pages elsewhere that may use it
    max_body: int = 2**20  # bytes
    max_tokens: int = 512  # of a chat's answer that does not say
    timeout: float = 600.0  # seconds, waiting included
    feedback: Path | None = None  # file that /v1/feedback appends to
    log_prompts: bool = False


class Server:
    """The endpoints over an engine or an encoder.

    Args:
      chat: messages -> token ids, and the ids and texts that end an answer; None: the checkpoint has no chat template.
    """

    def __init__(self, model: Engine | Texts, options: Options, chat: Any = None):
        self.engine = model if isinstance(model, Engine) else None
        self.texts = model if isinstance(model, Texts) else None
        self.tokenizer, self.options, self.chat = model.tokenizer, options, chat
        self.stats = model.stats if isinstance(model, Engine) else Stats()
        self.begun, self.closing = int(time.time()), False
        self._feedback = threading.Lock()

    def app(self) -> Starlette:
        """The ASGI application, with every path."""
        post = lambda path, handler: Route(path, self._with_body(handler), methods=["POST"])
        routes = [Route("/", self.page), Route("/health", self.health), Route("/ping", self.health), Route("/metrics", self.metrics),
                  Route("/openapi.json", self.document), Route("/v1/models", self.models), Route("/v1/models/{model:path}", self.model),
                  post("/v1/completions", self.completions), post("/v1/chat/completions", self.chats), post("/v1/embeddings", self.embeddings),
                  post("/v1/classify", self.classify), post("/v1/feedback", self.feedback), post("/invocations", self.invocations)]
        cors = [Middleware(CORSMiddleware, allow_origins=list(self.options.origins), allow_methods=["GET", "POST"],
                           allow_headers=["authorization", "content-type"])] if self.options.origins else []
        handlers = {Refused: self._refused, HTTPException: self._http_error, Exception: self._failed}
        return Starlette(routes=routes, middleware=[*cors, Middleware(_Guard, server=self)], exception_handlers=handlers, lifespan=self._lifespan)

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        yield
        self.closing = True
        if self.engine:
            await asyncio.to_thread(self.engine.close)

    # --- errors ---

    async def _refused(self, request: Request, error: Refused) -> Response:
        return _json(error.body(), error.status, error.headers)

    async def _http_error(self, request: Request, error: HTTPException) -> Response:
        message = {404: f"there is no {request.url.path[:100]} here; /openapi.json lists what there is",
                   405: f"{request.url.path[:100]} does not take {request.method}"}.get(error.status_code, error.detail)
        return _json(Refused(error.status_code, message).body(), error.status_code, dict(error.headers or {}))

    async def _failed(self, request: Request, error: Exception) -> Response:
        _log.error("%s %s failed", request.method, ascii(request.url.path[:200])[1:-1], exc_info=error)
        return _json(Refused(500, "the server failed at this request; its log says how", "server_error").body(), 500)

    # --- small endpoints ---

    async def page(self, request: Request) -> Response:
        """GET /: the page to try the model on."""
        text, policy = _page()
        headers = {"cache-control": "no-cache", "content-security-policy": policy, "referrer-policy": "no-referrer"}
        return Response(text, headers=headers, media_type="text/html")

    async def health(self, request: Request) -> Response:
        """GET /health, /ping: 200, or 503 while the server closes."""
        return _json({"status": "closing" if self.closing else "ok"}, 503 if self.closing else 200)

    async def metrics(self, request: Request) -> Response:
        """GET /metrics: counts for Prometheus."""
        return Response(self.stats.text(self.engine.load() if self.engine else {}), media_type="text/plain; version=0.0.4")

    async def document(self, request: Request) -> Response:
        """GET /openapi.json: what every path takes."""
        return _json(openapi.document(self.options))

    async def models(self, request: Request) -> Response:
        """GET /v1/models: the one model."""
        return _json({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/NAME: the same, or 404."""
        self._named(request.path_params["model"])
        return _json(self._model())

    def _model(self) -> dict[str, Any]:
        """The entry of the model; `task`, `labels`, `chat` and `context` are for our page."""
        cfg = (self.engine or self.texts).cfg
        task = "generate" if self.engine else "classify" if self.texts.labels else "embed"
        return {"id": self.options.name, "object": "model", "created": self.begun, "owned_by": "jaxlm", "task": task, "chat": self.chat is not None,
                "labels": list(self.texts.labels) if self.texts else [], "context": cfg.context, "feedback": self.options.feedback is not None}

    def _named(self, model: str | None) -> None:
        if model not in (None, self.options.name):
            raise Refused(404, f"the model {model[:100]!r} is not here; {self.options.name!r} is", param="model")

    # --- generation ---

    async def completions(self, request: Request, given: Any) -> Response:
        """POST /v1/completions: continues texts or token ids."""
        body = self._checked_body(request, fields.COMPLETION, given)
        prompts, echo = _several(body["prompt"]), body["echo"]
        asks = await asyncio.to_thread(self._checked, lambda: [ask for prompt in prompts for ask in self._asks(
            body, self._ids(prompt), body["max_tokens"], logprobs=body["logprobs"] is not None)])
        base, count = shapes.frame("cmpl", "text_completion", self.options.name), body["logprobs"] or 0
        before = [self.tokenizer.decode(ask.prompt) if echo else "" for ask in asks]

        def choice(index: int, text: str, tokens: Sequence, offset: int, end: Piece | None) -> dict[str, Any]:
            logprobs = None if body["logprobs"] is None else shapes.completion_logprobs(self.tokenizer, tokens, count, offset)
            return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": end and shapes.finish(end)}

        return await self._answer(request, body, asks, base, base["object"], len(prompts), choice, choice, before)

    async def chats(self, request: Request, given: Any) -> Response:
        """POST /v1/chat/completions: answers a chat, in the form of the checkpoint's template."""
        body = self._checked_body(request, fields.CHAT, given)
        if self.engine and self.chat is None:
            raise Refused(422, "this checkpoint came without a chat template: use /v1/completions, or start the server with --chat_template")
        if body["top_logprobs"] is not None and not body["logprobs"]:
            raise Refused(422, "top_logprobs goes with logprobs=true", param="top_logprobs")
        asks = await asyncio.to_thread(self._checked, lambda: self._chat_asks(body))
        base, count = shapes.frame("chatcmpl", "chat.completion", self.options.name), body["top_logprobs"] or 0
        logprobs = lambda tokens: shapes.chat_logprobs(self.tokenizer, tokens, count) if body["logprobs"] else None

        def whole(index: int, text: str, tokens: Sequence, offset: int, end: Piece | None) -> dict[str, Any]:
            return {"index": index, "message": {"role": "assistant", "content": text, "refusal": None}, "logprobs": logprobs(tokens),
                    "finish_reason": end and shapes.finish(end)}

        def part(index: int, text: str, tokens: Sequence, offset: int, end: Piece | None) -> dict[str, Any]:
            delta = {"role": "assistant", "content": text} if offset == 0 else {"content": text} if text else {}
            return {"index": index, "delta": delta, "logprobs": logprobs(tokens) if tokens else None, "finish_reason": end and shapes.finish(end)}

        return await self._answer(request, body, asks, base, "chat.completion.chunk", 1, whole, part, [""] * len(asks))

    def _chat_asks(self, body: dict[str, Any]) -> list[Ask]:
        self._need_engine()
        messages = [{"role": "system" if m["role"] == "developer" else m["role"],
                     "content": m["content"] if isinstance(m["content"], str) else "".join(part["text"] for part in m["content"])} for m in body["messages"]]
        ids, stop_ids, stop = self.chat(messages)
        wanted = body["max_completion_tokens"] or body["max_tokens"] or max(1, min(self.options.max_tokens, self.engine.context - len(ids)))
        return self._asks(body, ids, wanted, stop_ids=stop_ids, stop=stop, logprobs=body["logprobs"])

    def _ids(self, prompt: str | list[int]) -> list[int]:
        self._need_engine()
        if isinstance(prompt, str):
            return [*([self.tokenizer.bos] if self.tokenizer.adds_bos else []), *self.tokenizer.encode(prompt)] or [self.tokenizer.bos]
        self._known(prompt)
        return prompt

    def _known(self, ids: Sequence[int]) -> None:
        if any(i >= self.tokenizer.vocab_size for i in ids):
            raise Refused(422, f"token {max(ids)} is not in the vocabulary of {self.tokenizer.vocab_size}")

    def _need_engine(self) -> None:
        if not self.engine:
            raise Refused(422, f"{self.options.name} is an encoder, which does not continue text: use /v1/{'classify' if self.texts.labels else 'embeddings'}")

    def _asks(self, body: dict[str, Any], ids: Sequence[int], max_tokens: int, *, logprobs: bool, stop_ids: frozenset[int] = frozenset(),
              stop: Sequence[str] = ()) -> list[Ask]:
        """One for each of the n answers to a prompt; answer i has the seed + i."""
        seed = secrets.randbits(32) if body["seed"] is None else body["seed"]
        given = body["stop"] or []
        ends = frozenset() if body["ignore_eos"] else frozenset({self.tokenizer.eos}) | stop_ids
        texts = [*([given] if isinstance(given, str) else given), *(() if body["ignore_eos"] else stop)]
        setting = {name: body[name] for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")}
        setting["top_p"] = setting["top_p"] or 1e-9  # 0 is the likeliest token
        ask = Ask(ids, max_tokens, presence=body["presence_penalty"], frequency=body["frequency_penalty"], stop=texts, stop_ids=ends, logprobs=bool(logprobs),
                  timeout=self.options.timeout)
        asks = [dataclasses.replace(ask, settings=Settings(**setting, seed=(seed + i) % 2**32)) for i in range(body["n"])]
        self.engine.check(asks[0])
        return asks

    def _checked(self, work: Any) -> Any:
        try:
            return work()
        except ValueError as error:
            raise Refused(422, str(error), code="context_length_exceeded" if isinstance(error, TooLong) else None) from None

    async def _answer(self, request: Request, body: dict[str, Any], asks: list[Ask], base: dict[str, Any], streamed: str, prompts: int, whole: Any, part: Any,
                      before: list[str]) -> Response:
        if len(asks) > self.engine.limits.queue:
            raise Refused(422, f"{len(asks)} answers in one request are more than the {self.engine.limits.queue} that may wait here")
        loop, queue = asyncio.get_running_loop(), asyncio.Queue()

        def listener(index: int):
            def hear(piece: Piece) -> None:
                with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits
                    loop.call_soon_threadsafe(queue.put_nowait, (index, piece))
            return hear

        try:
            rows = self.engine.submit(asks, [listener(i) for i in range(len(asks))])
        except Busy as error:
            status = 503 if self.closing or "shutting" in str(error) else 429
            raise Refused(status, f"{error}; try again later", "rate_limit_error" if status == 429 else "server_error", headers={"retry-after": "1"}) from None
        pieces = self._pieces(rows, queue)
        if body["stream"]:
            usage = bool((body["stream_options"] or {}).get("include_usage"))
            return StreamingResponse(self._events(pieces, base | {"object": streamed}, part, before, usage, prompts), media_type="text/event-stream",
                                     headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        texts, tokens, ends = list(before), [[] for _ in asks], [None] * len(asks)

        async def collect() -> None:
            async for index, piece in pieces:
                texts[index] += piece.text
                tokens[index] += piece.tokens
                ends[index] = piece if piece.finish else None

        await _unless_gone(request, collect())
        if bad := next((end.finish for end in ends if end.finish not in ("stop", "length")), None):
            raise _ended(bad)
        choices = [whole(i, texts[i], tokens[i], len(before[i]), ends[i]) for i in range(len(asks))]
        return _json(base | {"choices": choices, "usage": shapes.usage(ends, prompts)})

    async def _pieces(self, rows: list[Row], queue: asyncio.Queue) -> AsyncIterator[tuple[int, Piece]]:
        """What the engine says, until all rows have ended; leaving early cancels them."""
        left = len(rows)
        try:
            while left:
                index, piece = await queue.get()
                left -= bool(piece.finish)
                yield index, piece
        finally:
            if left:
                self.engine.cancel(rows)

    async def _events(self, pieces: AsyncIterator, base: dict[str, Any], part: Any, before: list[str], usage: bool, prompts: int) -> AsyncIterator[bytes]:
        ends: list[Piece | None] = [None] * len(before)
        offsets = [0] * len(before)
        nothing = {"usage": None} if usage else {}
        async with contextlib.aclosing(pieces):
            async for index, piece in pieces:
                if piece.finish and piece.finish not in ("stop", "length"):
                    yield _event(_ended(piece.finish).body())
                    return
                ends[index] = piece if piece.finish else None
                text = piece.text if offsets[index] else before[index] + piece.text
                yield _event(base | {"choices": [part(index, text, piece.tokens, offsets[index], ends[index])]} | nothing)
                offsets[index] += len(text) or 1
        if usage:
            yield _event(base | {"choices": [], "usage": shapes.usage(ends, prompts)})
        yield b"data: [DONE]\n\n"

    # --- encoders ---

    async def embeddings(self, request: Request, given: Any) -> Response:
        """POST /v1/embeddings: a vector for each text, of encoders without labels."""
        body = self._checked_body(request, fields.EMBEDDING, given)
        if not self.texts or self.texts.labels:
            raise Refused(422, f"{self.options.name} gives no embeddings: serve an encoder without labels for them")
        rows, values = await self._encode(request, body, self.texts.embed)
        data = [{"object": "embedding", "index": i, "embedding": shapes.vector(row, body["encoding_format"])} for i, row in enumerate(values)]
        return _json({"object": "list", "data": data, "model": self.options.name, "usage": _input_usage(rows)})

    async def classify(self, request: Request, given: Any) -> Response:
        """POST /v1/classify: a label, labels or a number for each text."""
        body = self._checked_body(request, fields.CLASSIFY, given)
        if not self.texts or self.texts.cfg.output != "sequence_labels":
            raise Refused(422, f"{self.options.name} does not label texts: serve a classifier for it")
        rows, values = await self._encode(request, body, self.texts.classify)
        labels = self.texts.labels
        if self.texts.objective == "regress":
            data = [{"index": i, "value": float(row[0])} for i, row in enumerate(values)]
        else:
            data = [{"index": i, "label": labels[int(row.argmax())], "probs": row.tolist(), "num_classes": len(labels)} for i, row in enumerate(values)]
        if self.texts.objective == "multi_label":  # as the evaluation counts them
            data = [one | {"labels": [label for label, share in zip(labels, one["probs"]) if share > 0.5]} for one in data]
        return _json({"object": "list", "data": data, "labels": list(labels), "model": self.options.name, "usage": _input_usage(rows)})

    async def _encode(self, request: Request, body: dict[str, Any], work: Any) -> tuple[list, Any]:
        inputs = _several(body["input"])
        if len(inputs) > 2048:
            raise Refused(422, f"input has {len(inputs)} entries; at most 2048 go into one request", param="input")

        def run() -> tuple[list, Any]:
            for entry in inputs:
                if not isinstance(entry, str):
                    self._known(entry)
            rows = self._checked(lambda: [self.texts.ids(entry) for entry in inputs])
            return rows, work(rows)

        return await _unless_gone(request, asyncio.to_thread(run))

    # --- feedback ---

    async def feedback(self, request: Request, given: Any) -> Response:
        """POST /v1/feedback: keeps a rating or a better answer as a line to train on."""
        body = self._checked_body(request, fields.FEEDBACK, given)
        if self.options.feedback is None:
            raise Refused(404, "feedback is not kept here: start the server with --feedback=FILE")
        if (body["messages"] is None) == (body["prompt"] is None):
            raise Refused(422, "feedback is on messages or on a prompt: give one of them")
        if body["rating"] is None and body["correction"] is None:
            raise Refused(422, "feedback has a rating, a correction or both")
        await asyncio.to_thread(self._keep, self._lesson(body))
        return _json({"object": "feedback", "kept": True})

    def _lesson(self, body: dict[str, Any]) -> dict[str, Any]:
        """A line that our training reads as it is: a chat, a labelled text, or a text; with `chosen` and `rejected` where somebody wrote a better answer."""
        answer = body["answer"] if body["correction"] is None else body["correction"]
        about = {"rating": body["rating"], "model": self.options.name, "time": int(time.time())}
        messages = [{"role": m["role"], "content": m["content"] if isinstance(m["content"], str) else "".join(p["text"] for p in m["content"])}
                    for m in body["messages"] or [{"role": "user", "content": body["prompt"]}]]
        if self.texts:
            return {"text": messages[-1]["content"], "label": answer, **about}
        line = {"messages": [*messages, {"role": "assistant", "content": answer}]} if body["messages"] else {"text": body["prompt"] + answer}
        return line | ({} if body["correction"] is None else {"prompt": messages, "chosen": answer, "rejected": body["answer"]}) | about

    def _keep(self, line: dict[str, Any]) -> None:
        with self._feedback, self.options.feedback.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    # --- cloud services ---

    async def invocations(self, request: Request, given: Any) -> Response:
        """The one address that SageMaker and Vertex AI know: a body of any endpoint above, told apart by its keys; or several of these as Vertex AI's
        `predict` has them, answered together."""
        if not isinstance(given, dict) or "instances" not in given:
            return await self._meant(given)(request, given)
        bodies = fields.read(fields.INSTANCES, given)
        each = [(bodies["parameters"] or {}) | body for body in bodies["instances"]]
        if any(body.get("stream") for body in each):
            raise Refused(422, "instances are answered together, not streamed: send one body without instances to stream")
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._meant(body)(request, body)) for body in each]
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return _json({"predictions": [json.loads(task.result().body) for task in tasks]})

    def _meant(self, body: Any) -> Callable[[Request, Any], Awaitable[Response]]:
        key = next((key for key in ("messages", "prompt", "input") if isinstance(body, dict) and key in body), None)
        if key is None:
            raise Refused(422, "say messages (a chat), prompt (a text to continue) or input (texts for an encoder), as at /v1, or several bodies as instances")
        return {"messages": self.chats, "prompt": self.completions, "input": self.classify if self.texts and self.texts.labels else self.embeddings}[key]

    # --- bodies ---

    def _with_body(self, handler: Callable[[Request, Any], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def handle(request: Request) -> Response:
            return await handler(request, await self._json(request))

        return handle

    async def _json(self, request: Request) -> Any:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            # Also, a web page elsewhere cannot send this type unless CORS lets it.
            raise Refused(415, "the body must be JSON: send content-type: application/json")
        try:
            data = await asyncio.wait_for(self._read(request), _BODY_SECONDS)
            return json.loads(data.decode(), parse_constant=_no_constant)
        except TimeoutError:
            raise Refused(408, f"the body did not arrive in {_BODY_SECONDS:.0f} seconds", headers={"connection": "close"}) from None
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"the body is not JSON: {str(error)[:200] or 'nested too deep'}") from None

    def _checked_body(self, request: Request, table: dict[str, fields.Field], given: Any) -> dict[str, Any]:
        values = fields.read(table, given)
        self._named(values["model"])
        if self.options.log_prompts:
            _log.info("%s %s", request.url.path, json.dumps(given))
        return values

    async def _read(self, request: Request) -> bytes:
        limit, found = self.options.max_body, bytearray()
        too_large = Refused(413, f"the body is larger than {limit} bytes", headers={"connection": "close"})
        length = request.headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()) or int(length[:20]) > limit:
            raise too_large
        async for chunk in request.stream():
            found += chunk
            if len(found) > limit:
                raise too_large
        return bytes(found)


class _Guard:
    """Who may ask, what each answer carries, and one log line for each; no text of a prompt in it."""

    def __init__(self, app: Any, server: Server):
        self.app, self.server = app, server

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        begun, status = time.monotonic(), 499

        async def sending(message: dict) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-content-type-options", b"nosniff")]
            await send(message)

        request = Request(scope, receive)
        try:
            self._check(request)
            await self.app(scope, receive, sending)
        except Refused as error:
            await _json(error.body(), error.status, error.headers)(scope, receive, sending)
        except ClientDisconnect:
            pass
        finally:
            self.server.stats.statuses[status] += 1
            _log.info("%s %s %d %.3f s", scope["method"], ascii(scope["path"][:200])[1:-1], status, time.monotonic() - begun)

    def _check(self, request: Request) -> None:
        options = self.server.options
        host = request.headers.get("host", "").rsplit(":", 1)[0] if not request.headers.get("host", "").endswith("]") else request.headers["host"]
        if options.hosts and host.lower() not in options.hosts:
            raise Refused(421, "this server does not answer to that host name: see --host")  # a page elsewhere may have pointed its own name here
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if options.api_key and request.scope["path"] not in OPEN and not hmac.compare_digest(given.encode(), options.api_key.encode()):
            raise Refused(401, "the API key is missing or wrong: send Authorization: Bearer KEY", "authentication_error",
                          headers={"www-authenticate": "Bearer"})


@functools.cache
def _page() -> tuple[str, str]:
    """The chat page, and the policy that lets it run its own script, in its own style, and ask this server: nothing else, whatever a model says."""
    text = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    digest = lambda tag: base64.b64encode(hashlib.sha256(re.search(f"<{tag}>(.*)</{tag}>", text, re.DOTALL)[1].encode()).digest()).decode()
    return text, (f"default-src 'none'; script-src 'sha256-{digest('script')}'; style-src 'sha256-{digest('style')}'; connect-src 'self'; img-src data:; "
                  "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


def _several(value: str | list) -> list[str | list[int]]:
    """One text, texts, tokens, or several of these -> a list of texts and tokens."""
    if isinstance(value, str) or (value and all(isinstance(entry, int) for entry in value)):
        return [value]
    if not value or any(isinstance(entry, int) for entry in value):
        raise Refused(422, "a text, several texts, tokens, or lists of tokens: not a mixture, not nothing")
    return value


def _input_usage(rows: Sequence[Sequence[int]]) -> dict[str, int]:
    total = sum(map(len, rows))
    return {"prompt_tokens": total, "total_tokens": total}


def _ended(why: str) -> Refused:
    return {"timeout": Refused(504, "the request took longer than the server allows (--timeout)", "timeout_error"),
            "cancelled": Refused(503, "the server is shutting down", "server_error")}.get(
                why, Refused(500, "the server failed at this request; its log says how", "server_error"))


async def _unless_gone(request: Request, work: Any) -> Any:
    """The result of `work`, which ends early when the client goes."""
    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _json(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(body), status, headers, "application/json")  # ASCII: half of a surrogate pair has no UTF-8


def _event(body: Any) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"
