"""A word to a URL of yours when a run ends, however it ends. What goes wrong with it is a line, and never ends or holds up a run."""

import contextlib
import json
import os
import pathlib
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any

import jax

from jaxlm.train import checkpoint, report

_SECONDS = 5.0


class _Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):
        """Nowhere else: not from https to http either."""
        return None


@contextlib.contextmanager
def telling(target: str, workdir: pathlib.Path) -> Iterator[None]:
    """Around a run.

    Args:
      target: train.webhook.
    """
    event, why = "stopped", ""
    try:
        yield
        event = "finished" if (workdir / "FINISHED").exists() else "stopped"
    except Exception as error:
        event, why = "failed", type(error).__name__  # its words may name people's files and texts
        raise
    finally:
        if target and jax.process_index() == 0:
            send(target, body(event, workdir, why))


def body(event: str, workdir: pathlib.Path, why: str) -> dict[str, Any]:
    """What is sent: nothing but the name of the run's folder, the newest checkpoint and the last loss. Slack shows `text`."""
    step = max(checkpoint.steps(workdir), default=0)
    loss = next((row["train/loss"] for row in reversed(report.read_metrics(workdir)) if "train/loss" in row), None)
    name = workdir.resolve().name
    return {"event": event, "run": name, "step": step, "loss": loss, "error": why,
            "text": f"jaxlm: {name} {event}{f' ({why})' * bool(why)}, newest checkpoint step {step}"}


def send(target: str, content: dict[str, Any]) -> None:
    """POSTs JSON, and waits for 5 s at most; the URL, which may be a secret, is never shown."""
    url = os.environ.get(target.removeprefix("env:"), "") if target.startswith("env:") else target
    said: list[str] = []

    def post() -> None:
        try:
            request = urllib.request.Request(url, json.dumps(content).encode(), {"Content-Type": "application/json"}, method="POST")
            urllib.request.build_opener(_Stay()).open(request, timeout=_SECONDS).close()
            said.append("")
        except Exception as error:  # whatever a URL and a network can do
            said.append(type(error).__name__ + (f" {error.code}" if isinstance(getattr(error, "code", None), int) else ""))

    if not allowed(url):
        return print(f"warning: train.webhook: {target if target.startswith('env:') else 'it'} is no https URL, nothing was sent", flush=True)
    sender = threading.Thread(target=post, daemon=True, name="webhook")
    sender.start()
    sender.join(_SECONDS)
    if why := said[0] if said else f"no answer in {_SECONDS:g} s":
        print(f"warning: train.webhook: not delivered ({why})", flush=True)


def allowed(url: str) -> bool:
    """Whether it is https, or http to this machine."""
    parts = urllib.parse.urlsplit(url)
    return bool(parts.hostname) and (parts.scheme == "https" or parts.scheme == "http" and parts.hostname in ("localhost", "127.0.0.1", "::1"))
