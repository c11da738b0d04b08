"""Starts jaxlm commands with a fault in each: what tools/chaos.py drives.

A request is a JSON line on stdin. {"argv": ["train", ...], "out": FILE, "environment": {...}, "plan": {...}} forks this process, which has imported
everything and started nothing, and answers with the process id; {"poll": PID} answers with its exit code, the negative number of a signal, or null while it
runs.

The fork runs jaxlm's real command line after it has wrapped some of its functions from outside: jaxlm itself carries no hooks. When the plan's `point` is
reached for the `hit`-th time the fault happens: the signal `do`, or "raise" or "hang", after `delay` seconds in which the command goes on. Besides it
writes to `log`, a JSON line each, synced, what a witness outside needs: the sum of each state that was handed over to be saved, each acknowledgement, the
sum of each state that was restored, the first step, the fault.
"""

import ctypes
import hashlib
import json
import os
import pathlib
import signal
import sys
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

# Where a fault can be told to happen -> what is there.
POINTS = {
    "config": "the config of the run is written",
    "prepare": "text is read and cleaned",
    "compile": "the train step is compiled",
    "restore": "a checkpoint is read",
    "data_wait": "the loop waits for a batch, which a slow reader holds back",
    "step": "a step has been handed to the device",
    "metrics": "half a line of metrics.jsonl is written",
    "eval": "the validation split is evaluated",
    "sample": "a sample is generated",
    "save.before": "a save begins; nothing is copied yet",
    "save.inside": "Orbax has the arrays and writes them in the background",
    "save.sums": "the files of a checkpoint are summed and synced",
    "save.manifest": "all is synced and the manifest is about to be renamed",
    "save.after": "the checkpoint was just acknowledged",
    "save.delete": "an old checkpoint is being deleted, its manifest is gone",
    "finish": "the last step is done and saved; the test split is evaluated",
    "exit": "the command is done and the interpreter ends",
}


class Fault:
    """What is to happen, once."""

    def __init__(self, plan: dict):
        self._log = open(plan["log"], "a", buffering=1)
        self._point, self._left, self._delay, self._do = plan.get("point", ""), plan.get("hit", 1), plan.get("delay", 0.0), plan.get("do", "SIGKILL")
        self._stall = plan.get("stall", 0.0)
        self._index, self._lock, self.sealing = plan.get("index", 0), threading.RLock(), False
        self.steps, self.training = 0, False

    def write(self, **row) -> None:
        """A line for the witness, on the disk before anything else happens."""
        with self._lock:
            self._log.write(json.dumps({"time": time.time(), "process": self._index, **row}) + "\n")
            os.fsync(self._log.fileno())

    def at(self, point: str, later: bool = False) -> bool:
        """Says that a point is reached; whether it is the one where the fault begins. `later`: the caller lets it happen."""
        with self._lock:
            if point != self._point or self._left < 1:
                return False
            self._left -= 1
            if self._left:
                return False
        if later:
            return True
        if self._delay:
            threading.Thread(target=self._later, daemon=True, name="fault").start()
        else:
            self.happen()
        return True

    def stall(self) -> None:
        """Holds the caller up, as a slow disk would."""
        time.sleep(self._stall)

    def _later(self) -> None:
        time.sleep(self._delay)
        self.happen()

    def happen(self) -> None:
        """The fault itself."""
        self.write(event="fault", point=self._point, do=self._do, steps=self.steps)
        if self._do == "raise":
            raise RuntimeError("planted by tools/chaos.py")
        if self._do == "hang":
            threading.Event().wait()
        os.kill(os.getpid(), getattr(signal, self._do))


def digest(tree) -> str:
    """sha256 of this process's pieces of all arrays, in order, types included."""
    import jax
    import numpy as np
    total = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards if isinstance(leaf, jax.Array) else ():
            data = np.asarray(shard.data)
            total.update(f"{data.dtype}{data.shape}{shard.index}".encode() + data.tobytes())
    return total.hexdigest()


def before(owner, name: str, action) -> None:
    """Wraps a function: `action(arguments)` is called first."""
    original = getattr(owner, name)

    def wrapped(*args, **kwargs):
        action(*args, **kwargs)
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def after(owner, name: str, action) -> None:
    """Wraps a function: `action(result, arguments)` is called when it has returned."""
    original = getattr(owner, name)

    def wrapped(*args, **kwargs):
        result = original(*args, **kwargs)
        action(result, *args, **kwargs)
        return result

    setattr(owner, name, wrapped)


def plant(fault: Fault) -> None:
    """Wraps what a run calls."""
    import jax
    import orbax.checkpoint as ocp

    from jaxlm.data import prepare
    from jaxlm.train import checkpoint, durable, evaluation, loop

    before(loop, "_adopt", lambda *_: fault.at("config"))
    before(prepare.run, "Work", lambda *_: fault.at("prepare"))
    before(jax.stages.Lowered, "compile", lambda *_, **__: fault.at("compile"))
    before(checkpoint, "restore", lambda *_: fault.at("restore"))
    after(checkpoint, "restore", lambda state, workdir, step, *_: fault.write(event="restored", step=step, sum=digest(state)))
    before(evaluation, "score", lambda *_, **__: fault.at("eval"))
    before(evaluation, "sample", lambda *_, **__: fault.at("sample"))
    before(loop, "_finish", lambda *_: fault.at("finish"))
    before(checkpoint.Checkpoints, "save", lambda self, step, state, *_: (fault.write(event="saving", step=step, sum=digest(state)), fault.at("save.before")))
    after(ocp.CheckpointManager, "save", lambda *_, **__: fault.at("save.inside"))
    before(durable, "checksum", lambda *_: fault.sealing and fault.at("save.sums"))
    before(os, "replace", lambda source, target, **_: str(target).endswith(checkpoint.MANIFEST) and fault.at("save.manifest"))
    before(checkpoint, "_seal", lambda *_: setattr(fault, "sealing", True))
    after(checkpoint, "_seal", lambda _, folder, facts: (fault.write(event="acknowledged", step=facts["step"]), fault.at("save.after"),
                                                         setattr(fault, "sealing", False)))
    before(checkpoint, "_remove", lambda *_: fault.at("save.delete"))
    _wrap_steps(loop, fault)
    _wrap_metrics(fault)
    _wrap_batches(fault)


def _wrap_steps(loop, fault: Fault) -> None:
    def logged(self, step, metrics) -> None:
        if not fault.steps:
            fault.write(event="stepped")
        fault.steps = step
        fault.at("step")

    after(loop._Log, "__call__", lambda _, *args: logged(*args))


def _wrap_metrics(fault: Fault) -> None:
    from jaxlm.train import report

    def torn(self, step, values) -> None:
        if fault.at("metrics", later=True):
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(f'{{"step": {step}, "train/lo')
            fault.happen()

    before(report.Reporter, "scalars", torn)


def _wrap_batches(fault: Fault) -> None:
    """The fault comes while the reader's thread holds a batch back, so that the loop waits for it."""
    from jaxlm.data import loader
    original = loader._read_ahead

    def slow(element, *rest):
        def held(number):
            if fault.at("data_wait"):
                fault.stall()
            return element(number)

        return original(held if fault.training else element, *rest)

    before(loader, "batches", lambda *_, **__: setattr(fault, "training", True))
    after(loader, "batches", lambda *_, **__: setattr(fault, "training", False))
    loader._read_ahead = slow


def start(request: dict) -> int:
    """Forks; the child comes back with 0 and with its output in a file of its own. It dies with this process."""
    pid = os.fork()
    if not pid:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        os.close(0)
        descriptor = os.open(request["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
    return pid


def main() -> None:
    import jaxlm.bin.train  # noqa: F401
    import jaxlm.train.loop  # noqa: F401
    from jaxlm import cli

    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
        elif pid := start(request):
            print(pid, flush=True)
        else:
            os.environ |= request["environment"]
            fault = Fault(request["plan"])
            fault.write(event="begin")
            plant(fault)
            code = cli.run(request["argv"][0], request["argv"][1:])
            fault.write(event="end", code=code)
            fault.at("exit")
            sys.exit(code)


if __name__ == "__main__":
    main()
