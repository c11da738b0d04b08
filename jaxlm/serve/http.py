"""From a run to a listening server, and its end. Home of uvicorn."""

import logging
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any

from jaxlm.config import LABELLED
from jaxlm.serve.app import Options, Server
from jaxlm.serve.connections import bounded
from jaxlm.serve.engine import Engine, Limits
from jaxlm.serve.talk import chatting
from jaxlm.serve.texts import Texts
from jaxlm.train import classified
from jaxlm.train.saved import Run


def build(run: Run, limits: Limits, options: Options, template: str = "") -> Server:
    """The endpoints for what the run holds.

    Args:
      template: of chats, as `chat.template` takes it; empty: the checkpoint's own, if it has one.

    Raises:
      ValueError: one line: a model that cannot be served, a cache too small, no such template.
    """
    cfg = run.config.model
    if cfg.encoder_layers:
        raise ValueError(f"{run.workdir} holds an encoder-decoder, which is not served yet: use jaxlm generate")
    if cfg.output == "token_labels":
        raise ValueError(f"{run.workdir} holds a model that labels tokens, which is not served yet: use jaxlm eval")
    if cfg.kind == "encoder" or cfg.labels:
        objective = run.config.objective.name if run.config.objective.name in LABELLED else "classify"  # imported: classes
        return Server(Texts(run.model, run.params, cfg, run.tokenizer, objective, classified.temperature(run.workdir, run.step) or 1.0), options)
    template = template or run.chat_template
    talk = chatting(run.tokenizer, template) if template or run.tokenizer.chat_template else None
    return Server(Engine(run.model, run.params, cfg, run.tokenizer, limits), options, talk)


def serve(server: Server, host: str, port: int, drain: float, ready: Callable[[Any], None] | None = None) -> int:
    """Listens until SIGTERM or Ctrl-C, then finishes what was accepted.

    Args:
      drain: seconds that requests have to finish.
      ready: called with uvicorn's server before it listens; its `should_exit` ends it.

    Raises:
      OSError: the address is taken or not this machine's.
    """
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=1024)
    address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
    print(f"{server.options.name} at {address}/v1", flush=True)
    limits = server.engine.limits if server.engine else Limits()
    most = limits.rows + limits.queue + 256
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, most + 8192)), hard))  # those that have come are taken before any is looked at
    config = uvicorn.Config(server.app(), http=bounded(H11Protocol, most - 32), ws="none", access_log=False, log_config=None, log_level="warning",
                            limit_concurrency=most, timeout_graceful_shutdown=max(1, round(drain)), timeout_keep_alive=30, server_header=False)
    running = uvicorn.Server(config)
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):  # when all is done uvicorn raises again what it was told to end by: that is no failure
            signal.signal(number, lambda *_: None)
    if ready:
        ready(running)
    running.run(sockets=[listening])
    return 0
