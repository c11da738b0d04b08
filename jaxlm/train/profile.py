"""A trace of a few steps for XProf and TensorBoard's profile plugin, and what lies in the devices' memory then."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax

_STEPS = 5
MEMORY = "memory.prof"


class Trace:
    """Traces five steps from `first` on into WORKDIR/plugins/profile, and writes WORKDIR/memory.prof after them. Each process traces its own devices.

    Args:
      first: the step; 0: none.
      note: shows a line.
    """

    def __init__(self, workdir: pathlib.Path, first: int, note: Callable[[str], None]):
        self._workdir, self._first, self._note, self._runs = workdir, first, note, False

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *_) -> None:
        self._stop()

    def before(self, step: int, state: Any) -> None:
        """To be called before each step, with the state that it begins from."""
        if step == self._first:
            jax.block_until_ready(state)
            try:
                jax.profiler.start_trace(str(self._workdir))
                self._runs = True
            except RuntimeError as error:  # another one runs in this process
                self._note(f"step {step}: no trace: {str(error).splitlines()[0]}")
        elif self._runs and step >= self._first + _STEPS:
            jax.block_until_ready(state)
            self._stop()

    def _stop(self) -> None:
        if not self._runs:
            return
        self._runs = False
        try:
            jax.profiler.stop_trace()
            if jax.process_index() == 0:
                (self._workdir / MEMORY).write_bytes(jax.profiler.device_memory_profile())
            self._note(f"steps {self._first} to {self._first + _STEPS - 1} were traced: tensorboard --logdir={self._workdir} or xprof --logdir={self._workdir} "
                       f"(pip install xprof); memory: pprof -top {self._workdir / MEMORY}")
        except (RuntimeError, OSError) as error:
            self._note(f"the trace could not be written: {str(error).splitlines()[0]}")
