"""Damaged files are named and not used; where nothing can be written a run says so and loses nothing."""

import functools
import json
import random
from collections import Counter

import pytest

from jaxlm import config
from jaxlm.data import sums
from jaxlm.train import report, setup
from tests.faults import damaged
from tests.train import runs


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """And parts that are compiled once, as in tests/train."""
    with runs.devices(1), pytest.MonkeyPatch.context() as patch:
        for module, name in ((setup, "build"), (report, "measure_matmul")):
            patch.setattr(module, name, functools.cache(getattr(module, name)))
        yield


# --- damaged files ---


def test_sums_name_what_is_damaged_missing_or_unknown(tmp_path):
    dice = random.Random(0)
    for name in ("config.json", "model.safetensors", "README.md"):
        (tmp_path / name).write_bytes(dice.randbytes(50))
    sums.check(tmp_path, lambda name: True)  # nothing is known
    sums.write(tmp_path)
    sums.check(tmp_path, lambda name: not name.endswith(".md"))
    names = [line.split("  ")[1] for line in (tmp_path / sums.FILE).read_text().splitlines()]
    assert names == ["config.json", "model.safetensors"]  # people edit the others
    for path, words in ((tmp_path / "model.safetensors", ("is damaged", "is missing")), (tmp_path / sums.FILE, ("is not named in", "is damaged", "SHA256SUMS"))):
        content = path.read_bytes()
        for how in ("flip", "zero", "cut") * 4:
            path.write_bytes(damaged.damage(content, how, dice))
            with pytest.raises(ValueError) as error:
                sums.check(tmp_path, lambda name: not name.endswith(".md"))
            assert any(word in str(error.value) for word in words) and str(tmp_path) in str(error.value) and "\n" not in str(error.value)
        path.write_bytes(content)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="model.safetensors is missing"):
        sums.check(tmp_path, lambda name: not name.endswith(".md"))


def test_a_damaged_config_is_named(tmp_path):
    path = tmp_path / "config.json"
    for text in ("", "{", "[]", "\x00\x00", config.to_json(config.Config()).replace('"lr"', '"lq"'), config.to_json(config.Config())[:-40]):
        path.write_text(text)
        with pytest.raises(ValueError, match="config.json is damaged .*: bring back the config.json in the files/ of a checkpoint") as error:
            config.read(path)
        assert "\n" not in str(error.value)
    path.write_text(json.dumps(json.loads(config.to_json(config.Config()))))
    assert config.read(path) == config.Config()


@pytest.mark.slow
def test_no_damage_is_silent(tmp_path):
    """60 of the 500 of `python tools/chaos_storage.py flips`."""
    world, dice, found = damaged.world(tmp_path), random.Random(2), Counter()
    for kind in damaged.KINDS:
        for path in damaged.files_of(world, kind, 10, dice):
            said = damaged.trial(world, kind, path, dice.choice(["flip", "zero", "cut"]), dice)
            assert said in ("named", "harmless"), (path, said)
            found[said] += 1
    assert found["named"] > 50
