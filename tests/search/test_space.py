"""What a space says, and what is refused in one line."""

import pytest

from jaxlm import config
from jaxlm.config import Config, ObjectiveConfig
from jaxlm.search import space
from jaxlm.search.space import Choice, Range


def test_a_line_and_a_file_say_the_same(tmp_path):
    line = space.read("optim.lr=log(1e-4, 1e-2,5); data.batch_size=8,16 ,32; optim.warmup=uniform(1%,10%); model.windows=(0,),(64,0);"
                      "model.layers=uniform(2,6,3); train.steps=log(100 steps,400 steps); optim.name=adamw,lion", Config())
    assert line == {"optim.lr": Range(1e-4, 1e-2, True, False, "", 5), "data.batch_size": Choice(("8", "16", "32")),
                    "optim.warmup": Range(1, 10, False, False, "%"), "model.windows": Choice(("(0,)", "(64,0)")),
                    "model.layers": Range(2, 6, False, True, "", 3), "train.steps": Range(100, 400, True, True, "steps"), "optim.name": Choice(("adamw", "lion"))}
    path = tmp_path / "space.toml"
    path.write_text('"optim.lr" = "log(1e-4,1e-2,5)"\n"model.layers" = "uniform(2,6,3)"\n[data]\nbatch_size = [8, 16, 32]\n[optim]\nname = ["adamw", "lion"]\n'
                    'warmup = "uniform(1%,10%)"\n[model]\nwindows = [[0], [64, 0]]\n[train]\nsteps = "log(100 steps,400 steps)"\n')
    told = space.read(str(path), Config())
    assert {key: value for key, value in told.items() if key != "model.windows"} == {key: value for key, value in line.items() if key != "model.windows"}
    build = lambda values: config.override(Config(), space.overrides(told, values))
    assert build({"model.windows": told["model.windows"].values[1]}).model.windows == (64, 0)
    assert build({"optim.warmup": 2.5, "train.steps": 150, "model.layers": 3}).optim.warmup == "2.5%"
    assert build({"train.steps": 150}).train.steps == "150 steps"
    # What is said of a range can be read again, and is how studies are compared.
    assert all(space.read(f"{key}={given}", Config()) == {key: given} for key, given in line.items())


def test_a_grid():
    found = space.read("optim.lr=log(1e-3,1e-1,3);model.layers=uniform(1,4,4);optim.name=adamw,lion", Config())
    grid = space.grid(found)
    assert len(grid) == 24 and grid[0] == {"optim.lr": 0.001, "model.layers": 1, "optim.name": "adamw"}
    assert sorted({point["optim.lr"] for point in grid}) == [0.001, 0.01, 0.1] and {point["model.layers"] for point in grid} == {1, 2, 3, 4}


@pytest.mark.parametrize("given, said", [
    ("optim.learning_rate=1,2", "config.optim.learning_rate does not exist"),
    ("optm.lr=1,2", "did you mean config.optim.lr"),
    ("optim.lr=log(1e-4)", "is no range: write log(LOW,HIGH)"),
    ("optim.lr=log(0,1)", "both above 0"),
    ("optim.lr=uniform(2,1)", "from low to high"),
    ("optim.lr=log(1%,2%)", "this key has no unit"),
    ("optim.warmup=uniform(1%,20 steps)", "both ends need one unit"),
    ("optim.name=log(1,2)", "is no number"),
    ("optim.name=adamw,lyon", "did you mean 'lion'"),
    ("data.batch_size=8,sixteen", "must be a whole number"),
    ("data.batch_size=8,8", "a value twice"),
    ("model.layers=uniform(1.5,3)", "must be a whole number"),
    ("optim.lr=__import__('os').system('x')", "must be a number"),
    ("optim.lr=1,2;optim.lr=3", "names optim.lr twice"),
    ("optim.lr", "is no KEY=VALUES"),
    (" ; ", "--space is empty"),
    ("checkpoint.metric=loss,accuracy", "changes what trials are measured by"),
    ("data.validation=0.1,0.2", "changes what trials are measured by"),
    ("tokenizer.vocab_size=500,1000", "set --config.checkpoint.metric=bits_per_byte"),
    ("nothing.toml", "cannot be read: No such file"),
])
def test_refused(given, said):
    with pytest.raises(ValueError) as error:
        space.read(given, Config())
    assert said in str(error.value) and "\n" not in str(error.value)


def test_tokenizers_are_compared_by_bytes_or_labels():
    by_bytes = config.override(Config(), [("checkpoint.metric", "bits_per_byte")])
    assert not space.shares_corpus(space.read("tokenizer.vocab_size=500,1000", by_bytes))
    space.read("train.init_from=hf:a,hf:b", Config(objective=ObjectiveConfig(name="classify")))
    with pytest.raises(ValueError, match="number of points of optim.lr"):
        space.grid(space.read("optim.lr=log(1e-3,1e-1)", Config()))
