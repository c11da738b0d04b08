"""What one chip can do, needs and costs, and the topologies that can be asked for. A user replaces any figure with `--prices=FILE`.

Where a figure stands; looked up on 2026-11-22 in stored copies of the pages, some of them months old:
* TPU `flops`, `hbm`, `hbm_bandwidth`: docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e ("Peak compute per chip (bf16)", "HBM capacity", "HBM bandwidth
  per chip"; v5p says 95 GB). `usable`: what XLA says a program may take, from its own out-of-memory messages on v5e, v5p and v6e (15.75G, 95.74G, 31.25G);
  that of v4 is an **estimate**, as v6e's.
* `link`, `wraps`: Austin et al. 2025, "How to Scale Your Model", jax-ml.github.io/scaling-book/tpus, "ICI BW/link (one-way)". Google's pages give for all
  links of a chip, both directions, 400 GB/s (v5e), 1200 (v5p) and 800 (v6e): 50, 100 and 100 of a link one way, a tenth more than the book's.
* TPU `dcn`: the same book (6.25e9 bytes/s a chip, v6e 12.5e9, v5e 3.125e9); so does docs.cloud.google.com/tpu/docs/v5p (50 Gbit/s a chip).
* GPU `flops`, `hbm`, `hbm_bandwidth`, `link` (half of NVLink's 600 and 900 GB/s, which count both directions), `watts` (the most they draw): NVIDIA's data
  sheets of A100 80GB SXM, H100 SXM and H200 SXM as repeated by mercatus-ai.com/blog/a100-vs-h100-vs-h200 (operations) and
  acecloud.ai/blog/nvidia-b200-vs-h200-h100-a100 (the rest); the H200's links and watts also by
  github.com/mlcommons/inference_results_v4.1. `usable`: **estimate**, with XLA_PYTHON_CLIENT_MEM_FRACTION=0.93 (jax's own default is 0.75). `dcn`:
  **estimate**, an adapter of 400 Gbit/s (A100: 200) for each GPU as in NVIDIA's own servers.
* `dollars_per_hour`: Google Cloud on demand in us regions. Google's own page was not to be had; these are as several public repositories of 2025 and 2026
  list them: TPUs a chip 3.22 (v4), 1.20 (v5e), 4.20 (v5p), 2.70 (v6e; others say 2.40 to 2.70); GPUs an eighth of a2-ultragpu-8g at 40.55, a3-highgpu-8g
  at 88.49 and a3-ultragpu-8g at 84.81. They change, and nobody pays list prices for long: give your own.
* `clock`: from `flops` and the multiply-adds of a cycle (Austin et al. 2025: matrix units of 128 x 128, four a core, in v4, v5e and v5p; v6e's 256 x 256).
* `watts` of v4: 170, the measured mean, docs.cloud.google.com/tpu/docs/v4 (90 least, 192 most). Of v5e, v5p and v6e none is published: **estimate**.
"""

import dataclasses
import json
import math
import pathlib
import re

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of accelerator, by its data sheet."""
    name: str
    platform: str  # "tpu", which libtpu compiles for, or "gpu", by formula only
    flops: float  # dense bfloat16 peak, FLOP/s
    hbm: float  # memory, bytes
    usable: float  # of it a program may take, bytes
    hbm_bandwidth: float  # bytes/s
    link: float  # bytes/s of one link in one direction (TPU: to one neighbour; GPU: NVLink to the switch)
    wraps: int  # a torus dimension of a multiple of this size is a ring, a smaller one a line; 0: a switch joins all chips of a node
    node: int  # chips joined by `link`: 0 for a TPU slice of any size
    dcn: float  # bytes/s of one chip into the network between slices or nodes
    watts: float
    dollars_per_hour: float
    clock: float = 0.0  # cycles/s of a TPU's core, in which its compiler reckons
    assumed: tuple[str, ...] = ()  # figures that are estimates


CHIPS = {chip.name: chip for chip in (
    Chip("v4", "tpu", 275e12, 32 * _GIB, 31.25 * _GIB, 1.2e12, 45e9, 4, 0, 6.25e9, 170, 3.22, 1.05e9, ("usable",)),
    Chip("v5e", "tpu", 197e12, 16 * _GIB, 15.75 * _GIB, 8.19e11, 45e9, 16, 0, 3.125e9, 200, 1.20, 1.5e9, ("watts",)),
    Chip("v5p", "tpu", 459e12, 96 * _GIB, 95.74 * _GIB, 2.765e12, 90e9, 4, 0, 6.25e9, 450, 4.20, 1.75e9, ("watts",)),
    Chip("v6e", "tpu", 918e12, 32 * _GIB, 31.25 * _GIB, 1.638e12, 90e9, 16, 0, 12.5e9, 300, 2.70, 1.75e9, ("watts",)),
    Chip("a100", "gpu", 312e12, 80e9, 74e9, 2.039e12, 300e9, 0, 8, 25e9, 400, 5.07, 0.0, ("usable", "dcn")),
    Chip("h100", "gpu", 989e12, 80e9, 74e9, 3.35e12, 450e9, 0, 8, 50e9, 700, 11.06, 0.0, ("usable", "dcn")),
    Chip("h200", "gpu", 989e12, 141e9, 132e9, 4.8e12, 450e9, 0, 8, 50e9, 700, 10.60, 0.0, ("usable", "dcn")),
)}

_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SOLID = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
SHAPES = {"v5e": _FLAT, "v6e": _FLAT, "v4": _SOLID, "v5p": _SOLID}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips that one program runs on."""
    chip: Chip
    shape: tuple[int, ...]  # chips along each dimension of one slice; of GPUs their number
    slices: int = 1

    @property
    def chips(self) -> int:
        """How many there are in all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def name(self) -> str:
        """As libtpu takes it, without the number of slices."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}" if self.chip.platform == "tpu" else f"gpu:{self.chip.name}x{self.shape[0]}"

    def __str__(self) -> str:
        return self.name if self.slices == 1 else f"{self.slices} x {self.name}"


def topology(text: str, slices: int = 1, chips: dict[str, Chip] = CHIPS) -> Topology:
    """Reads "v5e:4x4", "v5p:2x2x2" or "gpu:h100x8".

    Raises:
      ValueError: unknown, with the list of what is known.
    """
    tpu, gpu = re.fullmatch(r"(\w+):(\d+(?:x\d+)+)", text.strip()), re.fullmatch(r"gpu:(\w+?)x(\d+)", text.strip())
    if slices < 1:
        raise ValueError(f"--num_slices={slices} must be at least 1")
    if gpu and gpu[1] in chips and chips[gpu[1]].platform == "gpu" and int(gpu[2]) > 0:
        if slices > 1:
            raise ValueError(f"--num_slices={slices} is of TPUs; of GPUs give the number in all, such as gpu:{gpu[1]}x{int(gpu[2]) * slices}")
        return Topology(chips[gpu[1]], (int(gpu[2]),))
    if tpu and tpu[2] in SHAPES.get(tpu[1], ()) and tpu[1] in chips:
        return Topology(chips[tpu[1]], tuple(int(n) for n in tpu[2].split("x")), slices)
    raise ValueError(f"--topology={text} is not known; {known()}")


def known() -> str:
    """All topologies in one line."""
    shapes = {}
    for chip, names in SHAPES.items():
        shapes.setdefault(names, []).append(chip)
    tpus = "; ".join(f"{', '.join(sorted(chip))} as {', '.join(names)}" for names, chip in shapes.items())
    return f"known: {tpus} (v5e:4x4); {', '.join(f'gpu:{c.name}xN' for c in CHIPS.values() if c.platform == 'gpu')}"


def of_kind(device_kind: str) -> Chip | None:
    """The chip that `jax.Device.device_kind` names; None where it is not in the table."""
    kind = device_kind.lower()
    marks = (("h200", "h200"), ("h100", "h100"), ("a100", "a100"))
    if "tpu" in kind:
        marks = (("v6", "v6e"), ("v5 lite", "v5e"), ("v5e", "v5e"), ("v5", "v5p"), ("v4", "v4"))
    return next((CHIPS[name] for mark, name in marks if mark in kind), None)


# Dense peak in FLOP/s (bfloat16, of the T4 float16) of chips that have no row above because nothing here plans for them; from the vendors' data sheets.
_OLDER = {"tpu v3": 123e12, "tpu v2": 45e12, "nvidia l4": 121e12, "tesla t4": 65e12}


def peak_flops(device_kind: str) -> float | None:
    """FLOP/s that one chip could do at best, by its data sheet; None where it is not known."""
    chip = of_kind(device_kind)
    return chip.flops if chip else next((peak for name, peak in _OLDER.items() if name == device_kind.lower()), None)


def like(device_kind: str, devices: int) -> str:
    """The known topology nearest to `devices` devices of that kind, as `jax.Device` names it; v5e where the kind is not known."""
    chip = of_kind(device_kind) or CHIPS["h100" if "nvidia" in device_kind.lower() else "v5e"]
    if chip.platform == "gpu":
        return f"gpu:{chip.name}x{devices}"
    name = chip.name
    count = lambda shape: math.prod(int(n) for n in shape.split("x"))
    return f"{name}:{min(SHAPES[name], key=lambda shape: (abs(count(shape) - devices), -count(shape)))}"


def read_prices(path: str | pathlib.Path) -> dict[str, Chip]:
    """The table with the figures of a JSON file `{"v5e": {"dollars_per_hour": 0.7, "watts": 180}}` put in.

    Raises:
      ValueError: a chip or figure that does not exist, or a value that is no positive number.
      OSError: no such file.
    """
    try:
        given = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"--prices={path} is not JSON: {error}") from error
    figures = [f.name for f in dataclasses.fields(Chip) if f.type in (float, int)]
    table = dict(CHIPS)
    if not isinstance(given, dict):
        raise ValueError(f'--prices={path} must be of the form {{"v5e": {{"dollars_per_hour": 0.7}}}}')
    for name, values in given.items():
        if name not in table or not isinstance(values, dict):
            raise ValueError(f"--prices={path}: unknown chip {name!r}; known: {', '.join(table)}")
        for key, value in values.items():
            if key not in figures:
                raise ValueError(f"--prices={path}: {name}.{key} is no figure of a chip; known: {', '.join(figures)}")
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not (value > 0 or (key in ("wraps", "node", "dollars_per_hour", "clock") and value == 0)):
                raise ValueError(f"--prices={path}: {name}.{key}={value!r} must be a positive number")
        assumed = tuple(key for key in table[name].assumed if key not in values)
        table[name] = dataclasses.replace(table[name], **values, assumed=assumed)
    return table
