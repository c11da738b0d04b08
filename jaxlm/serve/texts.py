"""Encoders behind the server: vectors and labels of texts. Rows of one request share batches; one thread at a time computes."""

import functools
import threading
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import TransformerConfig
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.generate import bucket, mesh_of
from jaxlm.models.decoder import Model

BATCH = 32  # rows computed together


@functools.partial(jax.jit, static_argnames=("model", "mean"))
def _outputs(model: Model, params: Any, tokens_BT: jax.Array, lengths_B: jax.Array, *, mean: bool) -> jax.Array:
    """float32 `[B, ...]`: the mean over tokens of the hidden states, or what the model's head makes of each sequence."""
    inside = jnp.arange(tokens_BT.shape[1])[None] < lengths_B[:, None]
    places = jnp.where(inside, jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None], 0)
    hidden, _, _ = model.apply(params, {"tokens": tokens_BT, "positions": places, "segments": inside.astype(jnp.int32)})
    if not mean:
        return model.head(params, hidden)
    return jnp.where(inside[..., None], hidden.astype(jnp.float32), 0).sum(1) / lengths_B[:, None]


class Texts:
    """Serves an encoder. Its methods may be called from any thread and block."""

    def __init__(self, model: Model, params: Any, cfg: TransformerConfig, tokenizer: Tokenizer):
        self.model, self.params, self.cfg, self.tokenizer = model, params, cfg, tokenizer
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
        """Probabilities, float32 `[rows, labels]`."""
        logits = self._run(rows, mean=False)
        shares = np.exp(logits - logits.max(-1, keepdims=True))
        return shares / shares.sum(-1, keepdims=True)

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
                values = np.asarray(_outputs(self.model, self.params, batch, lengths, mean=mean))
            for i, member in enumerate(members):
                found[member] = values[i]
        return np.stack(found)
