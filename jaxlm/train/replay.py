"""One step of a run done again, alone, on one device: what it learned from, what came out, and where it went wrong (`jaxlm replay`)."""

import dataclasses
import itertools
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import config as configs
from jaxlm import metrics as figures
from jaxlm import sharding, trees
from jaxlm.config import LABELLED, Config, MeshConfig
from jaxlm.data import audit, loader, rows, shards
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.objectives import token_nll
from jaxlm.train import checkpoint, health, nonfinite, report, resume, saved, setup
from jaxlm.train.state import State
from jaxlm.train.step import mean_gradient

_EXCERPT = 160  # characters of a document
_EXCERPT_TOKENS = 64


class Done(NamedTuple):
    """A step that was done again."""
    step: int
    loss: float
    grad_norm: float
    why: str  # "" for a good step, "not finite" or "spike"
    skipped: bool
    logged: dict[str, float]  # what the run wrote down of it: "loss" and "grad_norm", or nothing

    @property
    def equal(self) -> bool | None:
        """Whether it came out as logged, bit by bit; None: it was not logged."""
        same = lambda a, b: a == b or math.isnan(a) and math.isnan(b)
        return all(same(getattr(self, name), value) for name, value in self.logged.items()) if self.logged else None


class Document(NamedTuple):
    """A document, or a part of one, in a row of the step's batch."""
    id: str
    source: str
    tokens: int
    loss: float | None  # nats of all its tokens, without dropout; None where the objective is not one of tokens
    share: float | None  # of the batch's loss
    excerpt: str


class Row(NamedTuple):
    """A row of the batch computed by itself, without dropout."""
    number: int  # in the token stream
    loss: float  # the sum over what counts in it
    weight: float  # how much that is
    share: float  # of the batch's loss; NaN where something is not finite
    grad_norm: float  # of the row's own mean loss
    documents: list[Document]


class Layer(NamedTuple):
    """Norms of what belongs to one layer of one parameter; those that are in no layer have None."""
    path: str
    layer: int | None
    grad: float
    param: float
    before: float | None  # the gradient's in the step before


class Replay(NamedTuple):
    """What is found about a step."""
    workdir: pathlib.Path
    start: int  # the checkpoint that it was done again from; 0: the beginning
    steps: list[Done]  # from the one after `start` to the step itself
    rows: list[Row]  # the worst first
    layers: list[Layer]
    origin: nonfinite.Origin | None  # of what is not finite in the gradient
    spoilt: list[str]  # leaves of the state before the step that are not finite


def run(workdir: pathlib.Path, step: int, folder: str = "", log: Callable[[str], None] = print) -> Replay:
    """Does step `step` (counted from 1, as training prints them) of a run again, from the newest whole checkpoint before it. Writes nothing.

    Args:
      folder: the prepared corpus, where it has moved.

    Raises:
      ValueError: one line: no such run, step or corpus.
    """
    config = _config(workdir)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    corpus = shards.open_corpus(saved.data_folder(workdir, {"dir": config.data.dir or str(workdir / "data")}, folder))
    with jax.set_mesh(mesh):
        try:
            parts, task, tokenizer, _ = resume.build(config, mesh, corpus)
        except ValueError:  # a kernel of attention for other devices
            config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="auto"))
            parts, task, tokenizer, _ = resume.build(config, mesh, corpus)
        if not 1 <= step <= parts.total:
            raise ValueError(f"--step={step} is no step of {workdir}: it has steps 1 to {parts.total}")
        start, state, _, _ = resume.start(parts, corpus, task, workdir, log, before=step)
        recent = health.Recent(config.train.spike, checkpoint.find_file(workdir, start, health.RECENT) if start else None)
        log(f"from {f'the checkpoint of step {start}' if start else 'the beginning'}: {step - start} step{'s' * (step - start > 1)} to do")
        program, _ = resume.compiled(parts, corpus, task, state, recent)
        logged, done, before = _logged(workdir), [], {}
        progress = report.Progress()
        for number, batch in _batches(parts, corpus, task, start, step):
            if number == step:
                break
            if number == step - 1:
                before = _norms(_gradient(parts, state, batch))
            state, metrics = program(number, state, batch)
            done.append(_judged(number, metrics, recent, logged))
            progress.show(f"step {number}/{step}  loss {done[-1].loss:.3f}", final=number == step - 1)
        spoilt = [_place(trees.path_name(path) or "state", leaf) for path, leaf in
                  jax.tree_util.tree_leaves_with_path((state.params, state.opt, state.ema))
                  if jnp.issubdtype(leaf.dtype, jnp.floating) and not bool(jnp.isfinite(leaf).all())]
        layers = _layers(parts, state, _gradient(parts, state, batch), before)
        per_row = _rows(parts, state.params, batch, audit.occupants(corpus, task, config.data.seed, config.data.batch_size, step), corpus, tokenizer, step)
        broken = any(not math.isfinite(value) for row in per_row for value in (row.loss, row.grad_norm)) or any(not math.isfinite(one.grad) for one in layers)
        origin = _origin(parts, state, batch) if broken else None
        _, metrics = program(step, state, batch)
        done.append(_judged(step, metrics, recent, logged))
    return Replay(workdir, start, done, per_row, layers, origin, spoilt)


def _config(workdir: pathlib.Path) -> Config:
    path = workdir / "config.json"
    if not path.exists():
        raise ValueError(f"{workdir} holds no run (no config.json): give the workdir of jaxlm train")
    return dataclasses.replace(configs.read(path), mesh=MeshConfig())


def _logged(workdir: pathlib.Path) -> dict[int, dict[str, float]]:
    """Step -> the loss and gradient norm that the run wrote down."""
    found = {row["step"]: {"loss": row["train/loss"], "grad_norm": row["train/grad_norm"]} for row in report.read_metrics(workdir) if "train/loss" in row}
    return {row["step"]: {name: float(row[name]) for name in ("loss", "grad_norm")} for row in report.read_metrics(workdir, health.FILE)} | found


def _batches(parts: setup.Setup, corpus: shards.Corpus, task: rows.Task, start: int, stop: int) -> Iterator[tuple[int, dict[str, jax.Array]]]:
    size = parts.config.data.batch_size
    for number, batch in loader.batches(corpus, "train", task, batch_size=size, seed=parts.config.data.seed, start_step=start, stop_step=stop, threads=0):
        yield number + 1, sharding.to_device(parts.mesh, batch, size)


def _judged(step: int, metrics: Any, recent: health.Recent, logged: dict[int, dict[str, float]]) -> Done:
    values = jax.device_get(metrics)
    bad = health.judge(step, values, recent)
    return Done(step, figures.means(values["sums"])["loss"], float(values["grad_norm"]), bad.why if bad else "", bool(values["skipped"]), logged.get(step, {}))


# --- layers ---


def _gradient(parts: setup.Setup, state: State, batch: dict[str, jax.Array]) -> Any:
    return jax.jit(lambda state, batch: _mean(parts, state, batch))(state, batch)


def _mean(parts: setup.Setup, state: State, batch: dict[str, jax.Array]) -> Any:
    """The gradient that the step takes, before it is clipped."""
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    return mean_gradient(*trees.split(state.params, parts.trainable), batch, key, parts.objective, parts.config.train.microbatches)[0]


def _norms(tree: Any) -> dict[tuple[str, int | None], float]:
    """Norm of each leaf, of leaves of stacked layers one for each layer."""
    found: dict[tuple[str, int | None], float] = {}
    for path, leaf in trees.flatten(tree).items():
        values = np.asarray(leaf, np.float64)
        stacked = "layers" in path.split("/") and values.ndim
        for layer, part in enumerate(values) if stacked else [(None, values)]:
            found[path, layer] = float(np.sqrt(np.square(part).sum()))
    return found


def _layers(parts: setup.Setup, state: State, gradient: Any, before: dict[tuple[str, int | None], float]) -> list[Layer]:
    norms = _norms(trees.split(state.params, parts.trainable)[0])
    return [Layer(*place, norm, norms[place], before.get(place)) for place, norm in _norms(gradient).items()]


def _place(path: str, leaf: jax.Array) -> str:
    """A leaf of the state with values that are not finite: its name, and which layers."""
    bad = ~np.isfinite(np.asarray(leaf, np.float32))
    of = f", layers {', '.join(map(str, np.flatnonzero(bad.reshape(len(bad), -1).any(axis=1))))}" if "layers" in path.split("/") and bad.ndim else ""
    return f"{path}{of}: {int(bad.sum()):,} of {bad.size:,} values"


def _origin(parts: setup.Setup, state: State, batch: dict[str, jax.Array]) -> nonfinite.Origin | None:
    layers = parts.config.model.layers

    def loop(line: str, turn: int, turns: int) -> str:
        if "models/stack.py" in line:
            return f"layer {turn}" if turns == layers else f"group {turn} of {turns} of layers"
        return f"microbatch {turn}" if "train/step.py" in line else f"turn {turn} of {turns} of the loop at {line}"

    names = [*trees.flatten(state.params), *sorted(batch)]
    f = lambda params, batch: _mean(parts, state._replace(params=params), batch)
    return nonfinite.find(f, (state.params, batch), names, loop)


# --- rows ---


def _rows(parts: setup.Setup, params: Any, batch: dict[str, jax.Array], occupants: list[audit.Occupant], corpus: shards.Corpus, tokenizer: Tokenizer,
          step: int) -> list[Row]:
    cfg, size = parts.config, parts.config.data.batch_size
    of_tokens = cfg.objective.name not in (*LABELLED, "preference")

    @jax.jit
    def alone(params: Any, row: dict[str, jax.Array]) -> tuple[Any, Any, Any, Any]:
        grads, sums = mean_gradient(*trees.split(params, parts.trainable), row, None, parts.objective, 1)
        nll = token_nll(parts.model, params, row, None, cfg.objective.chunk_rows)[0] if of_tokens else jnp.zeros(())
        return *sums["loss"], jnp.sqrt(sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(grads))), nll

    found, held = [], {number: list(group) for number, group in itertools.groupby(occupants, lambda one: one.row)}
    host = jax.device_get(batch)
    for i in range(size):
        loss, weight, norm, nll = jax.device_get(alone(params, {key: value[i:i + 1] for key, value in batch.items()}))
        inside = held.get((step - 1) * size + i, [])
        lost = [float((nll[0] * host["weights"][i])[host["segments"][i] == k + 1].sum()) if of_tokens else None for k in range(len(inside))]
        found.append((i, float(loss), float(weight), float(norm), inside, lost))
    whole = sum(abs(loss) for _, loss, *_ in found)
    share = lambda value: value / whole if whole else math.nan
    rows_ = [Row((step - 1) * size + i, loss, weight, share(loss), norm,
                 [Document(one.id, one.source, one.piece.stop - one.piece.start, nats, None if nats is None else share(nats), _excerpt(corpus, tokenizer, one))
                  for one, nats in zip(inside, lost)]) for i, loss, weight, norm, inside, lost in found]
    worst = lambda row: (not math.isfinite(row.loss), not math.isfinite(row.grad_norm), row.grad_norm if math.isfinite(row.grad_norm) else 0.0)
    return sorted(rows_, key=worst, reverse=True)


def _excerpt(corpus: shards.Corpus, tokenizer: Tokenizer, one: audit.Occupant) -> str:
    length = int(corpus.splits["train"].tokens[one.piece.document])
    tokens = corpus.read("train", one.piece.document, one.piece.start, min(one.piece.stop + 1, one.piece.start + _EXCERPT_TOKENS, length))
    return " ".join(tokenizer.decode(tokens.tolist()).split())[:_EXCERPT]


# --- what is said of it ---


def text(found: Replay, shown: int = 8) -> str:
    """For people: of rows, documents in a row and layers the `shown` that matter most."""
    *steps, last = found.steps
    lines = [_compared(steps, found.start)] if steps else []
    lines.append(f"step {last.step}: loss {last.loss:.6g}, gradient norm {last.grad_norm:.6g}{_against(last)}; " +
                 ("its update was skipped: " + last.why if last.skipped else "its update was made" + f" ({last.why})" * bool(last.why)))
    if found.spoilt:
        lines.append(f"NOT FINITE BEFORE THE STEP: {'; '.join(found.spoilt[:shown])}; no update writes that, so it was there in step {found.start} already, or "
                     "the memory of a machine fails")
    if found.origin:
        lines.append(f"first value that is not finite: {found.origin}")
    elif any(not math.isfinite(row.loss) for row in found.rows):
        lines.append("done one operation after the other everything is finite: what is not comes from how the compiler joins operations")
    lines += ["", "Gradient by layer, the largest first (norm; against that of the parameters; against the step before):", *_layer_lines(found.layers, shown)]
    lines += ["", f"Rows by their gradient, each by itself and without dropout (the batch has {len(found.rows)}):"]
    for row in found.rows[:shown]:
        mean = row.loss / row.weight if row.weight else math.nan
        lines.append(f"  row {row.number}: mean loss {mean:.4g}, {_share(row.share)} of the batch's, gradient norm {row.grad_norm:.4g}")
        ranked = sorted(row.documents, key=lambda one: -math.inf if one.loss is None else -one.loss if math.isfinite(one.loss) else -math.inf)
        lines += [f"    {audit.name(one)}, {one.tokens} tokens" +
                  (f", {_share(one.share)} of the batch's loss" if one.share is not None else "") + f": {one.excerpt!r}" for one in ranked[:shown]]
        lines += [f"    and {len(ranked) - shown} more documents"] * (len(ranked) > shown)
    return "\n".join(lines)


def _compared(steps: list[Done], start: int) -> str:
    logged = [one for one in steps if one.logged]
    wrong = [one for one in logged if not one.equal]
    where = f"steps {start + 1} to {steps[-1].step}: {len(logged)} of {len(steps)} were logged, "
    bad = [one for one in steps if one.why]
    tail = f"; not good: {', '.join(f'step {one.step} ({one.why})' for one in bad[:5])}" + f" and {len(bad) - 5} more" * (len(bad) > 5) if bad else ""
    if not wrong:
        return where + "all equal bit by bit" * bool(logged) + "so nothing could be compared" * (not logged) + tail
    far = max(abs(one.loss - one.logged["loss"]) / max(abs(one.logged["loss"]), 1e-30) for one in wrong)
    return (f"{where}{len(wrong)} of them differ, the first at step {wrong[0].step} (logged loss {wrong[0].logged['loss']!r}, here {wrong[0].loss!r}), by at "
            f"most {far:.1e} of the loss: that is rounding (another mesh, device or version of jax) where it is small{tail}")


def _against(last: Done) -> str:
    if not last.logged:
        return " (the run did not log it)"
    return " (as logged, bit by bit)" if last.equal else f" (logged: {last.logged['loss']:.6g} and {last.logged['grad_norm']:.6g})"


def _layer_lines(layers: list[Layer], shown: int) -> list[str]:
    order = sorted(layers, key=lambda one: (math.isfinite(one.grad), -one.grad if math.isfinite(one.grad) else 0))
    bad = [one for one in order if not math.isfinite(one.grad)]
    times = lambda a, b: f"{a / b:9.2e}" if b else "        -"
    name = lambda one: one.path if one.layer is None else f"{one.path}, layer {one.layer}"
    lines = [f"  {name(one):<40} {one.grad:10.3e}  {times(one.grad, one.param)} of the parameters" +
             (f"  {times(one.grad, one.before)} times the step before" if one.before is not None else "") for one in order[:shown]]
    return lines + [f"  not finite in {len(bad)} of {len(layers)}"] * bool(bad)


def _share(share: float) -> str:
    return f"{share:.1%}" if math.isfinite(share) else "not finite"


def as_json(found: Replay) -> dict[str, Any]:
    """Everything, for programs: nested dicts of JSON values; what is not finite is "nan" or "inf"."""
    def plain(value: Any) -> Any:
        if isinstance(value, tuple) and hasattr(value, "_asdict"):
            return {key: plain(one) for key, one in value._asdict().items()}
        if isinstance(value, dict):
            return {key: plain(one) for key, one in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(one) for one in value]
        if isinstance(value, float) and not math.isfinite(value):
            return str(value)
        return str(value) if isinstance(value, pathlib.Path) else value

    return plain(found)
