"""The OpenAPI document and the server agree: bodies made from the document's own schemas are understood, wrong ones refused, answers are as it says."""

import random

import httpx
import pytest

from jaxlm.serve import openapi
from tests.serve import live

TYPES = ("string", "integer", "number", "boolean", "array", "object", "null")
WRONG = {"string": "x", "integer": 3, "number": 0.5, "boolean": True, "array": ["x"], "object": {"x": 1}, "null": None}
SMALL = {"max_tokens": 6, "max_completion_tokens": 6, "n": 2, "top_logprobs": 3, "logprobs": 3}  # so that answers are short


def choices(schema):
    return schema.get("anyOf", [schema])


def value(schema, draw, depth=0):
    """A random value that the schema allows."""
    schema = draw.choice(choices(schema))
    if "const" in schema or "enum" in schema:
        return schema["const"] if "const" in schema else draw.choice(schema["enum"])
    kind = schema.get("type") or draw.choice(TYPES[:4])
    if kind in ("integer", "number"):
        low, high = schema.get("minimum", -100), schema.get("maximum", 100)
        found = draw.choice([low, high, draw.uniform(low, high)])
        return int(found) if kind == "integer" else found
    if kind == "string":
        size = draw.choice([schema.get("minLength", 0), 1, min(schema.get("maxLength", 12), 12)])
        return "".join(chr(draw.choice([draw.randrange(32, 127), draw.randrange(0x80, 0xD800), draw.randrange(0x10000, 0x110000)])) for _ in range(size))
    if kind == "array":
        low = schema.get("minItems", 0)
        return [value(schema.get("items", {}), draw, depth + 1) for _ in range(draw.randrange(low, low + 3))] if depth < 4 else []
    if kind == "object":
        return {name: value(part, draw, depth + 1) for name, part in schema.get("properties", {}).items()
                if name in schema.get("required", ()) or draw.random() < 0.3}
    return draw.random() < 0.5 if kind == "boolean" else None


def check_answer(document, path, answer):
    """The status is in the document, and the body as it says."""
    documented = document["paths"][path]["post"]["responses"]
    assert str(answer.status_code) in documented, (path, answer.status_code, answer.text)
    if answer.status_code != 200:
        error = answer.json()["error"]
        assert set(document["components"]["schemas"]["Error"]["properties"]["error"]["required"]) <= set(error) and answer.status_code < 500, answer.text
        return
    kind = answer.headers["content-type"].partition(";")[0]
    schema = documented["200"]["content"][kind].get("schema", {})
    if kind == "application/json":
        assert set(schema.get("required", ())) <= set(answer.json())


@pytest.mark.slow
@pytest.mark.parametrize("cfg", [live.DECODER, live.ENCODER, live.CLASSIFIER], ids=["decoder", "encoder", "classifier"])
def test_bodies_made_from_the_document(cfg, tmp_path):
    draw, statuses = random.Random(0), set()
    with live.serving(cfg, feedback=tmp_path / "feedback.jsonl", max_tokens=8) as (server, address), httpx.Client(base_url=address, timeout=120) as client:
        document = client.get("/openapi.json").json()
        assert document["openapi"].startswith("3.1") and set(document["paths"]) >= set(openapi._POSTS)
        for path, of in document["paths"].items():
            for _ in range(25 if "post" in of else 0):
                schema = draw.choice(choices(of["post"]["requestBody"]["content"]["application/json"]["schema"]))
                body = value(schema, draw)
                body |= {name: small for name, small in SMALL.items() if type(body.get(name)) is int}
                body |= {"model": "tiny"} if body.get("model") else {}
                answer = client.post(path, json=body)
                check_answer(document, path, answer)
                statuses.add(answer.status_code)
                message = answer.json()["error"]["message"] if answer.status_code == 422 else ""
                if path != "/invocations":  # there the server has one of the endpoints only
                    wrongly = ("is unknown;", " must be string", " must be integer", " must be number", " is missing")
                    assert not any(text in message for text in wrongly), (body, message)
                name, part = draw.choice(list(schema["properties"].items()))
                allowed = {one.get("type") for one in choices(part)} | ({"integer"} if any(one.get("type") == "number" for one in choices(part)) else set())
                if None in allowed or set(TYPES) - {"null"} <= allowed:
                    continue
                wrong = client.post(path, json=body | {name: WRONG[draw.choice([kind for kind in TYPES[:6] if kind not in allowed])]})
                check_answer(document, path, wrong)
                assert wrong.status_code != 200, (path, name, wrong.request.content)
        if server.engine:
            live.settled(server)
    assert {200, 422} <= statuses and not server.stats.error
