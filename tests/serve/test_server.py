"""The server through the official client, through raw bytes, and through hostile requests."""

import dataclasses
import json
import random
import socket
import threading
import types
import urllib.parse

import httpx
import numpy as np
import openai
import pytest

from jaxlm.serve import app, openapi
from tests.serve import live


@pytest.fixture(scope="module")
def server():
    with live.serving(hosts=("127.0.0.1", "localhost"), max_tokens=32) as (server, address):
        yield server, address


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server[1]}/v1", api_key="none", max_retries=0)


def test_completions_by_the_official_client(client, server):
    assert [m.id for m in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").id == "tiny"
    whole = client.completions.create(model="tiny", prompt="Hello", max_tokens=20, temperature=0)
    assert whole.choices[0].finish_reason == "length" and whole.usage.completion_tokens == 20 and whole.usage.prompt_tokens == 6
    events = list(client.completions.create(model="tiny", prompt="Hello", max_tokens=20, temperature=0, stream=True, stream_options={"include_usage": True}))
    assert "".join(e.choices[0].text for e in events[:-1]) == whole.choices[0].text and events[-2].choices[0].finish_reason == "length"
    assert len(events) > 5 and not events[-1].choices and events[-1].usage.total_tokens == 26
    tokens = client.completions.create(model="tiny", prompt=[257, *b"Hello"], max_tokens=20, temperature=0)
    assert tokens.choices[0].text == whole.choices[0].text
    several = client.completions.create(model="tiny", prompt=["Hello", "Bye"], n=2, max_tokens=5, temperature=1, seed=7, echo=True)
    assert [c.index for c in several.choices] == [0, 1, 2, 3] and [c.text[:3] for c in several.choices] == ["Hel", "Hel", "Bye", "Bye"]
    assert several.usage.prompt_tokens == 6 + 4 and several.usage.completion_tokens == 20
    one = client.completions.create(model="tiny", prompt="Hello", max_tokens=5, temperature=1, seed=8)
    assert "Hello" + one.choices[0].text == several.choices[1].text != several.choices[0].text
    shares = client.completions.create(model="tiny", prompt="Hello", max_tokens=20, temperature=0, logprobs=3).choices[0].logprobs
    assert len(shares.tokens) == 20 and shares.text_offset[0] == 0 and all(len(top) <= 3 and max(top.values()) == share
                                                                          for top, share in zip(shares.top_logprobs, shares.token_logprobs))
    text = whole.choices[0].text
    cut = client.completions.create(model="tiny", prompt="Hello", max_tokens=20, temperature=0, stop=[text[4:6]])
    assert cut.choices[0].finish_reason == "stop" and cut.choices[0].text == text[:text.index(text[4:6])]
    loose = client.completions.create(model="tiny", prompt="Hello", extra_body={"top_k": 1, "repetition_penalty": 1.5, "ignore_eos": True}, user="me")
    assert loose.usage.completion_tokens == 16


def test_chats_by_the_official_client(client):
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "!"}]}]
    whole = client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_completion_tokens=12, logprobs=True, top_logprobs=2)
    said = whole.choices[0]
    assert said.message.role == "assistant" and said.finish_reason == "length" and whole.usage.completion_tokens == 12
    assert len(said.logprobs.content) == 12 and all(len(t.top_logprobs) == 2 and t.logprob == t.top_logprobs[0].logprob for t in said.logprobs.content)
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi!"}]
    same = client.chat.completions.create(model="tiny", temperature=0, max_tokens=12, messages=plain)
    assert same.choices[0].message.content == said.message.content
    events = list(client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=12, stream=True))
    assert events[0].choices[0].delta.role == "assistant" and "".join(e.choices[0].delta.content or "" for e in events) == said.message.content
    assert client.chat.completions.create(model="tiny", messages=messages, n=3, seed=1, max_tokens=4).choices[2].index == 2
    assert client.chat.completions.create(model="tiny", messages=messages).usage.completion_tokens > 16, "without a limit the server's counts"


@pytest.mark.parametrize("body, error, message", [
    ({"prompt": "x", "model": "other"}, openai.NotFoundError, "'other' is not here; 'tiny' is"),
    ({"prompt": "x", "temperature": 3}, openai.UnprocessableEntityError, "temperature=3 must be 0 to 2"),
    ({"prompt": "x", "temperature": "hot"}, openai.UnprocessableEntityError, "temperature must be number, not a string"),
    ({"prompt": "x", "max_tokens": 10**400}, openai.UnprocessableEntityError, "max_tokens=1000"),
    ({"prompt": "x", "n": True}, openai.UnprocessableEntityError, "n must be integer, not a boolean"),
    ({"prompt": "x", "tmperature": 1}, openai.UnprocessableEntityError, "tmperature is unknown"),
    ({}, openai.UnprocessableEntityError, "prompt is missing"),
    ({"prompt": [1, "a"]}, openai.UnprocessableEntityError, "not a mixture"),
    ({"prompt": [[]]}, openai.UnprocessableEntityError, "no tokens"),
    ({"prompt": [5000]}, openai.UnprocessableEntityError, "token 5000 is not in the vocabulary of 259"),
    ({"prompt": "x" * 600}, openai.UnprocessableEntityError, "has 601 tokens.*the model's context holds 512"),
    ({"prompt": "x", "max_tokens": 511}, openai.UnprocessableEntityError, "ask for at most 510"),
    ({"prompt": "x", "stop": [""]}, openai.UnprocessableEntityError, r"stop\[0\] has 0 characters"),
    ({"prompt": "x", "logit_bias": {"5": 1}}, openai.UnprocessableEntityError, "logit_bias is not served here"),
    ({"prompt": ["x"] * 31}, openai.UnprocessableEntityError, "31 answers in one request are more than the 30"),
])
def test_refusals_have_openais_shape(client, body, error, message):
    with pytest.raises(error, match=message) as found:
        client.post("/completions", body=body, cast_to=object)
    assert found.value.body["message"] and set(found.value.body) == {"message", "type", "param", "code"}
    assert (found.value.body["code"] == "context_length_exceeded") == ("context" in message or "at most 510" in message)


def test_bodies_hosts_and_methods(server):
    server, address = server
    json_type = {"content-type": "application/json"}
    post = lambda content, path="/v1/completions", **headers: httpx.post(address + path, content=content, headers=json_type | headers, timeout=60)
    answers = {name: post(content) for name, content in {"broken": b'{"prompt": ', "nan": b'{"prompt": "x", "temperature": NaN}', "latin":
                                                         b'{"prompt": "\xe9"}',                                                          "deep": b"[" * 100_000, "digits": b'{"n": ' + b"9" * 5000 + b"}"}.items()}
    assert {name: answer.status_code for name, answer in answers.items()} == dict.fromkeys(answers, 400)
    assert post(b'{"prompt": "' + b"x" * 2**20 + b'"}').status_code == 413
    assert post((b"x" * 2**16 for _ in range(20))).status_code == 413, "without a length too"
    assert post(b"{}", **{"content-type": "text/plain"}).status_code == 415
    assert post(b"{}", host="evil.example:80").status_code == 421
    assert "half of a surrogate pair" in post(b'{"prompt": "\\ud800"}').json()["error"]["message"]
    assert post(b"[]").status_code == 422 and "must be a JSON object" in post(b"[]").json()["error"]["message"]
    assert httpx.get(f"{address}/v1/completions").status_code == 405 and httpx.get(f"{address}/nothing").json()["error"]["type"] == "invalid_request_error"
    assert post(b"{}", path="/v1/embeddings").status_code == post(b'{"input": "x"}', path="/v1/classify").status_code == 422
    assert post(b'{"prompt": "x", "answer": "y", "rating": 1}', path="/v1/feedback").status_code == 404
    assert httpx.get(f"{address}/ping").status_code == 200
    health = httpx.get(f"{address}/health", headers={"origin": "http://x"})
    assert health.json() == {"status": "ok"} and "access-control-allow-origin" not in health.headers
    live.settled(server)
    text = httpx.get(f"{address}/metrics").text
    assert "jaxlm_running 0" in text and 'jaxlm_http_responses_total{code="413"} 2' in text and "jaxlm_time_to_first_token_seconds_bucket" in text
    document = httpx.get(f"{address}/openapi.json").json()
    assert document == json.loads(json.dumps(openapi.document(server.options))) and "/v1/chat/completions" in document["paths"]


@pytest.mark.parametrize("host", ["a/health?", "a/?", "a/ping#", "localhost/health?x="])
def test_no_name_of_a_host_opens_a_path(host, monkeypatch):
    """The key was not asked for where Starlette (before it looked at names of hosts) put the path of such a name before the request's own."""
    from starlette import requests
    monkeypatch.setattr(requests.Request, "url", property(lambda self: urllib.parse.urlparse(f"http://{host}{self.scope['path']}")))
    guarded = app._Guard(None, types.SimpleNamespace(options=app.Options("tiny", api_key="secret")))
    request = requests.Request({"type": "http", "method": "POST", "path": "/v1/completions", "headers": [(b"host", host.encode())]})
    with pytest.raises(app.Refused) as caught:
        guarded._check(request)
    assert caught.value.status == 401


def test_a_request_that_goes_wrong_while_it_is_answered_leaves_no_trace(server, caplog):
    where = urllib.parse.urlparse(server[1])
    with socket.create_connection((where.hostname, where.port)) as client:
        client.sendall(b"POST /nowhere HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\nno length\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 400")
    assert httpx.get(f"{server[1]}/health").status_code == 200
    assert "Invalid HTTP request" in caplog.text and "Traceback" not in caplog.text


def test_a_client_that_goes_frees_its_slot(server):
    server, address = server
    for stream in (True, False):
        before = server.stats.finished["cancelled"]
        connection = socket.create_connection(urllib.parse.urlparse(address).netloc.split(":"))
        body = json.dumps({"prompt": "x", "max_tokens": 500, "ignore_eos": True, "stream": stream, "n": 8}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        while not server.engine.load()["running"]:
            pass
        connection.close()
        live.settled(server)
        assert server.stats.finished["cancelled"] > before


def test_keys_queues_timeouts_origins_and_feedback(tmp_path):
    limits = live.Limits(rows=1, queue=2, page=16, chunk=64)
    options = {"api_key": "secret", "origins": ("https://page.example",), "timeout": 60.0, "feedback": tmp_path / "feedback.jsonl"}
    with live.serving(limits=limits, **options) as (server, address):
        key = {"authorization": "Bearer secret"}
        for path, status in (("/health", 200), ("/v1/models", 401), ("/metrics", 401), ("/openapi.json", 401)):
            assert httpx.get(address + path).status_code == status and httpx.get(address + path, headers=key).status_code == 200
        wrong = httpx.post(f"{address}/v1/completions", json={"prompt": "x"}, headers={"authorization": "Bearer secre"})
        assert wrong.status_code == 401 and wrong.json()["error"]["type"] == "authentication_error"
        there = httpx.options(f"{address}/v1/completions", headers={"origin": "https://page.example", "access-control-request-method": "POST"})
        assert there.headers["access-control-allow-origin"] == "https://page.example"
        assert "access-control-allow-origin" not in httpx.get(f"{address}/health", headers={"origin": "https://other.example"}).headers
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="secret", max_retries=0)
        found = []

        def one():
            try:
                found.append(client.completions.create(model="tiny", prompt="x", max_tokens=400, extra_body={"ignore_eos": True}).choices[0].finish_reason)
            except openai.APIStatusError as error:
                found.append(error.status_code)

        threads = [threading.Thread(target=one) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert found.count(429) >= 5 and found.count("length") >= 1 and set(found) <= {429, "length"}
        send = lambda **body: httpx.post(f"{address}/v1/feedback", json=body, headers=key, timeout=60).status_code
        messages = [{"role": "user", "content": "Hi"}]
        assert send(messages=messages, answer="Hello", rating=1) == send(prompt="2 + 2 =", answer=" 5", correction=" 4", rating=-1) == 200
        assert send(messages=messages, answer="x") == send(answer="x", rating=1) == send(prompt="x", answer="y", rating=2) == 422
        lines = [json.loads(line) for line in (tmp_path / "feedback.jsonl").read_text().splitlines()]
        assert lines[0]["messages"] == [*messages, {"role": "assistant", "content": "Hello"}] and lines[0]["rating"] == 1
        assert lines[1]["text"] == "2 + 2 = 4" and (lines[1]["chosen"], lines[1]["rejected"]) == (" 4", " 5") and len(lines) == 2


def test_encoders_embed_and_classify():
    with live.serving(live.ENCODER) as (server, address):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        found = client.embeddings.create(model="tiny", input=["a cat", "a much longer text", [257, *b"a cat", 258]])
        vectors = np.array([row.embedding for row in found.data])
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
        np.testing.assert_allclose(vectors[0], vectors[2], atol=1e-6)
        assert found.usage.prompt_tokens == 7 + 20 + 7 and vectors.shape == (3, 32)
        plain = client.embeddings.create(model="tiny", input="a cat", encoding_format="float")
        np.testing.assert_allclose(plain.data[0].embedding, vectors[0], atol=1e-5)  # another batch
        with pytest.raises(openai.UnprocessableEntityError, match="an encoder, which does not continue text: use /v1/embeddings"):
            client.completions.create(model="tiny", prompt="x")
        with pytest.raises(openai.UnprocessableEntityError, match="602 tokens and the model reads 1 to 512"):
            client.embeddings.create(model="tiny", input="x" * 600)
    with live.serving(live.CLASSIFIER) as (server, address):
        found = httpx.post(f"{address}/v1/classify", json={"input": ["fine", "awful"]}, timeout=60).json()
        assert found["labels"] == ["bad", "so-so", "good"]
        assert [row["label"] for row in found["data"]] == [found["labels"][int(np.argmax(row["probs"]))] for row in found["data"]]
        assert all(abs(sum(row["probs"]) - 1) < 1e-5 and row["num_classes"] == 3 for row in found["data"])
        assert httpx.get(f"{address}/v1/models").json()["data"][0]["task"] == "classify"
        # What SageMaker sends is a body of an endpoint; Vertex AI's predict sends several.
        assert httpx.post(f"{address}/invocations", json={"input": ["fine", "awful"]}).json() == found
        several = httpx.post(f"{address}/invocations", json={"instances": [{"input": "fine"}, {"input": "awful"}], "parameters": {"model": "tiny"}}).json()
        np.testing.assert_allclose([one["data"][0]["probs"] for one in several["predictions"]], [row["probs"] for row in found["data"]], atol=1e-5)
        for body in ({"instances": []}, {"instances": [{"input": "x"}, {}]}, {"instances": [{"input": "x", "stream": True}]}, {}, [], {"prompt": "x"}):
            assert httpx.post(f"{address}/invocations", json=body).status_code == 422, body
        # Calibrated: the saved temperature divides the logits. Several labels: each has its own probability.
        logits, texts = np.log([row["probs"] for row in found["data"]]), server.texts
        texts.temperature = 2.5
        want = np.exp(logits / 2.5) / np.exp(logits / 2.5).sum(-1, keepdims=True)
        ask = lambda: httpx.post(f"{address}/v1/classify", json={"input": ["fine", "awful"]}).json()["data"]
        np.testing.assert_allclose([row["probs"] for row in ask()], want, atol=1e-6)
        texts.objective = "multi_label"
        rows = ask()
        assert [row["labels"] for row in rows] == [[name for name, share in zip(found["labels"], row["probs"]) if share > 0.5] for row in rows]
        odds = np.log([row["probs"] for row in rows]) - np.log1p(-np.array([row["probs"] for row in rows]))
        np.testing.assert_allclose((odds - odds[:, :1]) * 2.5, logits - logits[:, :1], atol=1e-4)
        texts.objective = "regress"
        np.testing.assert_allclose([row["value"] for row in ask()], odds[:, 0] * 2.5, atol=1e-4)


def test_a_decoder_labels_a_text_by_its_last_token():
    cfg = dataclasses.replace(live.DECODER, output="sequence_labels", labels=2, label_names=("no", "yes"))
    model, params = live.model(cfg)
    ids = live.BYTES.encode("Hi there")
    row = np.array([[live.BYTES.bos, *ids, live.BYTES.eos]], np.int32)
    hidden, _, _ = model.apply(params, {"tokens": row, "positions": np.arange(row.shape[1])[None], "segments": np.ones_like(row)})
    logits = np.asarray(model.head(params, hidden[:, -1:]))[0]
    with live.serving(cfg) as (server, address):
        found = httpx.post(f"{address}/v1/classify", json={"input": ["Hi there", "Hi there, and a longer text beside it"]}, timeout=60).json()["data"][0]
        np.testing.assert_allclose(np.log(found["probs"])[1] - np.log(found["probs"])[0], logits[1] - logits[0], atol=1e-4)
        assert httpx.post(f"{address}/v1/completions", json={"prompt": "x"}).status_code == 422


# --- hostile requests ---


def hostile(address, seed):
    """One request of a kind that nobody should send. Returns the status, or None where it went before the answer."""
    random_ = random.Random(seed)
    pick, path = random_.choice, random_.choice(["/v1/completions", "/v1/chat/completions", "/v1/classify", "/v1/embeddings", "/v1/feedback", "/" + "x" * 3000])
    ranges = ((32, 127), (0x80, 0xd800), (0xe000, 0x110000), (0, 1))
    text = "".join(chr(random_.randrange(*random_.choice(ranges))) for _ in range(random_.randrange(60)))
    values = [None, True, 0, -1, 1, 5, 2**31, 2**70, 1e308, -0.0, "", text, "\ud800", [], [[]], {}, {"a": [1]}, [text], [1, 2, 300], [[257, 65]], [None],
              "x" * 5000, [{"role": "user", "content": text}], [{"role": "user", "content": [{"type": "text", "text": text}]}],
              [{"role": pick(["system", "x"]), "content": 1}]]
    keys = ["prompt", "messages", "max_tokens", "n", "temperature", "top_p", "top_k", "stop", "seed", "logprobs", "stream", "echo", "input", "model",
            "stream_options", text[:8]]
    body = {pick(keys): pick(values) for _ in range(random_.randrange(6))}
    if random_.random() < 0.7:
        body |= {"prompt": text} if path == "/v1/completions" else {"messages": [{"role": "user", "content": text}]}
    data = json.dumps(body).encode()
    kind = random_.random()
    if kind < 0.15:
        data = data[:random_.randrange(len(data) + 1)] + random_.randbytes(random_.randrange(9))
    elif kind < 0.2:
        data = b'{"prompt": "' + b"y" * random_.choice([2**20, 2**21]) + b'"}'
    elif kind < 0.25:
        data = b""
    host, port = urllib.parse.urlparse(address).netloc.split(":")
    length = len(data) if random_.random() < 0.9 else random_.choice([0, len(data) + 10, 2**40, -1, "x"])
    mime = "application/json" if random_.random() < 0.95 else ascii(text[:5])
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: {mime}\r\ncontent-length: {length}\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        try:
            connection.sendall(head.encode("latin-1", "replace") + data)
            leave = random_.random()
            if leave < 0.2 or length != len(data):  # a body that never comes is not waited for here
                return None
            if leave < 0.3:
                connection.recv(random_.randrange(1, 200))
                return None
            answer = connection.recv(4096)
            return int(answer.split()[1]) if answer else None
        except (ConnectionError, TimeoutError):
            return None


def attack(address, count, threads=8):
    found = []
    work = lambda first: found.extend(hostile(address, seed) for seed in range(first, count, threads))
    running = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return found


def check(server, address, found):
    statuses = set(found) - {None}
    assert statuses <= {200, 400, 404, 413, 415, 421, 422, 429}, statuses
    assert {200, 400, 422} <= statuses and len(found) > 20
    live.settled(server, 60)
    assert not server.stats.error
    assert httpx.post(f"{address}/v1/completions", json={"prompt": "Hello", "max_tokens": 3}, timeout=60).status_code == 200


def test_hostile_requests(server):
    server, address = server
    check(server, address, attack(address, 120))
