"""What stands on an encoder's hidden states: tokens behind masks, one vector of a sequence, labels. Pure functions over nested dicts."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxlm.config import TransformerConfig
from jaxlm.models.axes import lent
from jaxlm.models.layers import ACTIVATIONS, Norm, initialiser, project

POOLER_ACTIVATIONS = {"tanh": jnp.tanh, "relu": jax.nn.relu}


def init_masked(cfg: TransformerConfig, key: jax.Array) -> dict:
    """Dense layer, norm and output bias; with `tied` the output matrix is the token embedding."""
    k_dense, k_norm, k_kernel = jax.random.split(key, 3)
    params = {"dense": initialiser(cfg, cfg.width, cfg.width)(k_dense, (cfg.width, cfg.width), jnp.float32),
              "norm": Norm(cfg).init(k_norm, jnp.zeros((1, cfg.width)))["params"]}
    if cfg.bias:
        params |= {"dense_bias": jnp.zeros(cfg.width), "bias": jnp.zeros(cfg.vocab_size)}
    if not cfg.tied:
        params["kernel"] = initialiser(cfg, cfg.width, cfg.vocab_size)(k_kernel, (cfg.width, cfg.vocab_size), jnp.float32)
    return params


def masked(cfg: TransformerConfig, params: dict, table: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """Hidden states `[..., D]` -> logits `[..., V]` float32; `table` is the token embedding `[V, D]`."""
    multiply = lent(table.T if cfg.tied else params["kernel"], jnp.dtype(cfg.dtype), "embed", "vocab")

    def head(hidden: jax.Array) -> jax.Array:
        x = project(hidden, params["dense"].astype(hidden.dtype))
        if cfg.bias:
            x = x + params["dense_bias"].astype(x.dtype)
        x = Norm(cfg).apply({"params": params["norm"]}, ACTIVATIONS[cfg.activation](x))
        logits = multiply(x).astype(jnp.float32)
        return logits + params["bias"] if cfg.bias else logits

    return head


def init_linear(cfg: TransformerConfig, key: jax.Array, outputs: int) -> dict:
    """`{kernel [width, outputs], bias [outputs]}`, float32."""
    return {"kernel": initialiser(cfg, cfg.width, outputs)(key, (cfg.width, outputs), jnp.float32), "bias": jnp.zeros(outputs)}


def linear(params: dict, hidden: jax.Array) -> jax.Array:
    """`[..., D]` -> `[..., outputs]` float32."""
    return (project(hidden, params["kernel"].astype(hidden.dtype)) + params["bias"].astype(hidden.dtype)).astype(jnp.float32)


def pool(cfg: TransformerConfig, params: dict, hidden: jax.Array) -> jax.Array:
    """One vector `[..., D]` float32 of each sequence `[..., T, D]`, from its first token, which must be in slot 0: rows hold one sequence each."""
    return POOLER_ACTIVATIONS[cfg.pooler_activation](linear(params, hidden[..., 0, :]))
