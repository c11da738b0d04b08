"""Durable checkpoints: Orbax writes the arrays, this module makes an acknowledgement mean something.

Orbax alone sums nothing, syncs none of the metadata and locks nothing. Here a step counts as saved only when Orbax has written it, every
file is summed with sha256, every file and folder is fsynced up to the workdir, and `MANIFEST.json`, written last, names it all. So a
process may be killed, or the power fail, at any point: a step without a manifest was never saved, and a damaged one is found and named.

    <workdir>/LOCK                           who writes here: host, process id, since when
    <workdir>/checkpoints/<step>/params/     Orbax: the parameters, a nested dict
                                 ema/        Orbax: their moving average, when there is one
                                 rest/       Orbax: step, optimiser state, random key
                                 files/      plain files: config.json, tokenizer, position in the data
                                 MANIFEST.json

Parameters lie apart so that evaluation reads and verifies only them: a third of the bytes under Adam. In several processes (which share
the file system) the functions named "together" are called by every process; process 0 alone locks, sums, writes manifests and deletes.
"""

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from jaxlm import __version__, trees
from jaxlm.evaluate import verdict
from jaxlm.sharding import first, together
from jaxlm.train import durable
from jaxlm.train.lock import Lock
from jaxlm.train.state import State

MANIFEST = "MANIFEST.json"
_NEVER = 2 * 10**9  # seconds

# Orbax reports its own progress and each error it also raises; the user gets our one line instead.
logging.getLogger("absl").addFilter(lambda record: f"{os.sep}orbax{os.sep}" not in record.pathname)
# On a full disk its other writers' errors, which nobody awaits any more, end there.
logging.getLogger("asyncio").addFilter(lambda record: "exception was never retrieved" not in record.getMessage())


def _show_unraisable(unraisable: Any, show: Callable[[Any], None] = sys.unraisablehook) -> None:
    """After a failed save TensorStore's other writers report to an event loop that Orbax has closed: a traceback each, about nothing."""
    if str(unraisable.exc_value) != "Event loop is closed":
        show(unraisable)


sys.unraisablehook = _show_unraisable


class Checkpoints:
    """The one writer of a workdir: `with Checkpoints(lock, ...) as checkpoints`. Its methods are called together.

    On entry it removes what killed saves left behind. Leaving the `with` block waits for the save in flight.

    Args:
      lock: the held lock of the workdir.
      keep_last, keep_best, keep_every: see `kept`.
      log: receives one line for each damaged checkpoint that is deleted and each old one that cannot be.
    """

    def __init__(self, lock: Lock, *, keep_last: int, keep_best: int, keep_every: int, log: Callable[[str], None] = print):
        assert lock.held or jax.process_index() > 0 or durable.remote(lock.workdir)
        self.workdir = lock.workdir
        self._keep = {"keep_last": keep_last, "keep_best": keep_best, "keep_every": keep_every}
        self._log = log
        self._newest = first(self._prepare)
        self._pending: Future | None = None
        self._worker = ThreadPoolExecutor(1, "checkpoint")
        self._manager = ocp.CheckpointManager(self.workdir / "checkpoints", options=ocp.CheckpointManagerOptions(
            max_to_keep=None, enable_async_checkpointing=True, create=True, cleanup_tmp_directories=True,
            # Else a folder that cannot be made leaves threads waiting for it, and the process with them, for ten minutes.
            # Its timeouts look at the clock on the wall, which may jump: ours is the watchdog.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False, timeout_secs=_NEVER)))

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            return self.close()
        with contextlib.suppress(Exception):  # the error that ends the block is the one to show; and nobody may be left to call together
            self._collect()
        self._worker.shutdown()
        with contextlib.suppress(Exception):
            self._manager.close()

    def save(self, step: int, state: State, files: Mapping[str, bytes], loss: float | None = None) -> None:
        """Starts to save; returns when the arrays are copied from the devices. Waits for the save before.

        Args:
          step: the name of the checkpoint. One that is saved and whole is left as it is; a damaged one is replaced.
          state: every leaf a `jax.Array` (global in several processes), at least one element each.
          files: content by plain file name.
          loss: validation loss, for `keep_best`.

        Raises:
          OSError: one line, for this save or the one before.
        """
        parts = _parts(state)
        for part, leaves in parts.items():
            for name, leaf in leaves.items():
                assert isinstance(leaf, jax.Array) and not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key), f"{part}/{name}: {leaf}"
        self.wait()
        arrays = {f"{part}/{name}": _spec(leaf) for part, leaves in parts.items() for name, leaf in leaves.items()}
        try:
            if first(lambda: self._clear(step)):
                return
            self._manager.reload()  # it remembers steps that were deleted behind its back
            self._manager.save(step, force=True, args=ocp.args.Composite(
                **{part: ocp.args.StandardSave(trees.unflatten(leaves)) for part, leaves in parts.items()}))
        except Exception as error:
            raise self._failure(step, error) from error
        self._pending = self._worker.submit(self._acknowledge, step, arrays, dict(files), loss)

    def wait(self) -> int | None:
        """Waits for the save in flight. Returns the newest step that is safe on disk, None before the first.

        Raises:
          OSError: one line, when the save failed. Earlier checkpoints are intact; `save` may be tried again.
        """
        self._newest = together(self._collect)
        return self._newest

    def close(self) -> None:
        """Waits for the save in flight, as `wait` does, and lets go of Orbax."""
        try:
            self.wait()
        finally:
            self._worker.shutdown()
            self._manager.close()

    def _prepare(self) -> int | None:
        durable.make(self.workdir / "checkpoints")
        _sweep(self.workdir)
        return max(steps(self.workdir), default=None)

    def _clear(self, step: int) -> bool:
        """Whether `step` is there already, whole; else makes room for it."""
        if step in steps(self.workdir):
            try:
                verify(self.workdir, step)
                return True
            except ValueError:
                _discard(_step(self.workdir, step))
        _sweep(self.workdir)
        return False

    def _collect(self) -> int | None:
        pending, self._pending = self._pending, None
        try:
            if pending is not None:
                pending.result()
        except Exception:
            with contextlib.suppress(Exception):  # Orbax raises the same error once more in each thread that asks
                self._manager.wait_until_finished()
            raise
        return self._newest

    def _acknowledge(self, step: int, arrays: dict[str, str], files: dict[str, bytes], loss: float | None) -> None:
        """Runs in the background thread."""
        folder = _step(self.workdir, step)
        try:
            self._manager.wait_until_finished()
            if jax.process_index() > 0:
                return
            (folder / "files").mkdir(exist_ok=True)
            for name, content in files.items():
                (folder / "files" / name).write_bytes(content)
            loss = float(loss) if loss is not None and math.isfinite(loss) else None
            _seal(folder, {"jaxlm": __version__, "step": step, "loss": loss, "arrays": arrays})
        except Exception as error:
            with contextlib.suppress(OSError):
                (folder / MANIFEST).unlink()  # its own sync may be what failed
            raise self._failure(step, error) from error
        self._newest = step
        try:
            self._retain(step)
        except OSError as error:
            self._log(f"an old checkpoint could not be deleted: {error}")

    def _retain(self, step: int) -> None:
        saved = {s: loss(self.workdir, s) for s in steps(self.workdir)}
        for later in sorted(s for s in saved if s > step):  # the run came back to before these: normally because they are damaged
            try:
                verify(self.workdir, later)
            except ValueError as error:
                self._log(f"deleted: {error}")
                _discard(_step(self.workdir, later))
                del saved[later]
        judged = verdict.read(self.workdir)  # by a watcher beside the run
        for old in sorted(saved.keys() - kept(saved, **self._keep) - {step, *(judged.keep if judged else ())}):
            _discard(_step(self.workdir, old))

    def _failure(self, step: int, error: Exception) -> OSError:
        if jax.process_index() == 0:
            with contextlib.suppress(OSError):
                _sweep(self.workdir)  # the half of a checkpoint is what fills a full disk
        other = "no earlier one exists" if self._newest is None else f"the newest whole one is step {self._newest}"
        return OSError(f"checkpoint of step {step} could not be written to {self.workdir}: {durable.reason(error)}; {other}")


def kept(losses: Mapping[int, float | None], *, keep_last: int, keep_best: int, keep_every: int) -> set[int]:
    """The steps that stay: the newest `keep_last`, the `keep_best` of lowest loss (of equals the newer; None and NaN are no loss), and
    each that `keep_every` divides (0: none)."""
    ranked = sorted((loss, -step) for step, loss in losses.items() if loss is not None and not math.isnan(loss))
    newest = sorted(losses)[-keep_last:] if keep_last else []
    return {*newest, *(-step for _, step in ranked[:keep_best]), *(s for s in losses if keep_every and s % keep_every == 0)}


def steps(workdir: os.PathLike | str) -> list[int]:
    """The saved steps, oldest first, unverified. Safe beside a writer: a step appears when it is whole and goes before its files do."""
    folder = durable.path_of(workdir) / "checkpoints"
    names = [p.name for p in folder.iterdir()] if folder.exists() else []
    return sorted(int(name) for name in names if name.isdigit() and (folder / name / MANIFEST).exists())


def fingerprint(workdir: os.PathLike | str, step: int) -> str:
    """sha256 of a checkpoint's manifest, which holds the sums of all its files.

    Raises:
      ValueError: one line; there is no such checkpoint, or its manifest is damaged.
    """
    return _manifest(workdir, step)["sha256"]


def mark(workdir: os.PathLike | str, step: int) -> str | None:
    """What tells a saved step from another one that was saved under the same number, damaged or not; None: there is none."""
    try:
        return hashlib.sha256((_step(workdir, step) / MANIFEST).read_bytes()).hexdigest()
    except OSError:
        return None


def verify(workdir: os.PathLike | str, step: int) -> None:
    """Reads every file of a checkpoint and compares its size and sha256 sum with the manifest.

    Raises:
      ValueError: one line that names the damaged or missing file.
    """
    _check(workdir, step, _manifest(workdir, step)["files"])


def newest(workdir: os.PathLike | str, *, before: int | None = None, log: Callable[[str], None] = print) -> int | None:
    """The newest step that verifies; None where nothing was ever saved. Called together.

    Args:
      before: look at earlier steps than this only.
      log: receives one line for each newer checkpoint that is damaged.

    Raises:
      ValueError: one line, when there are checkpoints and none is whole: training from scratch must not happen by accident.
    """
    def find() -> int | None:
        found = [step for step in steps(workdir) if before is None or step < before]
        for step in reversed(found):
            try:
                verify(workdir, step)
                return step
            except ValueError as error:
                if step not in steps(workdir):  # a writer has deleted it meanwhile, so it has newer ones
                    return find()
                log(f"passed over: {error}")
                last = error
        if found:
            raise ValueError(f"{len(found)} checkpoints in {workdir} and none is whole ({last}); "
                             f"restore them from a copy, or remove {durable.path_of(workdir) / 'checkpoints'} to begin anew")
        return None

    return first(find)


def read_file(workdir: os.PathLike | str, step: int, name: str) -> bytes:
    """One of the plain files saved beside the state, verified.

    Raises:
      ValueError: one line, when there is no such checkpoint or file, or it is damaged.
    """
    files, key = _manifest(workdir, step)["files"], f"files/{name}"
    if key not in files:
        there = ", ".join(sorted(k.partition("/")[2] for k in files if k.startswith("files/")))
        raise ValueError(f"checkpoint of step {step} in {workdir} holds no {name}; it holds {there or 'no files'}")
    _check(workdir, step, {key: files[key]})
    return (_step(workdir, step) / key).read_bytes()


def find_file(workdir: os.PathLike | str, step: int, name: str) -> bytes | None:
    """The same; None where the checkpoint holds no such file."""
    return read_file(workdir, step, name) if f"files/{name}" in _manifest(workdir, step)["files"] else None


def restore(workdir: os.PathLike | str, step: int, target: State) -> State:
    """Reads a whole State, verified, onto any devices. Called together.

    Args:
      target: the State wanted, of `jax.ShapeDtypeStruct` with shardings (or arrays): each leaf arrives as it says, bit by bit as saved.

    Raises:
      ValueError: one line; the checkpoint is missing or damaged, or a leaf has another shape or type (never cast) or is on one side only.
    """
    # One tree per part, so that a part wanted but not saved, or saved but not wanted, is seen as well.
    found = _read(workdir, step, {"params": {}, "ema": {}, **_parts(target)})
    leaves = [found[part][name] for part, name in _places(target)]
    return jax.tree.unflatten(jax.tree.structure(target), leaves)


def restore_params(workdir: os.PathLike | str, step: int, target: Any, *, ema: bool = False) -> Any:
    """The parameters alone, or their moving average: neither reads nor verifies the optimiser state. Otherwise as `restore`."""
    part = "ema" if ema else "params"
    if ema and not any(name.startswith("ema/") for name in _manifest(workdir, step)["arrays"]):
        raise ValueError(f"checkpoint of step {step} in {workdir} holds no moving average: it was trained with optim.ema=0")
    found = _read(workdir, step, {part: _flat(target)})[part]
    return jax.tree.unflatten(jax.tree.structure(target), [found[name] for name in _flat(target)])


def _read(workdir, step: int, wanted: dict[str, dict[str, Any]]) -> dict[str, dict[str, jax.Array]]:
    """Arrays by part and name. `wanted` says for each part all the leaves it must have."""
    def check() -> None:
        manifest = _manifest(workdir, step)
        _fit(workdir, step, manifest["arrays"], wanted)
        if jax.process_index() == 0:
            _check(workdir, step, {k: v for k, v in manifest["files"].items() if k.partition("/")[0] in wanted})

    together(check)
    found = {}
    for part, leaves in wanted.items():
        if leaves:
            structs = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in leaves.items()}
            assert all(x.sharding is not None for x in structs.values())
            with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
                tree = reader.restore(_step(workdir, step) / part, args=ocp.args.StandardRestore(trees.unflatten(structs)))
            found[part] = _flat(tree)
    return found


def _fit(workdir, step: int, arrays: Mapping[str, str], wanted: dict[str, dict[str, Any]]) -> None:
    saved = {name: spec for name, spec in arrays.items() if name.partition("/")[0] in wanted}
    here = {f"{part}/{name}": _spec(leaf) for part, leaves in wanted.items() for name, leaf in leaves.items()}
    wrong = [name for name in sorted(saved.keys() | here.keys()) if saved.get(name) != here.get(name)]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ValueError(f"checkpoint of step {step} in {workdir} does not fit: {wrong[0]} is {saved.get(wrong[0], 'missing')} in it and "
                         f"{here.get(wrong[0], 'missing')} here{more}; use the config it was trained with")


# --- trees: Orbax sees nested dicts of arrays only, so that no version's idea of tuples, None or empty nodes matters ---


def _parts(state: State) -> dict[str, dict[str, Any]]:
    """Leaves by part and path; a part without leaves is left out."""
    parts = {"params": _flat(state.params), "ema": _flat(state.ema),
             "rest": _flat({k: v for k, v in state._asdict().items() if k not in ("params", "ema")})}
    return {part: leaves for part, leaves in parts.items() if leaves}


def _places(state: State) -> list[tuple[str, str]]:
    """Part and path of each leaf, in the order of the tree."""
    split = [name.partition("/") for name in _flat(state)]
    return [(field, path) if field in ("params", "ema") else ("rest", f"{field}/{path}".rstrip("/")) for field, _, path in split]


def _flat(tree: Any) -> dict[str, Any]:
    """Leaves by their whole path: unlike `trees.flatten`, positions in tuples count, so that an optimiser's moments stay apart."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _spec(leaf: Any) -> str:
    return f"{np.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"


# --- the manifest ---


def _seal(folder: epath.Path, facts: dict) -> None:
    """Sums and syncs all that lies in a step's folder, then, last, writes the manifest: from then on the step counts."""
    files, folders = durable.walk(folder)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        sums = dict(zip((str(f.relative_to(folder)) for f in files), pool.map(durable.checksum, files)))
        list(pool.map(durable.sync, files))
    for path in (*folders, folder.parent, folder.parent.parent):
        durable.sync(path)
    text = _manifest_text({**facts, "files": sums})
    if durable.remote(folder):
        return (folder / MANIFEST).write_text(text)  # an object appears whole or not at all
    temporary = folder / f"{MANIFEST}.tmp"
    temporary.write_text(text)
    durable.sync(temporary)
    os.replace(temporary, folder / MANIFEST)
    durable.sync(folder)


def _manifest_text(content: dict) -> str:
    """JSON that carries the sum of itself: a flipped bit in the manifest is found like one in the data."""
    render = lambda value: json.dumps(value, indent=1, sort_keys=True) + "\n"
    return render({**content, "sha256": hashlib.sha256(render(content).encode()).hexdigest()})


def _manifest(workdir, step: int) -> dict:
    path = _step(workdir, step) / MANIFEST
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        there = ", ".join(map(str, steps(workdir))) or "none"
        raise ValueError(f"no checkpoint of step {step} in {workdir}; saved steps: {there}") from None
    except OSError as error:
        raise ValueError(f"checkpoint of step {step} in {workdir} is damaged: {MANIFEST}: {durable.reason(error)}") from error
    try:
        content = json.loads(text)
        whole = _manifest_text({k: v for k, v in content.items() if k != "sha256"}).encode() == text
    except (ValueError, AttributeError):
        whole = False
    if not whole:
        raise ValueError(f"checkpoint of step {step} in {workdir} is damaged: {MANIFEST} does not match its own sum")
    return content


def loss(workdir: os.PathLike | str, step: int) -> float | None:
    """What a checkpoint was saved with as its `loss`; None for none, or a damaged manifest."""
    try:
        return _manifest(workdir, step)["loss"]
    except ValueError:
        return None


def _check(workdir, step: int, files: Mapping[str, dict]) -> None:
    folder = _step(workdir, step)

    def fault(name: str) -> str | None:
        try:
            found = durable.checksum(folder / name)
        except FileNotFoundError:
            return "is missing"
        except OSError as error:
            return f"cannot be read: {durable.reason(error)}"
        if found["bytes"] != files[name]["bytes"]:
            return f"has {found['bytes']} bytes instead of {files[name]['bytes']}"
        return None if found == files[name] else "does not match its sha256 sum"

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for name, wrong in zip(files, pool.map(fault, files)):
            if wrong:
                raise ValueError(f"checkpoint of step {step} in {workdir} is damaged: {name} {wrong}")


# --- files and folders ---


def _step(workdir, step: int) -> epath.Path:
    return durable.path_of(workdir) / "checkpoints" / str(step)


def _discard(folder: epath.Path) -> None:
    """Deletes a step; its manifest first, so that half a deleted one is never believed."""
    (folder / MANIFEST).unlink(missing_ok=True)
    durable.sync(folder)
    _remove(folder)


def _sweep(workdir) -> None:
    """Removes what killed or failed saves and deletions left behind."""
    saved = set(map(str, steps(workdir)))
    for path in (durable.path_of(workdir) / "checkpoints").iterdir():
        if path.name not in saved and (path.name.isdigit() or ".orbax-checkpoint-tmp" in path.name):
            _remove(path)


def _remove(folder: epath.Path) -> None:
    """Deletes a folder into which files may still fall: when one writer of a save fails, the others go on for a moment."""
    for patience in reversed(range(50)):
        try:
            return folder.rmtree()
        except OSError as error:
            if not folder.exists():
                return
            if error.errno not in (errno.ENOTEMPTY, errno.ENOENT) or not patience:
                raise
            time.sleep(0.1)
