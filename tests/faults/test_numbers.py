"""What is not finite, and what stands out, is skipped or said, named with its documents, and found again by replay."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import cli
from jaxlm.train import health, loop, nonfinite, replay, report
from tests.faults import planted

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return planted.base(tmp_path_factory.mktemp("base"), 60, 20)


# --- spikes ---


def feed(recent, losses, norms=None):
    for step, loss in enumerate(losses, 1):
        recent.add(step, loss, 1.0 if norms is None else norms[step - 1])


def test_the_limit_is_a_robust_one():
    draw = np.random.default_rng(0)
    usual = (3 + 0.1 * draw.standard_normal(300)).tolist()
    recent = health.Recent(8.0)
    feed(recent, usual)
    limit = recent.limits(301)[0]
    window = np.array(usual[-129:-1])  # steps 172 to 299: the one before is still on the device
    expected = np.median(window) + 8 * 1.4826 * np.median(np.abs(window - np.median(window)))
    assert limit == np.float32(expected) and 3.6 < limit < 4.0
    for place in range(180, 290, 8):  # one in eight is a spike: mean and deviation would move, these do not
        usual[place] = 30.0
    spiky = health.Recent(8.0)
    feed(spiky, usual)
    assert limit < spiky.limits(301)[0] < limit + 0.3


def test_nothing_is_a_spike_before_32_steps_or_when_it_is_off_and_what_is_not_finite_does_not_count():
    recent, off = health.Recent(8.0), health.Recent(0.0)
    feed(recent, [1.0] * 32)
    feed(off, [1.0] * 200)
    assert np.isinf(recent.limits(33)).all() and np.isinf(off.limits(201)).all() and not off.files()
    recent.add(33, math.nan, 1.0)
    recent.add(34, 1.0, math.inf)
    assert recent.limits(34).tolist() == pytest.approx([1.08, 1.08])  # at least 1 % of the median
    assert health.Recent(8.0, recent.files()[health.RECENT]).limits(34).tolist() == recent.limits(34).tolist()


def test_a_new_level_is_no_spike_for_ever():
    recent = health.Recent(8.0)
    feed(recent, [1.0] * 128 + [5.0] * 70)
    assert recent.limits(129)[0] < 5 < recent.limits(199)[0]


def test_a_spike_is_skipped_when_asked_for(base, tmp_path, capsys):
    """Limits that nothing passes, from a checkpoint's recent steps: updates are skipped, parameters stay, and the run ends with the documents."""
    planted.plant(base, 40, "final_norm/scale", (0,), 1.0, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    tree = json.loads(path.read_text())
    tree["train"] |= {"on_spike": "skip", "bad_steps": 2}
    cfg = planted.config.from_json(json.dumps(tree))
    original = health.Recent.limits
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(health.Recent, "limits", lambda self, step: np.array([0.5, 100], np.float32) if step > 41 else original(self, step))
        with pytest.raises(ValueError, match="was a spike in 2 steps in a row .*, the first at step 42, the last at step 43, rows 336 to 343"):
            loop.run(cfg, tmp_path / "run")
    rows = [row for row in planted.bad_steps(tmp_path / "run") if row["step"] > 40]
    assert [(row["step"], row["why"], row["skipped"]) for row in rows] == [(42, "spike", True), (43, "spike", True)]
    assert "a spike (loss" in capsys.readouterr().out and {one["id"] for one in rows[0]["documents"]} == base.occupants(42)
    logged = {row["step"]: row for row in report.read_metrics(tmp_path / "run") if "train/loss" in row}
    assert logged[42]["train/skipped"] == 1 and logged[42]["train/param_norm"] == logged[41]["train/param_norm"] != logged[40]["train/param_norm"]
    assert logged[42]["train/spikes"] == len(planted.bad_steps(tmp_path / "run")) - 1


# --- where it began ---


def test_the_operation_that_made_it_is_found_through_loops():
    def f(w, x):
        def body(x, w):
            return jax.checkpoint(lambda x: jnp.log(x) * w)(x), jnp.where(x > 0, x, -jnp.inf).max()
        x, most = jax.lax.scan(body, x, w)
        return x.sum() + 0 * jnp.where(jnp.isfinite(most), most, 0).sum()

    loop_name = lambda line, turn, turns: f"layer {turn} of {turns}"
    find = lambda w, x: nonfinite.find(jax.jit(jax.grad(f)), (w, x), ["w", "x"], loop_name)
    assert find(jnp.ones(3), jnp.full(4, 1e9)) is None  # 1e9, 20.7, 3.03, 1.1
    found = find(jnp.array([1.0, -1.0, 1.0]), jnp.full(4, 1e9))
    assert (found.operation, found.what, found.loops, found.backward, found.bad) == ("log", "NaN", ("layer 2 of 3",), False, 4)
    assert "test_numbers.py" in found.line
    assert "layer 2 of 3, the forward pass: log at" in str(found)
    spoilt = find(jnp.array([1.0, jnp.nan, 1.0]), jnp.full(4, 1e9))
    assert spoilt.operation == "w" and spoilt.first == (1,) and str(spoilt) == "w: 1 of 3 values is NaN, the first at [1]"
    backward = nonfinite.find(jax.grad(lambda x: jnp.sqrt(x).sum()), (jnp.array([0.0, 1.0]),), ["x"], loop_name)
    assert backward.what == "Inf" and backward.first == (0,)


# --- replay ---


@pytest.mark.slow
def test_a_token_that_overflows_is_skipped_and_its_document_named(base, tmp_path):
    letter = next(letter for letter in planted.LETTERS if planted.visited(base, letter, 40))
    assert planted.activation(base, 40, letter, tmp_path / "run") == ""


def test_replay_does_a_good_step_again_and_refuses_what_is_none(base, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["replay", f"--workdir={base.workdir}", "--step=47", "--rows=2", f"--json={tmp_path / 'out.json'}"])
    out = capsys.readouterr().out
    assert ended.value.code == 0 and "from the checkpoint of step 40: 7 steps to do" in out
    assert "steps 41 to 46: 6 of 6 were logged, all equal bit by bit" in out
    assert "(as logged, bit by bit); its update was made" in out and "not finite" not in out.lower()
    found = json.loads((tmp_path / "out.json").read_text())
    assert {one["id"] for row in found["rows"] for one in row["documents"]} == base.occupants(47) and len(found["rows"]) == 8
    assert sum(row["share"] for row in found["rows"]) == pytest.approx(1) and {one["layer"] for one in found["layers"]} == {None, 0, 1, 2}
    last = found["steps"][-1]  # without dropout the rows together are the batch
    assert sum(row["loss"] for row in found["rows"]) / sum(row["weight"] for row in found["rows"]) == pytest.approx(last["loss"], rel=1e-5)
    for row in found["rows"]:
        assert sum(one["loss"] for one in row["documents"]) == pytest.approx(row["loss"], rel=1e-5)
    whole = math.sqrt(sum(one["grad"] ** 2 for one in found["layers"]))
    assert whole == pytest.approx(last["grad_norm"], rel=1e-5) and all(one["before"] > 0 for one in found["layers"])
    for arguments, message in (([f"--workdir={base.workdir}", "--step=61"], "no step of"), ([f"--workdir={tmp_path}", "--step=1"], "holds no run")):
        with pytest.raises(SystemExit) as ended:
            cli.main(["replay", *arguments])
        error = capsys.readouterr().err
        assert ended.value.code == 2 and message in error and len(error.strip().splitlines()) == 1


def test_what_differs_from_the_log_is_said(base):
    steps = [replay.Done(step, 2.0, 1.0, "", False, {"loss": 2.0 + 1e-6 * (step == 7), "grad_norm": 1.0}) for step in range(5, 9)]
    said = replay._compared(steps, 4)
    assert "steps 5 to 8: 4 of 4 were logged, 1 of them differ, the first at step 7 (logged loss 2.000001, here 2.0), by at most 5.0e-07" in said


@pytest.mark.slow
def test_planted_faults_are_found_and_named(base, tmp_path):
    """One of the fifty of `python tools/chaos_storage.py numbers`; the test of a token that overflows is another."""
    assert planted.parameter(base, 40, "layers/mlp/down", 1, math.nan, tmp_path / "nan") == ""
