"""What one chip can do, needs and costs, and the topologies that can be asked for. A user replaces any figure with `--prices=FILE`.

Where a figure stands, written down from memory in November 2026 and not looked up again but for `usable`:
* TPU peak, memory and its bandwidth: cloud.google.com/tpu/docs (v4, v5e, v5p, v6e). `usable` is what XLA says a program may take: the compiler's own
  out-of-memory messages (15.75G on v5e, 95.74G on v5p, 31.25G on v6e).
* ICI per link and direction, DCN per chip: Austin et al. 2025, "How to Scale Your Model", jax-ml.github.io/scaling-book/tpus.
* GPUs: NVIDIA's data sheets of A100, H100 SXM and H200 SXM; `link` is NVLink in one direction, `dcn` a 400 Gbit/s (A100: 200) adapter for each GPU.
* Dollars: Google Cloud's on-demand list prices in us regions, a chip and hour; GPUs a share of a3-highgpu-8g, a3-ultragpu-8g and a2-ultragpu-8g. They change.
* Watts: of v4 the mean of Jouppi et al. 2023; of GPUs the thermal design power; of v5e, v5p and v6e Google has published none: **assumed**.
"""

import dataclasses
import json
import math
import pathlib
import re

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
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
    assumed: tuple[str, ...] = ()  # figures that nobody published


CHIPS = {chip.name: chip for chip in (
    Chip("v4", "tpu", 275e12, 32 * _GIB, 31.25 * _GIB, 1.23e12, 45e9, 4, 0, 6.25e9, 170, 3.22),
    Chip("v5e", "tpu", 197e12, 16 * _GIB, 15.75 * _GIB, 8.1e11, 45e9, 16, 0, 3.125e9, 200, 1.20, ("watts",)),
    Chip("v5p", "tpu", 459e12, 96 * _GIB, 95.74 * _GIB, 2.77e12, 90e9, 4, 0, 6.25e9, 450, 4.20, ("watts",)),
    Chip("v6e", "tpu", 918e12, 32 * _GIB, 31.25 * _GIB, 1.64e12, 90e9, 16, 0, 12.5e9, 300, 2.70, ("watts",)),
    Chip("a100", "gpu", 312e12, 80e9, 74e9, 2.04e12, 300e9, 0, 8, 25e9, 400, 5.07),
    Chip("h100", "gpu", 989e12, 80e9, 74e9, 3.35e12, 450e9, 0, 8, 50e9, 700, 11.06),
    Chip("h200", "gpu", 989e12, 141e9, 132e9, 4.8e12, 450e9, 0, 8, 50e9, 700, 10.60),
)}

_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SOLID = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
SHAPES = {"v5e": _FLAT, "v6e": _FLAT, "v4": _SOLID, "v5p": _SOLID}


@dataclasses.dataclass(frozen=True)
class Topology:
    chip: Chip
    shape: tuple[int, ...]  # chips along each dimension of one slice; of GPUs their number
    slices: int = 1

    @property
    def chips(self) -> int:
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


def like(device_kind: str, devices: int) -> str:
    """The known topology nearest to `devices` devices of that kind, as `jax.Device` names it; v5e where the kind is not known."""
    kind = device_kind.lower()
    gpu = next((name for name in ("h200", "h100", "a100") if name in kind), None)
    if gpu or "nvidia" in kind:
        return f"gpu:{gpu or 'h100'}x{devices}"
    name = next((name for mark, name in (("v6", "v6e"), ("v5 lite", "v5e"), ("v5e", "v5e"), ("v5", "v5p"), ("v4", "v4")) if mark in kind), "v5e")
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
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not (value > 0 or (key in ("wraps", "node", "dollars_per_hour") and value == 0)):
                raise ValueError(f"--prices={path}: {name}.{key}={value!r} must be a positive number")
        assumed = tuple(key for key in table[name].assumed if key not in values)
        table[name] = dataclasses.replace(table[name], **values, assumed=assumed)
    return table
