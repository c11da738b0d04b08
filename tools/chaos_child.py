"""A jaxlm command with a fault in it: python tools/chaos_child.py '{"log": FILE, "point": NAME, "hit": N, "delay": S, "do": SIGNAL}' train ...

Runs the real command line in this process after it has wrapped some of jaxlm's functions from outside: jaxlm itself carries no hooks. When the named
point is reached for the N-th time the fault happens: a signal to this very process after `delay` seconds, while the command goes on, or what else `do` says.

Besides it writes down, a JSON line each, synced, what a witness outside needs: the sum of each state that was handed over to be saved, each
acknowledgement, the sum of each state that was restored, the fault and when it came.
"""

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
        self._lock = threading.Lock()

    def write(self, **row) -> None:
        """A line for the witness, on the disk before anything else happens."""
        with self._lock:
            self._log.write(json.dumps({"time": time.time(), "pid": os.getpid(), **row}) + "\n")
            os.fsync(self._log.fileno())

    def at(self, point: str) -> bool:
        """Says that a point is reached; whether it is the one where the fault begins."""
        if point != self._point:
            return False
        self._left -= 1
        if self._left:
            return False
        if self._delay:
            threading.Thread(target=self._later, daemon=True, name="fault").start()
        else:
            self._now()
        return True

    def stall(self) -> None:
        """Holds the caller up, as a slow disk would: in short pieces, as one that waits for a queue is woken by signals."""
        end = time.monotonic() + self._stall
        while time.monotonic() < end:
            time.sleep(0.02)

    def _later(self) -> None:
        time.sleep(self._delay)
        self._now()

    def _now(self) -> None:
        self.write(event="fault", point=self._point, do=self._do)
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

    from jaxlm.data import loader, prepare
    from jaxlm.train import checkpoint, durable, evaluation, loop, report

    before(loop, "_adopt", lambda *_: fault.at("config"))
    before(prepare.run, "Work", lambda *_: fault.at("prepare"))
    before(jax.stages.Lowered, "compile", lambda *_, **__: fault.at("compile"))
    before(checkpoint, "restore", lambda *_: fault.at("restore"))
    before(evaluation, "score", lambda *_, **__: fault.at("eval"))
    before(evaluation, "sample", lambda *_, **__: fault.at("sample"))
    before(loop._Clock, "finished", lambda *_: fault.at("step"))
    before(loop, "_finish", lambda *_: fault.at("finish"))
    before(checkpoint.Checkpoints, "save", lambda self, step, state, *_: (fault.write(event="saving", step=step, sum=digest(state)), fault.at("save.before")))
    after(ocp.CheckpointManager, "save", lambda *_, **__: fault.at("save.inside"))
    before(durable, "checksum", lambda path: "checkpoints" in str(path) and threading.current_thread().name.startswith("ThreadPool") and fault.at("save.sums"))
    before(os, "replace", lambda source, target, **_: str(target).endswith(checkpoint.MANIFEST) and fault.at("save.manifest"))
    after(checkpoint, "_seal", lambda _, folder, facts: (fault.write(event="acknowledged", step=facts["step"]), fault.at("save.after")))
    before(checkpoint, "_remove", lambda *_: fault.at("save.delete"))
    after(checkpoint, "restore", lambda state, workdir, step, *_: fault.write(event="restored", step=step, sum=digest(state)))
    _wrap_metrics(report, fault)
    _wrap_batches(loader, fault)


def _wrap_metrics(report, fault: Fault) -> None:
    scalars = report.Reporter.scalars

    def torn(self, step, values):
        if fault._point == "metrics" and fault._left == 1:
            self._file.write(f'{{"step": {step}, "train/lo')
            self._file.flush()
        fault.at("metrics")
        return scalars(self, step, values)

    report.Reporter.scalars = torn


def _wrap_batches(loader, fault: Fault) -> None:
    original = loader.batches

    def slow(*args, **kwargs):
        for item in original(*args, **kwargs):
            if fault.at("data_wait"):
                fault.stall()
            yield item

    loader.batches = slow


def main() -> None:
    fault = Fault(json.loads(sys.argv[1]))
    fault.write(event="begin")
    plant(fault)
    from jaxlm import cli
    code = cli.run(sys.argv[2], sys.argv[3:])
    fault.write(event="end", code=code)
    fault.at("exit")
    sys.exit(code)


if __name__ == "__main__":
    main()
