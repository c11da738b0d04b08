"""A listening server in this process, for tests: a tiny model, a port of its own."""

import contextlib
import dataclasses
import functools
import threading
import time

import jax

from jaxlm.config import TransformerConfig
from jaxlm.data import tokenizer as tokenizers
from jaxlm.models import kinds
from jaxlm.serve import http, talk
from jaxlm.serve.app import Options, Server
from jaxlm.serve.engine import Engine, Limits
from jaxlm.serve.texts import Texts

BYTES = tokenizers.from_bytes(b'{"kind": "bytes"}\n')
DECODER = TransformerConfig(vocab_size=320, context=512, layers=1, width=32, heads=4, kv_heads=2)
LIMITS = Limits(rows=8, queue=30, page=16, chunk=64)


@functools.cache
def model(cfg):
    """Large random weights: with small ones every prompt has the same likeliest continuation."""
    found = kinds.build(cfg)
    return found, jax.jit(lambda key: jax.tree.map(lambda w: w * 8 if w.ndim > 1 else w, found.init(key)))(jax.random.key(0))


@contextlib.contextmanager
def serving(cfg=DECODER, limits=LIMITS, chat=True, objective="classify", temperature=1.0, **options):
    """Yields the server and its address."""
    found, params = model(cfg)
    if cfg.kind == "encoder" or cfg.labels:
        server = Server(Texts(found, params, cfg, BYTES, objective, temperature), Options("tiny", **options))
    else:
        server = Server(Engine(found, params, cfg, BYTES, limits), Options("tiny", **options), talk.chatting(BYTES, "chatml") if chat else None)
    running, known = [], threading.Event()

    def ready(one):
        running.append(one)
        known.set()

    thread = threading.Thread(target=http.serve, args=(server, "127.0.0.1", 0, 30), kwargs={"ready": ready})
    thread.start()
    assert known.wait(30)
    while not running[0].started:
        time.sleep(0.01)
    port = running[0].servers[0].sockets[0].getsockname()[1]
    try:
        yield server, f"http://127.0.0.1:{port}"
    finally:
        running[0].should_exit = True
        thread.join(60)
        assert not thread.is_alive()
        if server.engine:
            assert server.engine.load()["pages_used"] == server.engine.load()["running"] == server.engine.load()["waiting"] == 0, "a slot leaked"


def settled(server, seconds=20):
    """Waits until nothing runs."""
    end = time.monotonic() + seconds
    while any(server.engine.load()[name] for name in ("waiting", "running", "pages_used")):
        assert time.monotonic() < end, server.engine.load()
        time.sleep(0.01)


ENCODER = dataclasses.replace(DECODER, kind="encoder", causal=False, output="hidden", kv_heads=0, norm_position="post", positions="learned")
CLASSIFIER = dataclasses.replace(ENCODER, output="sequence_labels", labels=3, label_names=("bad", "so-so", "good"))
