"""Bodies of requests: one table of fields is what is checked and what the OpenAPI document says."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


class Refused(Exception):
    """An answer that is an error, in OpenAI's shape."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error", param: str | None = None, headers: Mapping[str, str] | None = None,
                 code: str | None = None):
        super().__init__(message)
        self.status, self.kind, self.param, self.headers, self.code = status, kind, param, dict(headers or {}), code

    def body(self) -> dict[str, Any]:
        """The JSON that the client gets."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


_TYPES = {"string": str, "boolean": bool, "integer": int, "number": (int, float), "array": list, "object": dict}


@dataclass(frozen=True)
class Field:
    """One key of a body. Several kinds: any of them. null is the default, unless the field is required."""
    kinds: tuple[str, ...]
    about: str
    default: Any = None
    required: bool = False
    low: float | None = None  # of numbers; of arrays and strings: the smallest size
    high: float | None = None
    items: "Field | None" = None  # of arrays
    choices: tuple[str, ...] = ()  # of strings
    only: Any = None  # values other than this and null are known to OpenAI and not served here
    fields: Mapping[str, "Field"] = field(default_factory=dict)  # of objects; none: anything

    def schema(self) -> dict[str, Any]:
        """JSON schema, OpenAPI 3.1."""
        shapes = []
        for kind in self.kinds:
            shape: dict[str, Any] = {"type": kind}
            names = {"string": ("minLength", "maxLength"), "array": ("minItems", "maxItems")}.get(kind, ("minimum", "maximum"))
            shape |= {name: bound for name, bound in zip(names, (self.low, self.high)) if bound is not None and kind not in ("boolean", "object")}
            shape |= {"enum": list(self.choices)} if self.choices and kind == "string" else {}
            shape |= {"items": self.items.schema()} if kind == "array" and self.items else {}
            shape |= document(self.fields) if kind == "object" and self.fields else {}
            shapes.append(shape)
        shapes = shapes if self.only is None else [{"const": self.only}]
        shapes += [] if self.required else [{"type": "null"}]
        found = shapes[0] if len(shapes) == 1 else {"anyOf": shapes}
        return found | ({"description": self.about} if self.about else {}) | ({} if self.default is None else {"default": self.default})

    def read(self, value: Any, name: str) -> Any:
        """The value, checked; Refused with 422 if it cannot be."""
        if value is None and not self.required:
            return self.default
        if self.only is not None:
            if value != self.only or isinstance(value, bool) != isinstance(self.only, bool):
                raise Refused(422, f"{name} is not served here: leave it out", param=name)
            return value
        kind = next((k for k in self.kinds if isinstance(value, _TYPES[k]) and (not isinstance(value, bool) or k == "boolean")), None)
        if kind is None and isinstance(value, float) and value.is_integer() and "integer" in self.kinds:
            value, kind = int(value), "integer"  # JSON knows one kind of number: 5.0 is 5
        if kind is None:
            raise Refused(422, f"{name} must be {' or '.join(self.kinds)}, not {_called(value)}", param=name)
        low, high = (math.copysign(math.inf, sign) if end is None else end for sign, end in ((-1, self.low), (1, self.high)))
        if kind in ("integer", "number") and not (low <= value <= high and abs(value) != math.inf):
            raise Refused(422, f"{name}={str(value)[:40]} must be {self._range()}", param=name)
        if kind in ("string", "array") and not low <= len(value) <= high:
            raise Refused(422, f"{name} has {len(value)} {'characters' if kind == 'string' else 'entries'}; allowed are {self._range()}", param=name)
        if kind == "string" and self.choices and value not in self.choices:
            raise Refused(422, f"{name} must be one of {', '.join(self.choices)}", param=name)
        if kind == "array" and self.items:
            return [self.items.read(item, f"{name}[{i}]") for i, item in enumerate(value)]
        return read(self.fields, value, f"{name}.") if kind == "object" and self.fields else value

    def _range(self) -> str:
        if self.high is None:
            return f"{self.low} or more"
        return f"{self.high} or less" if self.low is None else f"{self.low} to {self.high}"


def _called(value: Any) -> str:
    return {type(None): "null", str: "a string", bool: "a boolean", int: "an integer", float: "a number", list: "an array", dict: "an object"}[type(value)]


def read(fields: Mapping[str, Field], body: Any, within: str = "") -> dict[str, Any]:
    """The values of all fields, with defaults.

    Raises:
      Refused: 422: not an object, an unknown key, a value that cannot be.
    """
    if not isinstance(body, dict):
        raise Refused(422, f"the body must be a JSON object, not {_called(body)}")
    if unknown := next((key for key in body if key not in fields), None):
        raise Refused(422, f"{within}{unknown[:60]} is unknown; known here: {', '.join(fields)}", param=f"{within}{unknown[:60]}")
    if missing := next((key for key, field in fields.items() if field.required and key not in body), None):
        raise Refused(422, f"{within}{missing} is missing", param=f"{within}{missing}")
    return {key: field.read(body.get(key), f"{within}{key}") for key, field in fields.items()}


def document(fields: Mapping[str, Field]) -> dict[str, Any]:
    """JSON schema of an object with these fields."""
    return {"type": "object", "properties": {name: field.schema() for name, field in fields.items()}, "additionalProperties": False,
            "required": [name for name, field in fields.items() if field.required]}


def text(about: str, **options: Any) -> Field:
    """A field that holds a string."""
    return Field(("string",), about, **options)


def number(about: str, low: float, high: float, default: float) -> Field:
    """A field that holds a number from low to high."""
    return Field(("number",), about, default, low=low, high=high)


def integer(about: str, low: int, high: int, default: int | None = None) -> Field:
    """A field that holds a whole number from low to high."""
    return Field(("integer",), about, default, low=low, high=high)


def flag(about: str) -> Field:
    """A field that holds true or false, false where it is left out."""
    return Field(("boolean",), about, False)


_ANYTHING = ("string", "boolean", "integer", "number", "array", "object")
_MODEL = {"model": text("id of the model, as /v1/models gives it; may be left out")}
_IGNORED = {name: Field(_ANYTHING, "accepted and ignored") for name in ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")}
_SAMPLING = {
    "temperature": number("0 always takes the likeliest token", 0, 2, 1.0),
    "top_p": number("choose among the likeliest tokens that together reach this share", 0, 1, 1.0),
    "top_k": integer("choose among so many of the likeliest tokens; 0: off (an extension)", 0, 2**31 - 1, 0),
    "min_p": number("leave out tokens less than this times as likely as the likeliest (an extension)", 0, 1, 0.0),
    "repetition_penalty": number("above 1: tokens that were there before become less likely (an extension)", 0.01, 100, 1.0),
    "presence_penalty": number("taken from the logits of tokens that were drawn before", -2, 2, 0.0),
    "frequency_penalty": number("the same, as often as they were drawn", -2, 2, 0.0),
    "seed": integer("the same seed gives the same answer; without one it is drawn", -2**63, 2**63 - 1),
    "stop": Field(("string", "array"), "texts that end the answer", low=1, high=16, items=text("", required=True, low=1, high=1000)),
    "n": integer("answers to each prompt", 1, 128, 1),
    "stream": flag("send pieces as they come, as server-sent events"),
    "stream_options": Field(("object",), "with stream", fields={"include_usage": flag("a last event counts tokens"), "include_obfuscation": flag("ignored")}),
    "ignore_eos": flag("go on after the end-of-text token (an extension, for measurements)"),
    "logit_bias": Field(("object",), "not served", only={}),
}
_TOKENS = Field(("integer",), "", required=True, low=0, high=2**31 - 1)
COMPLETION = _MODEL | {
    "prompt": Field(("string", "array"), "a text, several texts, tokens, or several of these", required=True,
                    items=Field(("string", "integer", "array"), "", required=True, low=0, items=_TOKENS)),
    "max_tokens": integer("longest answer in tokens", 1, 2**31 - 1, 16),
    "logprobs": integer("log-probabilities of the tokens and of so many of the likeliest", 0, 20),
    "echo": flag("the answer begins with the prompt"),
    "suffix": Field(_ANYTHING, "not served", only=""), "best_of": Field(_ANYTHING, "not served", only=1),
} | _SAMPLING | _IGNORED
_PART = Field(("object",), "", required=True, fields={"type": text("", required=True, choices=("text",)), "text": text("", required=True)})
MESSAGE = Field(("object",), "", required=True, fields={
    "role": text("", required=True, choices=("system", "developer", "user", "assistant", "tool")),
    "content": Field(("string", "array"), "a text, or parts of type text", required=True, items=_PART),
    "name": text("ignored"), "tool_call_id": text("ignored"), "refusal": text("ignored")})
CHAT = _MODEL | {
    "messages": Field(("array",), "what was said so far", required=True, low=1, high=4096, items=MESSAGE),
    "max_tokens": integer("longest answer in tokens; without it, what the server was told", 1, 2**31 - 1),
    "max_completion_tokens": integer("the same", 1, 2**31 - 1),
    "logprobs": flag("log-probabilities of the tokens"),
    "top_logprobs": integer("and of so many of the likeliest", 0, 20),
    "response_format": Field(("object",), "text only", only={"type": "text"}),
    "tools": Field(_ANYTHING, "not served", only=[]), "tool_choice": Field(_ANYTHING, "not served", only="none"),
    "modalities": Field(_ANYTHING, "text only", only=["text"]), "parallel_tool_calls": Field(_ANYTHING, "ignored"),
} | _SAMPLING | _IGNORED
_INPUT = Field(("string", "array"), "a text, several texts, tokens, or several of these", required=True, low=1, high=2**20,
               items=Field(("string", "integer", "array"), "", required=True, low=0, items=_TOKENS))
EMBEDDING = _MODEL | {
    "input": _INPUT,
    "encoding_format": text("float: numbers; base64: float32, little end first", default="float", choices=("float", "base64")),
    "dimensions": Field(_ANYTHING, "not served", only=0),
} | _IGNORED
CLASSIFY = _MODEL | {"input": _INPUT} | _IGNORED
_ONE = Field(("object",), "a body of an endpoint of /v1", required=True)
INSTANCES = {
    "instances": Field(("array",), "bodies of endpoints of /v1, answered together", required=True, low=1, high=128, items=_ONE),
    "parameters": Field(("object",), "keys of each body that does not say them itself"),
}
FEEDBACK = _MODEL | {
    "messages": Field(("array",), "the chat that was answered", low=1, high=4096, items=MESSAGE),
    "prompt": text("or the text that was continued or classified"),
    "answer": text("what the model said, or the label it gave", required=True),
    "rating": integer("1: good, -1: bad", -1, 1),
    "correction": text("what it should have said"),
}
