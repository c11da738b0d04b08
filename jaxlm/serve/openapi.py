"""The OpenAPI 3.1 document of the server, made from the tables that check the requests."""

from typing import Any

from jaxlm.serve import fields

_ERROR = {"type": "object", "required": ["error"], "properties": {"error": {"type": "object", "required": ["message", "type"], "properties": {
    "message": {"type": "string"}, "type": {"type": "string"}, "param": {"type": ["string", "null"]}, "code": {"type": ["string", "null"]}}}}}
_WHY = {400: "not JSON", 401: "no or a wrong API key", 404: "no such model, or not served here", 408: "the body did not arrive", 413: "the body is too large",
        415: "not application/json", 421: "another host name", 422: "a value that cannot be", 429: "too many requests wait", 500: "the server failed",
        503: "shutting down", 504: "took too long"}
_POSTS = {
    "/v1/completions": (fields.COMPLETION, "Continues texts", ("id", "object", "created", "model", "choices", "usage")),
    "/v1/chat/completions": (fields.CHAT, "Answers a chat", ("id", "object", "created", "model", "choices", "usage")),
    "/v1/embeddings": (fields.EMBEDDING, "Vectors of texts, from an encoder", ("object", "data", "model", "usage")),
    "/v1/classify": (fields.CLASSIFY, "Labels of texts and their probabilities, from a classifier", ("object", "data", "labels", "model", "usage")),
    "/v1/feedback": (fields.FEEDBACK, "Keeps an answer's rating or correction for the next fine-tuning", ("object", "kept")),
}
_GETS = {
    "/v1/models": ("The model", "application/json"), "/health": ("Whether it takes requests", "application/json"),
    "/ping": ("The same, where SageMaker looks", "application/json"),
    "/metrics": ("Counters for Prometheus", "text/plain"), "/openapi.json": ("This document", "application/json"),
}


def document(options: Any) -> dict[str, Any]:
    """Of a server with these `app.Options`."""
    from jaxlm import __version__

    error = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}
    errors = lambda *codes: {str(code): {"description": _WHY[code], **error} for code in codes if code != 401 or options.api_key}
    schema = lambda keys: {"type": "object", "required": list(keys)} if keys else {}
    answer = lambda kind, keys=(): {"200": {"description": "the answer", "content": {kind: {"schema": schema(keys)}}}}
    paths: dict[str, Any] = {}
    for path, (about, kind) in _GETS.items():
        paths[path] = {"get": {"summary": about, "responses": answer(kind) | errors(401, 421, 503)}}
    paths["/v1/models/{model}"] = {"get": {"summary": "The model by its id", "responses": answer("application/json", ("id", "object")) | errors(401, 404, 421),
                                           "parameters": [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]}}
    for path, (table, about, keys) in _POSTS.items():
        responses = answer("application/json", keys) | errors(*_WHY)
        if "stream" in table:
            responses["200"]["content"]["text/event-stream"] = {"schema": {"type": "string"}}
        paths[path] = {"post": {"summary": about, "responses": responses, "requestBody": {
            "required": True, "content": {"application/json": {"schema": fields.document(table)}}}}}
    bodies = [fields.INSTANCES, *(table for path, (table, _, _) in _POSTS.items() if path != "/v1/feedback")]
    either = {"200": {"description": "what that endpoint answers, or predictions", "content": dict.fromkeys(("application/json", "text/event-stream"), {})}}
    paths["/invocations"] = {"post": {
        "summary": "A body of any endpoint of /v1, or several, for SageMaker and Vertex AI", "responses": either | errors(*_WHY),
        "requestBody": {"required": True, "content": {"application/json": {"schema": {"anyOf": [fields.document(table) for table in bodies]}}}}}}
    found = {"openapi": "3.1.0", "info": {"title": f"jaxlm: {options.name}", "version": __version__}, "paths": paths,
             "components": {"schemas": {"Error": _ERROR}}}
    if options.api_key:
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"key": []}]
    return found
