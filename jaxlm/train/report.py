"""What a run tells: metrics.jsonl, TensorBoard event files, the progress line, and how fast the machine could be."""

import contextlib
import json
import logging
import math
import os
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm import chips
from jaxlm.config import TransformerConfig
from jaxlm.train import durable, writers

logging.getLogger("tensorboardX.x2num").setLevel(logging.ERROR)  # warns of each NaN that it is given; health.py says more


class Reporter:
    """Writes one run's metrics; on a resume, what an interrupted process logged past its checkpoint is taken back first.

    A row of `metrics.jsonl` holds `step` and full-precision floats such as `train/loss`.

    Args:
      resume_step: the checkpoint that the run goes on from, 0 for none.
      facts: texts for TensorBoard by name: the config, the table of parameters.
      tolerance: what to do when something cannot be written: a row is then missing, those before and after it are whole.
      also: where else the rows go.
    """

    def __init__(self, workdir: pathlib.Path, resume_step: int, facts: Mapping[str, str],
                 tolerance: durable.Tolerance = durable.Tolerance(False, print), also: writers.Writers | None = None):
        self._path, self._tolerance, self._also = workdir / "metrics.jsonl", tolerance, also
        drop_rows_after(self._path, resume_step)
        self._board = _Board(workdir)
        if resume_step:  # TensorBoard forgets what an interrupted process showed from here on
            from tensorboardX.proto import event_pb2
            with tolerance():
                self._board.write(resume_step + 1, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))
        for name, text in facts.items():
            self.text(resume_step, name, "    " + text.replace("\n", "\n    "))  # Markdown shows it as code

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One row of the log and one point of each curve."""
        with self._tolerance():
            durable.append(self._path, json.dumps({"step": step, **values}) + "\n")
        with self._tolerance():
            self._board.scalars(step, values)
        if self._also:
            self._also.scalars(step, values)

    def text(self, step: int, name: str, text: str) -> None:
        """Shows a text in TensorBoard."""
        from tensorboardX import summary
        with self._tolerance():
            self._board.write(step, summary=summary.text(name, text))

    def close(self) -> None:
        """Writes what is left."""
        self._board.close()
        if self._also:
            self._also.close()


class _Board:
    """A TensorBoard event file, written in the caller's thread: tensorboardX's own thread dies on a full disk, and its queue then blocks for ever. After an
    event that could not be written the next one begins another file: a reader stops at half an event."""

    def __init__(self, folder: pathlib.Path, suffix: str = ""):
        self._folder, self._suffix, self._files, self._writer = folder, suffix, 0, None

    def write(self, step: int, **content: Any) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2
        try:
            if self._writer is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._writer = EventsWriter(str(self._folder / "events"), self._suffix + f".{self._files}" * (self._files > 0))
                self._files += 1
            self._writer.write_event(event_pb2.Event(wall_time=time.time(), step=step, **content))
            self._writer.flush()
        except OSError as error:
            self.close()
            raise OSError(f"the event file in {self._folder} cannot be written: {durable.reason(error)}") from error

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboardX import summary
        from tensorboardX.proto import summary_pb2
        self.write(step, summary=summary_pb2.Summary(value=[v for name, value in values.items() for v in summary.scalar(name, value).value]))

    def close(self) -> None:
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()
        self._writer = None


def write_scalars(folder: pathlib.Path, step: int, values: Mapping[str, float]) -> None:
    """Adds points to the TensorBoard curves in `folder`, from a process that is not the trainer."""
    board = _Board(pathlib.Path(folder), f".{os.getpid()}")
    board.scalars(step, values)
    board.close()


def drop_rows_after(path: pathlib.Path, step: int) -> None:
    """Takes back what an interrupted process logged past the checkpoint of `step`, in a file of rows such as metrics.jsonl."""
    if not path.exists():
        return
    durable.rewrite(path, "".join(json.dumps(row) + "\n" for row in read_metrics(path.parent, path.name) if row["step"] <= step))


def read_metrics(workdir: pathlib.Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The rows of `metrics.jsonl`, or of another such file of a run, in order; a line torn by a kill is left out."""
    path = pathlib.Path(workdir) / name
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def read_texts(workdir: pathlib.Path, name: str) -> list[tuple[int, str]]:
    """The texts that `Reporter.text` wrote under a name, by step; of a step that was done twice the last, and none where a file ends in the middle."""
    from tensorboardX.proto import event_pb2
    found: dict[int, str] = {}
    for path in sorted(pathlib.Path(workdir).glob("events.out.tfevents.*")):
        data, at = path.read_bytes(), 0
        while at + 12 <= len(data):  # a record: its length, a sum of that, itself, a sum of that
            size = int.from_bytes(data[at:at + 8], "little")
            if at + size + 16 > len(data):
                break
            event = event_pb2.Event.FromString(data[at + 12:at + 12 + size])
            at += size + 16
            if event.session_log.status == event_pb2.SessionLog.START:  # an interrupted run went on before this step
                found = {step: text for step, text in found.items() if step < event.step}
            for value in event.summary.value:
                if value.tag.split("/")[0] == name and value.tensor.string_val:
                    found[event.step] = value.tensor.string_val[0].decode("utf-8", "replace")
    return sorted(found.items())


def overview(params: Any) -> str:
    """A table of all parameters, their shapes and their total."""
    from clu import parameter_overview
    return parameter_overview.get_parameter_overview(params, include_stats=False)


def flops_per_token(cfg: TransformerConfig, params: int, sequence_length: int, target_length: int = 0) -> float:
    """Floating-point operations of one training step per token: `6 N + 6 L T N_heads H` (Chowdhery et al. 2022, appendix B, with the causal half of
    attention counted once; encoders have both halves; encoder-decoders: `_flops_of_pair`). `N` are the parameters that multiply: all but the embedding
    tables when these are only looked up, and the experts that a token does not pass."""
    cfg = cfg.filled()
    if cfg.encoder_layers:
        return _flops_of_pair(cfg, sequence_length, target_length) / (sequence_length + target_length)
    looked_up = (0 if cfg.tied and cfg.output == "tokens" else cfg.vocab_size * cfg.width) + cfg.token_types * cfg.width
    looked_up += (cfg.context + cfg.position_offset) * cfg.width if cfg.positions == "learned" else 0
    idle = len(cfg.sparse_layers) * (cfg.experts - cfg.experts_per_token) * 3 * cfg.width * cfg.expert_feedforward
    return 6 * (params - looked_up - idle) + (6 if cfg.causal else 12) * cfg.layers * sequence_length * cfg.heads * cfg.head_size


def _flops_of_pair(cfg: TransformerConfig, read: int, said: int) -> float:
    """The same for a row of an encoder-decoder, where each matrix multiplies the tokens of its own side only: keys and values of cross-attention those
    that the encoder read."""
    heads = cfg.heads * cfg.head_size
    own = 2 * cfg.width * (heads + cfg.kv_heads * cfg.head_size) + (3 if cfg.gated else 2) * cfg.width * cfg.feedforward
    encoder = cfg.encoder_layers * read * (6 * own + 12 * read * heads)
    decoder = cfg.layers * said * (6 * (own + 2 * cfg.width * heads) + 6 * said * heads + 12 * read * heads)
    return encoder + decoder + cfg.layers * read * 12 * cfg.width * cfg.kv_heads * cfg.head_size + 6 * said * cfg.width * cfg.vocab_size


def peak_flops() -> tuple[float, str]:
    """FLOP/s that all devices could do at best, and where the figure comes from: a data sheet, or, on CPUs, a matrix product measured now."""
    if peak := chips.peak_flops(jax.devices()[0].device_kind):
        return peak * jax.device_count(), f"{jax.device_count()} x {peak / 1e12:.0f} TFLOP/s (data sheet, bf16)"
    measured = measure_matmul()
    return measured * (1 if jax.default_backend() == "cpu" else jax.device_count()), f"{measured / 1e9:.0f} GFLOP/s (measured matrix product, f32)"


def measure_matmul(size: int = 1536, repeats: int = 5) -> float:
    """FLOP/s of a square float32 matrix product on the first device, best of `repeats`."""
    a = jax.device_put(jnp.ones((size, size), jnp.float32), jax.local_devices()[0])
    multiply = jax.jit(jnp.dot)
    multiply(a, a).block_until_ready()
    best = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        multiply(a, a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def memory_gib() -> dict[str, float]:
    """Peak memory in GiB: of the busiest local device where it tells, else of this process."""
    stats = [d.memory_stats() for d in jax.local_devices()]
    if all(stats):
        return {"memory/peak_gib": max(s.get("peak_bytes_in_use", 0) for s in stats) / 2**30}
    import resource  # absent on Windows, where the devices above do not tell either
    scale = 2**30 if sys.platform == "darwin" else 2**20
    return {"memory/peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale}


class Progress:
    """One line that rewrites itself on a terminal; elsewhere a line now and then, so that a log file stays readable."""

    def __init__(self, seconds_between_lines: float = 15.0):
        self._live, self._every, self._last, self._width = sys.stdout.isatty(), seconds_between_lines, -math.inf, 0

    def show(self, line: str, *, final: bool = False) -> None:
        """Shows a line in place of the last one on a terminal; elsewhere only now and then, and when `final`."""
        if self._live:
            print("\r" + line.ljust(self._width), end="\n" if final else "", flush=True)
            self._width = 0 if final else len(line)
        elif final or time.monotonic() - self._last > self._every:
            print(line, flush=True)
            self._last = time.monotonic()

    def note(self, line: str) -> None:
        """A line that stays, above the live one."""
        if self._live and self._width:
            print("\r" + " " * self._width + "\r", end="")
            self._width = 0
        print(line, flush=True)


def by_layer(norms: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The "norms" of `train_step` as metrics: grad_norm/layers/3/attn/q."""
    found = {}
    for kind, paths in norms.items():
        for path, norm in paths.items():
            before, _, after = path.partition("layers/")
            each = {f"{before}layers/{i}/{after}": value for i, value in enumerate(norm)} if norm.ndim else {path: norm}
            found |= {f"{kind}_norm/{name}": float(value) for name, value in each.items()}
    return found


def duration(seconds: float) -> str:
    """45 s, 3:05, 2:03:05."""
    s = int(seconds)
    return f"{s} s" if s < 60 else f"{s // 60}:{s % 60:02d}" if s < 3600 else f"{s // 3600}:{s // 60 % 60:02d}:{s % 60:02d}"


def count(number: float) -> str:
    """1.2k, 3.4M, 5.6B."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"
