"""Energy meters of this machine: Intel's and AMD's RAPL, which Linux shows as files, and NVIDIA's NVML."""

import os
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

POWERCAP = pathlib.Path("/sys/class/powercap")


class Counter(NamedTuple):
    """Energy since some moment."""
    name: str
    read: Callable[[], float]  # joules; raises OSError where it no longer tells
    wraps: float = 0.0  # joules at which it begins at 0 again; 0: never


class Meter:
    """The sum of what some counters have counted since it was made. It must be read before any of them wraps twice: RAPL's do after some 260 kJ, a
    quarter of an hour of 300 W."""

    def __init__(self, counters: Sequence[Counter]):
        self._counters, self._total = counters, 0.0
        self._last = [counter.read() for counter in counters]

    def joules(self) -> float:
        """Since it was made.

        Raises:
          OSError: a counter can no longer be read.
        """
        for index, counter in enumerate(self._counters):
            now = counter.read()
            grown = now - self._last[index]
            if grown < 0:  # wrapped; one that never does was set back by its driver, and what came before that is lost
                grown = grown + counter.wraps if counter.wraps else now
            self._last[index] = now
            self._total += grown
        return self._total


def rapl() -> list[Counter]:
    """One counter for each processor package and its memory; `core` and `uncore` are parts of a package, `psys` holds all of them.

    Raises:
      OSError: one line: none is here, or none may be read.
    """
    counters = []
    for zone in sorted(POWERCAP.glob("intel-rapl:*")):
        name = (zone / "name").read_text().strip()
        if name.startswith(("package", "dram")):
            wraps = int((zone / "max_energy_range_uj").read_text()) / 1e6
            counters.append(Counter(name, lambda file=zone / "energy_uj": int(file.read_text()) / 1e6, wraps))
    if not counters:
        raise OSError(f"no RAPL under {POWERCAP}")
    for counter in counters:
        try:
            counter.read()
        except PermissionError as error:
            raise OSError(f"{error.filename} may not be read: `sudo chmod a+r` on it lets jaxlm measure") from error
        except ValueError as error:
            raise OSError(f"RAPL counter {counter.name} is not a number") from error
    return counters


def nvml(indices: Sequence[int]) -> list[Counter]:
    """One counter for each GPU of this process.

    Args:
      indices: of the GPUs among those that CUDA_VISIBLE_DEVICES shows.

    Raises:
      OSError: one line: no package, no driver, or GPUs that do not count (before Volta; parts of a GPU).
    """
    try:
        import pynvml
    except ImportError as error:
        raise OSError("GPUs are measured with NVML: pip install 'jaxlm[energy]'") from error
    try:
        pynvml.nvmlInit()
        shown = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
        shown = shown or [str(i) for i in range(pynvml.nvmlDeviceGetCount())]
        handles = [pynvml.nvmlDeviceGetHandleByIndex(int(shown[i])) if shown[i].isdigit() else pynvml.nvmlDeviceGetHandleByUUID(shown[i]) for i in indices]
        for handle in handles:
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except (pynvml.NVMLError, IndexError) as error:
        raise OSError(f"NVML: {error}") from error

    def read(handle) -> float:
        try:
            return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
        except pynvml.NVMLError as error:
            raise OSError(f"NVML: {error}") from error

    return [Counter(f"GPU {shown[i]}", lambda handle=handle: read(handle)) for i, handle in zip(indices, handles)]
