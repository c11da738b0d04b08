"""Encoders and classifiers behind the server: vectors and labels of texts. Rows of one request share batches; one thread at a time computes."""

import functools
import threading
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import TransformerConfig
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.evaluate import classification
from jaxlm.generate import bucket, mesh_of
from jaxlm.models.decoder import Model

BATCH = 32  # rows computed together


@functools.partial(jax.jit, static_argnames=("model", "mean", "causal"))
def _outputs(model: Model, params: Any, tokens_BT: jax.Array, lengths_B: jax.Array, *, mean: bool, causal: bool) -> jax.Array:
    """float32 `[B, ...]`: the mean over tokens of the hidden states, or what the model's head makes of the first token's state, of a causal model's last."""
    inside = jnp.arange(tokens_BT.shape[1])[None] < lengths_B[:, None]
    places = jnp.where(inside, jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None], 0)
    hidden, _, _ = model.apply(params, {"tokens": tokens_BT, "positions": places, "segments": inside.astype(jnp.int32)})
    if not mean:
        at = lengths_B - 1 if causal else jnp.zeros_like(lengths_B)
        return model.head(params, jnp.take_along_axis(hidden, at[:, None, None], axis=1))
    return jnp.where(inside[..., None], hidden.astype(jnp.float32), 0).sum(1) / lengths_B[:, None]


class Texts:
    """Serves an encoder, or a model of labels of texts. Its methods may be called from any thread and block.

    Args:
      objective: classify, multi_label or regress, of a model of labels.
      temperature: what its logits are divided by for calibrated probabilities, see `classification.probabilities`.
    """

    def __init__(self, model: Model, params: Any, cfg: TransformerConfig, tokenizer: Tokenizer, objective: str = "classify", temperature: float = 1.0):
        self.model, self.params, self.cfg, self.tokenizer = model, params, cfg, tokenizer
        self.objective, self.temperature = objective, temperature
        self.labels = cfg.label_names or tuple(f"LABEL_{i}" for i in range(cfg.labels))
        self._lock = threading.Lock()

    def ids(self, text: str | Sequence[int]) -> list[int]:
        """A text framed as in training; tokens are taken as they are.

        Raises:
          ValueError: one line: none, too many, or unknown ones.
        """
        ids = [self.tokenizer.bos, *self.tokenizer.encode(text), self.tokenizer.eos] if isinstance(text, str) else list(text)
        if not 0 < len(ids) <= self.cfg.context:
            raise ValueError(f"an input has {len(ids)} tokens and the model reads 1 to {self.cfg.context}")
        return ids

    def embed(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """Vectors of length 1, float32 `[rows, D]`: the mean over the tokens of the hidden states (Reimers & Gurevych 2019), or the pooled vector of a model
        that has one."""
        found = self._run(rows, mean=self.cfg.output != "pooled")
        return found / np.maximum(np.linalg.norm(found, axis=-1, keepdims=True), 1e-12)

    def classify(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """Probabilities, float64 `[rows, labels]`; with several labels each its own, of regress the number `[rows, 1]`."""
        return classification.probabilities(self.objective, self._run(rows, mean=False), self.temperature)

    def _run(self, rows: Sequence[Sequence[int]], mean: bool) -> np.ndarray:
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        found: list[np.ndarray | None] = [None] * len(rows)
        for start in range(0, len(rows), BATCH):
            members = order[start:start + BATCH]
            batch = np.zeros((BATCH if len(members) > 1 else 1, min(bucket(len(rows[members[-1]])), self.cfg.context)), np.int32)
            lengths = np.ones(len(batch), np.int32)
            for i, member in enumerate(members):
                batch[i, :len(rows[member])], lengths[i] = rows[member], len(rows[member])
            with self._lock, mesh_of(self.params):
                values = np.asarray(_outputs(self.model, self.params, batch, lengths, mean=mean, causal=self.cfg.causal))
            for i, member in enumerate(members):
                found[member] = values[i]
        return np.stack(found)
