"""A study: trials with their values and figures, which any number of processes take part in, each of which may end at any time.

Home of optuna (pip install 'jaxlm[search]'): samplers, pruners, storages. Ours is who works on what: a process takes a trial while it holds the study's lock,
and holds the trial's own lock as long as it works on it. The kernel gives locks back when a process ends, however it ends; so a trial that is running and
that nobody holds was left by a process that died, and the next one that looks for work goes on with it. There is no time to wait for a heartbeat, and no
trial is done twice or lost.
"""

import contextlib
import json
import os
import pathlib
import random
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxlm import config as configs
from jaxlm.config import Config
from jaxlm.search import space as spaces
from jaxlm.search.space import Space
from jaxlm.train import best, initial, resume
from jaxlm.train.lock import Lock, Locked

if TYPE_CHECKING:
    import optuna

INSTALL = "a search needs optuna: pip install 'jaxlm[search]'"
STORAGES = {"journal": "journal.log", "sqlite": "study.db"}
FACTOR = 3  # of ASHA and Hyperband: one trial in three goes on from each rung; rungs are after 1, 3, 9 ... evaluations
ATTEMPTS = 3  # processes that a trial may take with it before it counts as failed
_WORTHLESS = "not finite"  # how the note of a pruned trial begins that never goes on
_IDENTITY, _NAME = "study.json", "jaxlm"


class Study(NamedTuple):
    config: Config  # of all trials, before their values
    space: Space
    folder: pathlib.Path
    lock: Lock  # whoever takes a trial holds it
    optuna: "optuna.Study"


class Taken(NamedTuple):
    """A trial that is this process's to work on."""
    number: int
    trial: "optuna.Trial"
    pruner: str
    lock: Lock
    values: dict[str, Any]  # by key
    attempt: int  # 1; more when processes before this one died over it


class Row(NamedTuple):
    """A trial as it stands."""
    number: int
    state: str  # "complete", "pruned", "failed", "running" (or left by a process that died), "waiting"
    values: dict[str, Any]  # by key
    figure: float | None  # of a complete trial its result, of others their last evaluation
    curve: tuple[float, ...]  # the figure of each evaluation
    note: str


def open_study(folder: pathlib.Path, config: Config, space: Space, storage: str = "") -> Study:
    """Makes the study in a folder, or joins the one that is there.

    Args:
      storage: a name of `STORAGES`; empty: the study's own, of a new one "journal".

    Raises:
      ValueError, OSError: one line: another config or space than the study's, a folder that cannot be written or has no locks, no optuna.
    """
    try:
        import optuna
    except ImportError:
        raise ValueError(INSTALL) from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    best.check(config)
    lock = _lock(folder)
    with holding(lock):
        kind = _adopt(folder, config, space, storage)
        direction = "minimize" if best.lower(config) else "maximize"
        try:
            study = optuna.create_study(study_name=_NAME, storage=_storage(folder, kind), direction=direction, load_if_exists=True)
            study.get_trials(deepcopy=False)
        except ValueError as error:
            raise ValueError(f"{folder / STORAGES[kind]} is damaged ({' '.join(str(error).split())}): choose another --workdir") from None
        if config.train.init_from and spaces.shares_corpus(space):  # the model and the tokenizer that it decides, once for all trials
            config = initial.resolve(config, folder)
    return Study(config, space, folder, lock, study)


def take(study: Study, sampler: str, pruner: str, trials: int, seed: int = 0) -> Taken | None:
    """The next trial to work on, or None when there is none: one that was left by a process that died; of ASHA one that goes on; else a new one.

    Args:
      sampler: "tpe", "random", "cmaes", or "grid", which does each combination once.
      pruner: "asha", "hyperband", "median" or "none".
      trials: how many the study has in the end; a grid has as many as it has combinations.
      seed: of what is drawn at random; each trial's draws depend on its number too.

    Raises:
      ValueError: a grid of a range without a number of points.
    """
    from optuna.trial import Trial, TrialState

    study.optuna.pruner = _pruner(pruner)
    with holding(study.lock):
        if sampler == "grid":
            _plan(study, seed)
        found = study.optuna.get_trials(deepcopy=False)
        for frozen in (f for f in found if f.state == TrialState.RUNNING):
            number, attempt = frozen.user_attrs["trial"], frozen.user_attrs.get("attempts", 1) + 1
            lock = _lock(_running(study, number))
            try:
                lock.__enter__()
            except Locked:
                continue
            study.optuna.sampler = _sampler(sampler, seed + frozen.number)
            trial = Trial(study.optuna, frozen._trial_id)
            if attempt > ATTEMPTS:
                finish(study, Taken(number, trial, pruner, lock, {}, attempt), note=f"{ATTEMPTS} processes ended over it")
                continue
            trial.set_user_attr("attempts", attempt)
            return Taken(number, trial, pruner, lock, _draw(study, trial), attempt)
        waiting = next((f for f in found if f.state == TrialState.WAITING), None)
        known = rows(study)
        if waiting is None and pruner == "asha" and (row := _promoted(study, known, final=sampler == "grid" or len(known) >= trials)):
            number = _queue(study, row.number, row.values, len(row.curve))
        elif waiting is None and (sampler == "grid" or len(known) >= trials):
            return None
        else:
            number = _queue(study, len(known), {}) if waiting is None else waiting.user_attrs["trial"]
        lock = _lock(_running(study, number))
        lock.__enter__()  # before the trial runs: it is never without its holder
        study.optuna.sampler = _sampler(sampler, seed + len(found))
        trial = study.optuna.ask()
        assert trial.user_attrs["trial"] == number
        return Taken(number, trial, pruner, lock, _draw(study, trial), 1)


def judge(study: Study, taken: Taken, curve: Sequence[float]) -> bool:
    """Tells the figures of a trial's evaluations so far; says whether the trial ends at the last of them, for now or (but for ASHA) for good."""
    for index in range(len(taken.trial.storage.get_trial(taken.trial._trial_id).intermediate_values), len(curve)):
        taken.trial.report(curve[index], index + 1)
    if taken.pruner != "asha":
        return taken.trial.should_prune()
    known = rows(study)
    if len(curve) <= taken.trial.user_attrs["done"] or len(curve) not in _rungs(known):
        return False
    # What is in line already (a grid) is heard first: the more trials a rung has, the surer is its best third.
    return any(row.state == "waiting" for row in known) or taken.number not in _best_third(study, known, len(curve))


def leave(taken: Taken) -> None:
    """Gives back a trial that is to go on: this process was asked to stop, which does not count as ending over it."""
    taken.trial.set_user_attr("attempts", taken.attempt - 1)
    taken.lock.__exit__()


def finish(study: Study, taken: Taken, *, figure: float | None = None, pruned: bool = False, note: str = "") -> None:
    """Ends a trial: complete with a figure, else pruned, else failed."""
    from optuna.trial import TrialState

    if note:
        taken.trial.set_user_attr("note", note)
    if figure is not None:
        study.optuna.tell(taken.trial, figure)
    else:
        study.optuna.tell(taken.trial, state=TrialState.PRUNED if pruned else TrialState.FAIL)
    taken.lock.__exit__()


def rows(study: Study) -> list[Row]:
    """All trials by number. Optuna knows one that ASHA went on with as several, the later ones with the figures of those before."""
    from optuna.trial import TrialState

    names = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed", TrialState.WAITING: "waiting"}
    found: dict[int, Row] = {}
    for trial in study.optuna.get_trials(deepcopy=False):
        number = trial.user_attrs["trial"]
        before = found[number].curve if number in found else ()
        curve = max(before, tuple(trial.intermediate_values[step] for step in sorted(trial.intermediate_values)), key=len)
        figure = trial.value if trial.state == TrialState.COMPLETE else curve[-1] if curve else None
        state = names.get(trial.state, "running")
        values = trial.params or trial.system_attrs.get("fixed_params", {})
        found[number] = Row(number, state, {key: values[key] for key in study.space if key in values}, figure, curve, trial.user_attrs.get("note", ""))
    return [found[number] for number in sorted(found)]


def others(study: Study) -> list[int]:
    """Numbers of the trials that other processes work on now."""
    found = []
    with holding(study.lock):  # for a moment we take the locks of those that nobody works on
        for number in (row.number for row in rows(study) if row.state == "running"):
            try:
                with _lock(_running(study, number)):
                    pass
            except Locked:
                found.append(number)
    return found


def best_row(study: Study, found: list[Row]) -> Row | None:
    """The complete trial with the best figure, of equals the first."""
    sign = 1 if best.lower(study.config) else -1
    return min((row for row in found if row.state == "complete"), key=lambda row: sign * row.figure, default=None)


def trial_config(config: Config, space: Space, folder: pathlib.Path, values: dict[str, Any]) -> Config:
    """The config of a trial's run, of a search in a folder.

    Raises:
      ValueError: one line: its values do not go together.
    """
    shared = [] if config.data.dir or not spaces.shares_corpus(space) else [("data.dir", str((folder / "data").absolute()))]
    return configs.override(config, [*shared, *spaces.overrides(space, values)])


def workdir(study: Study, number: int) -> pathlib.Path:
    """The workdir of a trial's run."""
    return study.folder / "trials" / str(number)


def importances(study: Study, known: list[Row]) -> tuple[int, dict[str, float]]:
    """Key -> share of the figure's variation that it explains (fANOVA, Hutter et al. 2014, as Optuna computes it), at the last evaluation that half of the
    trials have reached, and the number of that evaluation; empty with fewer than 4 trials or one key.

    Raises:
      ImportError: fANOVA needs scikit-learn.
    """
    import optuna

    lengths = sorted((len(row.curve) for row in known if row.curve), reverse=True)
    index = lengths[len(lengths) // 2] if len(lengths) >= 4 else 0
    some = [row for row in known if 0 < index <= len(row.curve)]
    varied = [key for key in study.space if len({row.values[key] for row in some}) > 1]
    if len(some) < 4 or len(varied) < 2 or len({row.curve[index - 1] for row in some}) < 2:
        return index, {}
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    at = optuna.create_study(direction=study.optuna.direction)
    kinds = {trial.user_attrs["trial"]: trial.distributions for trial in study.optuna.get_trials(deepcopy=False) if trial.distributions}
    for row in some:
        at.add_trial(optuna.create_trial(params=row.values, distributions=kinds[row.number], value=row.curve[index - 1]))
    return index, optuna.importance.get_param_importances(at, params=varied)


def _rungs(known: list[Row]) -> list[int]:
    """Numbers of the evaluations after which ASHA compares trials, as far as any trial has come: 1, 3, 9 ..."""
    longest, found = max((len(row.curve) for row in known), default=0), [1]
    while found[-1] * FACTOR <= longest:
        found.append(found[-1] * FACTOR)
    return found


def _best_third(study: Study, known: list[Row], rung: int) -> list[int]:
    """Numbers of the best third of the trials that have come to a rung, the best first."""
    sign = 1 if best.lower(study.config) else -1
    there = sorted((sign * row.curve[rung - 1], row.number) for row in known if len(row.curve) >= rung)
    return [number for _, number in there[:len(there) // FACTOR]]


def _promoted(study: Study, known: list[Row], final: bool) -> Row | None:
    """The trial that ASHA goes on with: of the highest rung one that waits there and is, by now, in the best third. When no trial will be added (`final`) and
    none has come to its end, the best of those that came farthest, so that a study ends with a result. Unlike Optuna's pruner of that name, which ends trials
    for good by comparing with the few that happened to come first, this is the algorithm of Li et al. 2020."""
    waits = {row.number: row for row in known if row.state == "pruned" and row.curve and not row.note.startswith(_WORTHLESS)}
    for rung in reversed(_rungs(known)):
        for number in _best_third(study, known, rung):
            if number in waits and len(waits[number].curve) == rung:
                return waits[number]
    if not final or not waits or any(row.state in ("complete", "running", "waiting") for row in known):
        return None
    sign = 1 if best.lower(study.config) else -1
    return min(waits.values(), key=lambda row: (-len(row.curve), sign * row.curve[-1]))


def _queue(study: Study, number: int, values: dict[str, Any], done: int = 0) -> int:
    """Puts a trial in line whose values, as far as they are not given, are drawn when it is taken, and which goes on after so many evaluations."""
    study.optuna.enqueue_trial(values, user_attrs={"trial": number, "done": done})
    return number


def _running(study: Study, number: int) -> pathlib.Path:
    """Where the lock of a trial lies: its holder works on it."""
    return study.folder / "running" / str(number)


def _draw(study: Study, trial: Any) -> dict[str, Any]:
    """All values of a trial: of one that goes on those that it had."""
    found: dict[str, Any] = {}
    for key, given in study.space.items():
        if isinstance(given, spaces.Choice):
            found[key] = trial.suggest_categorical(key, given.values)
        elif given.whole:
            found[key] = trial.suggest_int(key, int(given.low), int(given.high), log=given.log)
        else:
            found[key] = trial.suggest_float(key, given.low, given.high, log=given.log)
    return found


def _plan(study: Study, seed: int) -> None:
    """Puts what the study does not have yet of the grid's combinations in line, in a random order, so that those that are done first are a fair sample."""
    combinations, known = spaces.grid(study.space), rows(study)
    random.Random(seed).shuffle(combinations)
    for number, combination in enumerate((c for c in combinations if c not in [row.values for row in known]), len(known)):
        _queue(study, number, combination)


def _sampler(name: str, seed: int) -> Any:
    """Bergstra et al. 2011 (TPE; the trials that run count as bad ones, so that processes do not all try one place), Hansen 2016 (CMA-ES)."""
    from optuna import samplers

    if name == "cmaes":
        try:
            import cmaes  # noqa: F401
        except ImportError:
            raise ValueError("--sampler=cmaes needs the package cmaes: pip install 'jaxlm[search]'") from None
        return samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
    return samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True) if name == "tpe" else samplers.RandomSampler(seed=seed)


def _pruner(name: str) -> Any:
    """Of a trial's evaluations number 1, 2, ...: Li et al. 2018 (Hyperband), Golovin et al. 2017 (the median of the others). ASHA is in `judge` and `take`."""
    from optuna import pruners

    if name == "hyperband":
        return pruners.HyperbandPruner(min_resource=1, reduction_factor=FACTOR)
    return pruners.MedianPruner() if name == "median" else pruners.NopPruner()


def _lock(folder: pathlib.Path) -> Lock:
    def refuse(line: str) -> None:
        raise ValueError(f"{folder} is on a file system without locks, by which searches share a study: choose another --workdir")

    return Lock(folder, log=refuse)


@contextlib.contextmanager
def holding(lock: Lock) -> Iterator[None]:
    """Holds a lock, after whoever has it."""
    while True:
        try:
            lock.__enter__()
            break
        except Locked:
            time.sleep(0.05)
    try:
        yield
    finally:
        lock.__exit__()


def _adopt(folder: pathlib.Path, config: Config, space: Space, storage: str) -> str:
    """Writes what a new study is, refuses to mix another one with it; returns the kind of its storage."""
    path, own = folder / _IDENTITY, {key: str(given) for key, given in space.items()}
    if not path.exists():
        if any(entry.name not in ("LOCK", "study.tmp") for entry in folder.iterdir()):
            raise ValueError(f"{folder} is not empty and holds no study: choose another --workdir")
        identity = {"storage": storage or "journal", "space": own, "config": configs.to_dict(config)}
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(identity, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
        return identity["storage"]
    try:
        identity = json.loads(path.read_text(encoding="utf-8"))
        theirs, before = identity["space"], configs.build(identity["config"])
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path} cannot be read ({error}): choose another --workdir") from None
    changed = [f"space of {key}: {theirs.get(key, 'none')} -> {own.get(key, 'none')}" for key in {**theirs, **own} if theirs.get(key) != own.get(key)]
    changed += [line for line in configs.difference(before, config) if not line.startswith(resume.FREE)]
    if storage and storage != identity["storage"]:
        changed.append(f"storage: {identity['storage']} -> {storage}")
    if changed:
        raise ValueError(f"{folder} holds another study ({'; '.join(changed)}): choose another --workdir, or undo the change")
    return identity["storage"]


def _storage(folder: pathlib.Path, kind: str) -> Any:
    """Optuna's storage in the study's folder."""
    from optuna import storages
    from optuna.storages.journal import JournalFileBackend

    path = folder / STORAGES[kind]
    if path.exists() and not os.access(path, os.R_OK | os.W_OK):
        raise OSError(f"{path} cannot be written: Permission denied; choose another workdir")
    if kind == "sqlite":
        return storages.RDBStorage(f"sqlite:///{path.absolute()}", engine_kwargs={"connect_args": {"timeout": 60}})
    lock = _JournalLock(_lock(folder / "journal"))
    lock.acquire()
    try:
        _mend(path)
    finally:
        lock.release()
    return storages.JournalStorage(JournalFileBackend(str(path), lock_obj=lock))


def _mend(path: pathlib.Path) -> None:
    """Cuts off a last line that a full disk or a power cut left without its end: what is appended would be glued to it."""
    data = path.read_bytes() if path.exists() else b""
    if data and not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)


class _JournalLock:
    """What Optuna asks of a lock, as one that a killed process gives back at once; Optuna's own are believed after 30 s."""

    def __init__(self, lock: Lock):
        self._lock = lock
        self._held: Any = None

    def acquire(self) -> bool:
        self._held = holding(self._lock)
        self._held.__enter__()
        return True

    def release(self) -> None:
        self._held.__exit__(None, None, None)
