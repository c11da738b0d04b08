"""Answers in the shapes of OpenAI's interface: pure functions from what the engine says to JSON."""

import base64
import secrets
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxlm.data.tokenizer import Tokenizer
from jaxlm.serve.engine import Piece, Token


def frame(prefix: str, kind: str, model: str) -> dict[str, Any]:
    """What all events of an answer share."""
    return {"id": f"{prefix}-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()), "model": model}


def usage(pieces: Sequence[Piece], prompts: int) -> dict[str, Any]:
    """Counted tokens of a request's last pieces; the n answers to a prompt count its tokens once."""
    each = len(pieces) // prompts
    asked, said = sum(piece.prompt_tokens for piece in pieces[::each]), sum(piece.drawn_tokens for piece in pieces)
    return {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said,
            "prompt_tokens_details": {"cached_tokens": sum(piece.cached_tokens for piece in pieces[::each])}}


def finish(piece: Piece) -> str | None:
    """Why an answer ended, in OpenAI's words; None while it has not."""
    return piece.finish or None


def completion_logprobs(tokenizer: Tokenizer, tokens: Sequence[Token], count: int, offset: int) -> dict[str, Any]:
    """The shape of /v1/completions; offsets count characters of the answer."""
    texts = [tokenizer.decode([token.id]) for token in tokens]
    offsets = np.cumsum([offset, *map(len, texts)])[:-1].tolist()
    return {"tokens": texts, "token_logprobs": [_finite(token.logprob) for token in tokens], "text_offset": offsets,
            "top_logprobs": [{tokenizer.decode([i]): _finite(share) for i, share in reversed(token.top[:count])} for token in tokens] if count else None}


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[Token], count: int) -> dict[str, Any]:
    """The shape of /v1/chat/completions."""
    def one(i: int, share: float) -> dict[str, Any]:
        text = tokenizer.decode([i])
        return {"token": text, "logprob": _finite(share), "bytes": list(text.encode())}

    return {"content": [one(token.id, token.logprob) | {"top_logprobs": [one(*pair) for pair in token.top[:count]]} for token in tokens], "refusal": None}


def _finite(share: float) -> float:
    return max(share, -9999.0)  # JSON has no infinity; this is OpenAI's floor


def vector(values: np.ndarray, encoding: str) -> list[float] | str:
    """Numbers of an embedding, or their float32 bytes (little-endian) in base64."""
    return base64.b64encode(values.astype("<f4").tobytes()).decode() if encoding == "base64" else values.tolist()
