"""Several searches on one machine: a process each, and each its share of the NVIDIA GPUs."""

import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

_GPUS = pathlib.Path("/proc/driver/nvidia/gpus")  # a folder for each, whatever jax will find


def run(count: int, arguments: Sequence[str]) -> int:
    """Starts `jaxlm ARGUMENTS` so many times and waits for all; a signal to this process is one to each of them.

    Returns:
      The first exit code that is not 0, else 0.
    """
    gpus = [name.strip() for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name.strip()] if "CUDA_VISIBLE_DEVICES" in os.environ else [
        str(i) for i in range(len(list(_GPUS.iterdir())) if _GPUS.exists() else 0)]
    started = [subprocess.Popen([sys.executable, "-m", "jaxlm", *arguments], env=os.environ | share(index, count, gpus)) for index in range(count)]
    signal.signal(signal.SIGINT, lambda *_: None)  # a terminal sends Ctrl-C to all of us
    signal.signal(signal.SIGTERM, lambda number, _: [process.send_signal(number) for process in started])
    codes = [process.wait() for process in started]
    if lost := [process.pid for process, code in zip(started, codes) if code not in (0, 2, 130)]:
        print(f"process {', '.join(map(str, lost))} ended before its time; the same command goes on with its trial", flush=True)
    return next((code if code > 0 else 1 for code in codes if code), 0)


def share(index: int, count: int, gpus: Sequence[str]) -> Mapping[str, str]:
    """What process `index` of `count` has in its environment: its own GPUs, or, of fewer GPUs than processes, one with its part of the memory."""
    if not gpus:
        return {}
    if len(gpus) >= count:
        each = len(gpus) // count
        return {"CUDA_VISIBLE_DEVICES": ",".join(gpus[index * each:(index + 1) * each])}
    beside = -(-count // len(gpus))
    return {"CUDA_VISIBLE_DEVICES": gpus[index % len(gpus)], "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / beside:.2f}"}
