"""The scaling law against what its papers publish, its optimum against a search, and the command that prints it."""

import itertools
import json

import pytest

from jaxlm import cli
from jaxlm.aot import chips, scaling


def test_the_published_points():
    """Besiroglu et al. 2024: about 20 tokens for each parameter at Chinchilla's compute, as Chinchilla itself (70 B, 1.4 T) was trained."""
    chinchilla = scaling.of_both(70e9, 1.4e12)
    best = scaling.of_compute(chinchilla.flops)
    assert 60e9 < best.parameters < 80e9 and 17 < best.tokens / best.parameters < 25 and 0.9 < chinchilla.over_training < 1.25
    assert chinchilla.loss == pytest.approx(1.974, abs=2e-3) and chinchilla.loss - best.loss < 1e-3
    gopher = scaling.of_both(280e9, 300e9)  # about the same compute, too large: Hoffmann et al. 2022 measured it clearly worse
    assert gopher.loss > chinchilla.loss + 0.01 and gopher.over_training < 0.1


@pytest.mark.parametrize("flops", [1e15, 1e19, 5.76e23])
def test_the_optimum_is_one(flops):
    best = scaling.of_compute(flops)
    assert best.flops == pytest.approx(flops)
    assert all(best.loss < scaling.loss(best.parameters * f, best.tokens / f) for f in (0.5, 0.98, 1.02, 2))


def test_the_four_ways_to_ask_agree():
    for flops, factor in itertools.product((1e17, 1e22), (1.0, 5.0)):
        size = scaling.of_compute(flops, factor)
        for other in (scaling.of_tokens(size.tokens, factor), scaling.of_parameters(size.parameters, factor), scaling.of_both(size.parameters, size.tokens)):
            assert (other.parameters, other.tokens, other.over_training) == pytest.approx((size.parameters, size.tokens, factor), rel=1e-9)
    costs = [scaling.of_compute(1e20, factor) for factor in scaling.FACTORS]
    assert all(a.loss < b.loss and a.parameters > b.parameters and a.tokens < b.tokens for a, b in itertools.pairwise(costs))


def test_time_and_money():
    there = chips.topology("v5e:4x4")
    flops = scaling.flops_of(100.0, there, 0.5)
    assert flops == pytest.approx(100 / 1.2 * 3600 * 197e12 * 0.5)
    assert scaling.hours(scaling.of_compute(flops), there, 0.5) == pytest.approx(100 / 1.2 / 16)


@pytest.mark.parametrize("parameters", [1e6, 5e6, 119e6, 1.1e9, 70e9])
def test_a_shape_has_about_that_size(parameters):
    layers, width, heads = scaling.Size(parameters, 1e9, 1.0).shape
    assert 0.8 < 16 * layers * width**2 / parameters < 1.25 and width % heads == 0 and width // heads in (64, 128)


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(["fit", *arguments])
    out = capsys.readouterr()
    return ended.value.code or 0, out.out, out.err


def test_the_command(capsys, tmp_path):
    code, output, _ = run(capsys, "--dollars=500", "--topology=v5e:4x4", f"--json={tmp_path / 'a.json'}")
    assert code == 0 and output.startswith("predicted by") and "Besiroglu et al. 2024" in output and "MFU 40% (assumed)" in output
    assert [line.split()[-1] for line in output.splitlines()[2:6]] == ["500.00"] * 4 and "--config.model.layers=" in output
    rows = json.loads((tmp_path / "a.json").read_text())
    assert len(rows) == 4 and all(row["predicted"] and row["flops"] == pytest.approx(rows[0]["flops"]) for row in rows)
    assert "extrapolated" in run(capsys, "--parameters=5e6")[1] and "1.09 x" in run(capsys, "--parameters=70e9", "--tokens=1.4e12")[1]


@pytest.mark.parametrize(("arguments", "words"), [
    ((), "--config is needed"), (("--config=quickstart",), "--topology is needed"), (("--tokens=1e9", "--flops=1e20"), "give one of"),
    (("--tokens=1e9", "--config=quickstart"), "no --config"), (("--dollars=5",), "--dollars needs one --topology"), (("--tokens=-3",), "tokens"),
    (("--dollars=5", "--topology=v5e:4x4,v6e:4x4"), "one --topology")])
def test_mistakes_are_one_line(capsys, arguments, words):
    code, _, error = run(capsys, *arguments)
    assert code == 2 and words in error and error.count("\n") == 1
