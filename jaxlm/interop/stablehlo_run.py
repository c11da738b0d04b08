"""Runs a model that jaxlm exported as StableHLO. It needs jax, flatbuffers and numpy, and nothing of jaxlm:

  pip install jax flatbuffers
  python run.py --check                  # computes the sample again and compares
  python run.py 1 20 300                 # these token ids, continued by the likeliest ones (a decoder)

Or from Python, in this directory:

  import run
  model = run.load(".")
  logits = model.forward(tokens, lengths)             # any number of rows
  cache = model.start(rows)
  logits, cache = model.decode(tokens, cache)         # one token for each row
"""

import json
import pathlib
import sys

import jax
import jax.export
import numpy as np


class Exported:
    """The programs of a directory, with its weights on the device.

    `forward(tokens [rows, length] int32, lengths [rows] int32)`: see program.json for what comes out. What stands behind a row's length is not read.
    `decode(tokens [rows] int32, cache)` -> `logits [rows, vocabulary]`, cache; `start(rows)` is an empty cache. A decoder only.
    """

    def __init__(self, folder):
        folder = pathlib.Path(folder)
        self.about = json.loads((folder / "program.json").read_text())
        programs = {name: jax.export.deserialize(bytearray((folder / f"{name}.jax_export").read_bytes())) for name in self.about["programs"]}
        weights = {}
        for path in sorted(folder.glob("*.safetensors")):
            weights |= read_safetensors(path)
        weights = {name: jax.device_put(weights[name]) for name in self.about["weights"]}
        forward = jax.jit(programs["forward"].call)
        self.forward = lambda tokens, lengths: forward(weights, np.asarray(tokens, np.int32), np.asarray(lengths, np.int32))
        if "decode" in programs:
            decode = jax.jit(programs["decode"].call, donate_argnums=1)
            self.decode = lambda tokens, cache: decode(weights, cache, np.asarray(tokens, np.int32))

    def start(self, rows):
        """An empty cache for `rows` rows."""
        zeros = lambda kind: np.zeros([rows if n == "rows" else n for n in kind["shape"]], jax.numpy.dtype(kind["dtype"]))
        return {name: jax.device_put(zeros(kind)) for name, kind in self.about["programs"]["decode"]["cache"].items()}


def load(folder):
    """The programs in a folder that `jaxlm export` wrote."""
    return Exported(folder)


def read_safetensors(path):
    """The arrays of a file: 8 bytes that say how long the JSON header is, the header, the bytes."""
    kinds = {"F32": np.float32, "BF16": jax.numpy.bfloat16}
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    data = np.memmap(path, np.uint8, "r", 8 + size)
    return {name: data[begin:end].view(kinds[of["dtype"]]).reshape(of["shape"]) for name, of in header.items() for begin, end in [of["data_offsets"]]}


def check(folder):
    """The largest difference from what the model said when it was exported, over the largest value: of `forward`, and of `decode` fed token by token."""
    model, sample = load(folder), np.load(pathlib.Path(folder) / "sample.npz")
    tokens, lengths, want = sample["tokens"], sample["lengths"], sample["output"]
    shown = want.shape[-1]
    found = np.asarray(model.forward(tokens, lengths), np.float32)[..., :shown]
    inside = np.arange(tokens.shape[1])[None] < lengths[:, None] if want.shape[:2] == tokens.shape else np.ones(want.shape[:1], bool)
    errors = [np.abs(found - want)[inside].max() / np.abs(want[inside]).max()]
    if "decode" in model.about["programs"]:
        cache, steps = model.start(len(tokens)), []
        for i in range(lengths.min()):
            logits, cache = model.decode(tokens[:, i], cache)
            steps.append(np.asarray(logits, np.float32)[:, :shown])
        errors.append(np.abs(np.stack(steps, 1) - want[:, :lengths.min()]).max() / np.abs(want[inside]).max())
    return max(errors)


def main(folder, words):
    """Checks the folder, or continues token ids; returns the exit code."""
    if words == ["--check"]:
        error, bound = check(folder), json.loads((folder / "program.json").read_text())["tolerance"]
        print(f"largest difference {error:.3g}, allowed {bound:g}, on {jax.default_backend()}")
        return int(not error <= bound)
    model = load(folder)
    ids, cache, logits = list(map(int, words)), model.start(1), None
    for token in ids:
        logits, cache = model.decode([token], cache)
    for _ in range(16):
        ids.append(int(np.argmax(logits[0])))
        logits, cache = model.decode(ids[-1:], cache)
    print(*ids)
    return 0


if __name__ == "__main__":
    sys.exit(main(pathlib.Path(__file__).parent, sys.argv[1:]) if len(sys.argv) > 1 else print(__doc__))
