"""The table of chips, topologies as users write them, prices of their own."""

import json

import pytest

from jaxlm import chips


@pytest.mark.parametrize("text, name, count", [("v5e:4x4", "v5e:4x4", 16), ("v5p:2x2x2", "v5p:2x2x2", 8), (" v6e:2x4", "v6e:2x4", 8), ("gpu:h100x8", "gpu:h100x8", 8)])
def test_topologies(text, name, count):
    found = chips.topology(text)
    assert (found.name, found.chips) == (name, count)


def test_slices_multiply():
    assert chips.topology("v5e:4x4", 2).chips == 32
    assert str(chips.topology("v5e:4x4", 2)) == "2 x v5e:4x4"


@pytest.mark.parametrize("text", ["v5e:3x3", "v7x:2x2", "v5e", "v5e:2x2x2", "v5p:4x4", "gpu:h900x8", "gpu:h100x0", "h100x8", ""])
def test_unknown_topologies_list_the_known_ones(text):
    with pytest.raises(ValueError, match="known: v5e, v6e as 2x2, .*v4, v5p as 2x2x1.*gpu:h100xN") as error:
        chips.topology(text)
    assert "\n" not in str(error.value)


def test_slices_of_gpus_are_refused():
    with pytest.raises(ValueError, match="gpu:h100x16"):
        chips.topology("gpu:h100x8", 2)


def test_prices_replace_figures(tmp_path):
    path = tmp_path / "prices.json"
    path.write_text(json.dumps({"v5e": {"dollars_per_hour": 0.5, "watts": 111}}))
    table = chips.read_prices(path)
    assert (table["v5e"].dollars_per_hour, table["v5e"].watts, table["v5e"].assumed) == (0.5, 111, ())
    assert chips.CHIPS["v5e"].assumed == ("watts",) and table["v5p"] == chips.CHIPS["v5p"]


@pytest.mark.parametrize("content, words", [
    ("{", "not JSON"), ("[]", "of the form"), ('{"v9": {}}', "unknown chip 'v9'; known: v4, v5e"), ('{"v5e": {"price": 1}}', "v5e.price is no figure"),
    ('{"v5e": {"watts": "much"}}', "must be a positive number"), ('{"v5e": {"flops": 0}}', "must be a positive number"), ('{"v5e": {"name": 3}}', "no figure")])
def test_bad_prices(tmp_path, content, words):
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(ValueError, match=words):
        chips.read_prices(tmp_path / "p.json")


@pytest.mark.parametrize("kind, count, name", [("TPU v5 lite", 16, "v5e:4x4"), ("TPU v5", 8, "v5p:2x2x2"), ("TPU v6 lite", 8, "v6e:2x4"), ("NVIDIA H100 80GB HBM3", 8, "gpu:h100x8"),
                                               ("cpu", 1, "v5e:2x2")])
def test_the_topology_of_this_machine(kind, count, name):
    assert chips.like(kind, count) == name
    chips.topology(name)


@pytest.mark.parametrize("kind, peak", [("TPU v6 lite", 918e12), ("TPU v5", 459e12), ("TPU v5 lite", 197e12), ("TPU v4", 275e12), ("TPU v3", 123e12), ("TPU v2", 45e12),
                                        ("NVIDIA H200", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA L4", 121e12), ("Tesla T4", 65e12), ("cpu", None),
                                        ("NVIDIA L40S", None)])
def test_the_peak_of_a_device(kind, peak):
    assert chips.peak_flops(kind) == peak
