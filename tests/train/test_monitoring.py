"""What tells about a run besides metrics.jsonl: a trace, norms by layer, other writers, a word to a URL."""

import http.server
import json
import sys
import threading
import types

import pytest

from jaxlm import config
from jaxlm.train import loop, profile, report, webhook, writers
from tests.train import runs


class Fake:
    """Stands in for wandb, mlflow and trackio: remembers every call."""

    def __init__(self, fails_at=None):
        self.calls, self.fails_at, self.info = [], fails_at, types.SimpleNamespace(run_id="m1")

    def __getattr__(self, name):
        def call(*arguments, **options):
            self.calls.append((name, arguments, options))
            if name == self.fails_at:
                raise RuntimeError("no\nnetwork")
            return self
        return call

    def rows(self, name):
        return [arguments[0] for called, arguments, _ in self.calls if called == name]


@pytest.fixture
def fakes(monkeypatch):
    found = {"wandb": Fake(), "mlflow": Fake(), "trackio": Fake(fails_at="log")}
    for name, fake in found.items():
        monkeypatch.setitem(sys.modules, name, fake)
    return found


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """A run with everything on; one layer, eight steps, 3 to 7 traced."""
    folder = tmp_path_factory.mktemp("told")
    cfg = runs.load(folder, [("model.layers", "1"), ("train.profile", "3 steps"), ("train.layer_norms", "true"), ("train.writers", "wandb,mlflow,trackio"),
                             ("checkpoint.every", "100"), ("train.sample_prompt", "the")], steps=8)
    made = {"wandb": Fake(), "mlflow": Fake(), "trackio": Fake(fails_at="log")}
    with pytest.MonkeyPatch.context() as patch, runs.devices(1):
        for name, fake in made.items():
            patch.setitem(sys.modules, name, fake)
        assert loop.run(cfg, folder / "run") == 0
    return folder / "run", made


def test_a_trace_and_a_memory_profile(told):
    found = list((told[0] / "plugins" / "profile").glob("*/*.xplane.pb"))
    assert len(found) == 1 and found[0].stat().st_size > 1000
    assert (told[0] / profile.MEMORY).read_bytes()[:2] == b"\x1f\x8b"


def test_norms_by_layer_add_up(told):
    row = [row for row in report.read_metrics(told[0]) if "train/loss" in row][-1]
    norms = {name: value for name, value in row.items() if name.startswith("grad_norm/")}
    assert "grad_norm/layers/0/attn/q" in norms and "update_norm/embed/tokens" in row and "grad_norm/layers/1/attn/q" not in norms
    assert sum(value**2 for value in norms.values()) ** 0.5 == pytest.approx(row["train/grad_norm"], rel=1e-4)


def test_writers_get_every_row_and_one_that_fails_is_left_out(told):
    workdir, made = told
    rows = report.read_metrics(workdir)
    assert made["wandb"].rows("log") == rows
    steps = [options["step"] for name, _, options in made["mlflow"].calls if name == "log_metrics"]
    assert steps == [row["step"] for row in rows] and made["mlflow"].rows("log_metrics") == [{k: v for k, v in row.items() if k != "step"} for row in rows]
    assert len(made["trackio"].rows("log")) == 1 and [name for name, *_ in made["wandb"].calls][-1] == "finish"
    known = json.loads((workdir / writers.FILE).read_text())
    assert set(known) == {"wandb", "mlflow", "trackio"} and known["mlflow"] == "m1"


def test_a_resumed_run_goes_on_in_its_own(fakes, tmp_path):
    said = []
    for _ in range(2):
        writers.Writers(("wandb", "mlflow", "trackio"), tmp_path, {"train": {"steps": "8"}}, said.append).close()
    first, second = (options["id"] for name, _, options in fakes["wandb"].calls if name == "init")
    assert first == second and [options["run_id"] for name, _, options in fakes["mlflow"].calls if name == "start_run"] == [None, "m1"] and not said
    fakes["trackio"].fails_at = "init"
    writers.Writers(("trackio",), tmp_path, {}, said.append).scalars(1, {"a": 1.0})
    assert said == ["warning: trackio is left out: RuntimeError: no network"]


def test_a_missing_package_says_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"train.writers=wandb needs a package that is not here: pip install 'jaxlm\[wandb\]'$"):
        writers.check(("wandb",))


@pytest.fixture
def listener(monkeypatch):
    """A server that remembers what it is sent; /moved sends on."""
    got = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            got.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            self.send_response(302 if self.path == "/moved" else 204)
            self.send_header("Location", "/elsewhere")
            self.end_headers()

        def log_message(self, *_):
            pass

    monkeypatch.setenv("no_proxy", "*")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", got
    server.shutdown()
    server.server_close()


def test_a_hook_hears_of_the_end(listener, tmp_path, monkeypatch, capsys):
    url, got = listener
    monkeypatch.setenv("HOOK", url + "/secret")
    report.Reporter(tmp_path, 0, {}).scalars(3, {"train/loss": 2.5})
    (tmp_path / "FINISHED").write_text("{}")
    with webhook.telling("env:HOOK", tmp_path):
        pass
    with pytest.raises(ValueError), webhook.telling(url + "/x", tmp_path):
        raise ValueError("/home/me/private.txt is damaged")
    with webhook.telling(url + "/moved", tmp_path):
        pass
    assert [path for path, _ in got] == ["/secret", "/x", "/moved"]
    assert got[0][1] == {"event": "finished", "run": tmp_path.name, "step": 0, "loss": 2.5, "error": "",
                         "text": f"jaxlm: {tmp_path.name} finished, newest checkpoint step 0"}
    assert got[1][1]["event"] == "failed" and got[1][1]["error"] == "ValueError" and "private" not in str(got[1])
    out = capsys.readouterr().out
    assert out == "warning: train.webhook: not delivered (HTTPError 302)\n"


def test_what_hangs_or_is_wrong_never_holds_a_run_up(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(webhook, "_SECONDS", 0.2)
    monkeypatch.setattr(webhook.urllib.request.OpenerDirector, "open", lambda *_, **__: threading.Event().wait(30))
    with webhook.telling("https://example.org/secret", tmp_path):
        pass
    monkeypatch.setenv("HOOK", "http://example.org/secret")
    with webhook.telling("env:HOOK", tmp_path):
        pass
    out = capsys.readouterr().out
    assert "no answer in 0.2 s" in out and "env:HOOK is no https URL, nothing was sent" in out and "secret" not in out
    with pytest.raises(ValueError, match="train.webhook must be an https URL"):
        config.TrainConfig(webhook="http://example.org/hook")
