"""Attention: one signature, a table of kernels.

Which key a query may see is data, not shape: a key counts when it lies in the same segment, not after the query (if causal), and inside the
layer's window. Packed rows, padding, caches and sliding windows are all cases of that.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.config import TransformerConfig


class Tokens(NamedTuple):
    """Where the tokens on one side of attention stand: both int32 `[B, T]`; segment 0 is padding or an empty cache slot."""
    positions: jax.Array
    segments: jax.Array


def mask(queries: Tokens, keys: Tokens, window: jax.Array | None, causal: bool = True) -> jax.Array:
    """Which key each query sees, bool `[B, T, S]`.

    Args:
      queries: `[B, T]` tokens.
      keys: `[B, S]` tokens.
      window: int32 scalar, how many positions back a query sees, itself included (0: all); None: all.
      causal: no later position is seen; else as far ahead as back.
    """
    distance = queries.positions[:, :, None] - keys.positions[:, None, :]
    seen = queries.segments[:, :, None] == keys.segments[:, None, :]
    seen, distance = (seen & (distance >= 0), distance) if causal else (seen, jnp.abs(distance))
    return seen if window is None else seen & ((distance < window) | (window == 0))


def reference(q_BTNH, k_BSKH, v_BSKH, queries: Tokens, keys: Tokens, *, window=None, causal: bool = True, softcap: float = 0.0,
              scale: float, bias_BNTS=None, dropout: float = 0.0, key: jax.Array | None = None) -> jax.Array:
    """Plain attention, softmax in float32. Query heads `N` share `K` key heads, `N / K` neighbours each (Ainslie et al. 2023). A bias is added
    to the scores. With a `key`, a share `dropout` of the probabilities is set to 0 and the others grow by as much, as in BERT."""
    b, t, n, h = q_BTNH.shape
    k = k_BSKH.shape[2]
    q_BTKGH = (q_BTNH * scale).reshape(b, t, k, n // k, h)
    scores = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    if bias_BNTS is not None:
        scores = scores + bias_BNTS.reshape(-1, k, n // k, *scores.shape[-2:]).astype(jnp.float32)
    # A finite floor: a query that sees nothing (padding against an empty cache) gets the mean, not NaN; nothing reads it.
    scores = jnp.where(mask(queries, keys, window, causal)[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1)
    if key is not None and dropout:
        weights = jnp.where(jax.random.bernoulli(key, 1 - dropout, weights.shape), weights / (1 - dropout), 0)
    weights = weights.astype(v_BSKH.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v_BSKH).reshape(b, t, n, h)


def blocked(q_BTNH, k_BSKH, v_BSKH, queries: Tokens, keys: Tokens, *, block: int = 128, window=None, causal: bool = True, softcap: float = 0.0,
            scale: float) -> jax.Array:
    """`reference` by blocks of queries, each against the keys up to its own end: skips the half that causality hides, and keeps no probabilities: the
    backward pass computes them again from the logarithm of their sum (Dao et al. 2022).

    Right only for causal attention where slot order is time order within each segment (training rows; not a cache), which `choose` sees to.
    """
    assert causal
    window = jnp.int32(0) if window is None else window
    return _blocked(block, softcap, q_BTNH * scale, k_BSKH, v_BSKH, queries, keys, window)


# Scores lie as [S, T] in here, keys by queries: so all six products are plain ones for XLA:CPU, which else copies probabilities to turn them round, and the
# softmax goes down columns, which is vectorised. G query heads share one of K key heads.

def _block_scores(softcap: float, q_BtKGH, k_BKSH, queries: Tokens, keys: Tokens, window) -> jax.Array:
    scores = jnp.einsum("bksh,bkhgt->bksgt", k_BKSH, jnp.transpose(q_BtKGH, (0, 2, 4, 3, 1)), preferred_element_type=jnp.float32)
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    seen_BSt = jnp.swapaxes(mask(queries, keys, window), 1, 2)
    return jnp.where(seen_BSt[:, None, :, None], scores, jnp.finfo(jnp.float32).min)


def _blocks(block: int, q_BTNH, k_BSKH, queries: Tokens, keys: Tokens):
    """Of each block of queries: where it begins and ends, its queries `[B, t, K, G, H]`, their tokens and those of the keys up to its end."""
    b, t, n, h = q_BTNH.shape
    q_BTKGH = q_BTNH.reshape(b, t, k_BSKH.shape[2], n // k_BSKH.shape[2], h)
    for start in range(0, t, block):
        end = min(start + block, t)
        cut = lambda tree, start, end=end: jax.tree.map(lambda leaf: leaf[:, start:end], tree)
        yield start, end, q_BTKGH[:, start:end], cut(queries, start), cut(keys, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blocked(block, softcap, q_BTNH, k_BSKH, v_BSKH, queries, keys, window) -> jax.Array:
    return _blocked_forward(block, softcap, q_BTNH, k_BSKH, v_BSKH, queries, keys, window)[0]


def _blocked_forward(block, softcap, q_BTNH, k_BSKH, v_BSKH, queries, keys, window):
    k_BKSH, v_BKHS, outs, logs = jnp.swapaxes(k_BSKH, 1, 2), jnp.transpose(v_BSKH, (0, 2, 3, 1)), [], []
    for _, end, q_BtKGH, some, before in _blocks(block, q_BTNH, k_BSKH, queries, keys):
        scores = _block_scores(softcap, q_BtKGH, k_BKSH[:, :, :end], some, before, window)
        top = scores.max(2, keepdims=True)
        weights = jnp.exp(scores - top)
        total = weights.sum(2, keepdims=True)
        out = jnp.einsum("bkhs,bksgt->bkhgt", v_BKHS[..., :end], weights.astype(v_BSKH.dtype), preferred_element_type=jnp.float32) / total
        outs.append(jnp.transpose(out, (0, 4, 1, 3, 2)).astype(v_BSKH.dtype))
        logs.append(top + jnp.log(total))
    out_BTNH = jnp.concatenate(outs, 1).reshape(q_BTNH.shape)
    return out_BTNH, (q_BTNH, k_BSKH, v_BSKH, queries, keys, window, out_BTNH, jnp.concatenate(logs, -1))


def _blocked_backward(block, softcap, kept, g_BTNH):
    q_BTNH, k_BSKH, v_BSKH, queries, keys, window, out_BTNH, logs = kept
    k_BKSH, v_BKSH = jnp.swapaxes(k_BSKH, 1, 2), jnp.swapaxes(v_BSKH, 1, 2)
    k_BKHS = jnp.transpose(k_BSKH, (0, 2, 3, 1))
    shape = (*q_BTNH.shape[:2], *k_BKSH.shape[1:2], -1, q_BTNH.shape[-1])
    g_BTKGH = g_BTNH.reshape(shape)
    within_BKGT = jnp.transpose((g_BTKGH.astype(jnp.float32) * out_BTNH.reshape(shape)).sum(-1), (0, 2, 3, 1))
    dq, dk, dv = [], 0.0, 0.0
    for start, end, q_BtKGH, some, before in _blocks(block, q_BTNH, k_BSKH, queries, keys):
        scores = _block_scores(softcap, q_BtKGH, k_BKSH[:, :, :end], some, before, window)
        weights = jnp.exp(scores - logs[..., start:end])
        g_BtKGH = g_BTKGH[:, start:end]
        d_weights = jnp.einsum("bksh,bkhgt->bksgt", v_BKSH[:, :, :end], jnp.transpose(g_BtKGH, (0, 2, 4, 3, 1)), preferred_element_type=jnp.float32)
        d_scores = weights * (d_weights - within_BKGT[:, :, None, :, start:end])
        if softcap:
            d_scores = d_scores * (1 - jnp.square(jnp.where(weights > 0, scores, 0) / softcap))
        d_scores, weights = d_scores.astype(q_BTNH.dtype), weights.astype(v_BSKH.dtype)
        rest = ((0, 0), (0, 0), (0, k_BKSH.shape[2] - end), (0, 0))
        back = lambda a_BKSGt, b_BtKGH: jnp.pad(jnp.einsum("bksgt,bkgth->bksh", a_BKSGt, jnp.transpose(b_BtKGH, (0, 2, 3, 1, 4)),
                                                           preferred_element_type=jnp.float32), rest)
        dv, dk = dv + back(weights, g_BtKGH), dk + back(d_scores, q_BtKGH)
        dq.append(jnp.transpose(jnp.einsum("bkhs,bksgt->bkhgt", k_BKHS[..., :end], d_scores), (0, 4, 1, 3, 2)))
    dk, dv = (jnp.swapaxes(a, 1, 2).astype(like.dtype) for a, like in ((dk, k_BSKH), (dv, v_BSKH)))
    return jnp.concatenate(dq, 1).reshape(q_BTNH.shape), dk, dv, None, None, None


_blocked.defvjp(_blocked_forward, _blocked_backward)


def dot_product(q_BTNH, k_BSKH, v_BSKH, queries: Tokens, keys: Tokens, *, window=None, causal: bool = True, softcap: float = 0.0, scale: float,
                implementation: str) -> jax.Array:
    """`jax.nn.dot_product_attention`: with "cudnn" the fused kernel of NVIDIA's library, which skips what causality hides. No soft-cap.

    Like `blocked` it needs slot order to be time order in each segment. The library knows no segments: they are a mask `[B, 1, T, S]` that it reads for
    every head, unless all rows of a batch hold one document each, which is looked up at run time.
    """
    assert not softcap
    attend = functools.partial(jax.nn.dot_product_attention, scale=scale, is_causal=causal, implementation=implementation)
    masked = lambda q, k, v: attend(q, k, v, mask=mask(queries, keys, window, causal)[:, None])
    if window is not None:
        return masked(q_BTNH, k_BSKH, v_BSKH)
    whole = (queries.segments == keys.segments[:, :1]).all() & (keys.segments == keys.segments[:, :1]).all()
    return jax.lax.cond(whole, attend, masked, q_BTNH, k_BSKH, v_BSKH)


def splash(q_BTNH, k_BSKH, v_BSKH, queries: Tokens, keys: Tokens, *, window=None, windows: Sequence[int] = (0,), causal: bool = True, softcap: float = 0.0,
           scale: float, interpret: bool = False) -> jax.Array:
    """Splash attention, jax's Pallas kernel for TPUs: nothing is computed for blocks that causality, the window or the packing hide.

    Like `blocked` it needs slot order to be time order in each segment.

    Args:
      windows: the sizes that `window` may have: each is a program of its own, since the kernel must know them when it is compiled.
      interpret: run it on any device, slowly.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    assert causal
    heads, length = q_BTNH.shape[2], q_BTNH.shape[1]
    # Heads of a multiple of 128: TPUs lay out others in as many lanes anyway, so that zeros cost no memory.
    fill = -q_BTNH.shape[3] % 128
    order = lambda a: jnp.moveaxis(jnp.pad(a, ((0, 0), (0, 0), (0, 0), (0, fill))), 2, 1)

    def of(size: int):
        shape = (length, length)
        one = masks.LocalMask(shape, (size - 1, 0), 0) if size else masks.CausalMask(shape)
        wide, block = math.gcd(length, 1024 if q_BTNH.shape[3] <= 128 else 512), math.gcd(length, 512)
        # One kernel for the whole backward pass (5 matrix products in place of 7) adds up the gradients of the queries outside of itself, over blocks of keys.
        one_block = length == wide
        back = {} if one_block else {"block_q_dq": wide, "block_kv_dq": wide}
        blocks = kernels.BlockSizes(block_q=wide, block_kv=wide, block_kv_compute=block, block_q_dkv=wide, block_kv_dkv=wide, block_kv_dkv_compute=block,
                                    use_fused_bwd_kernel=one_block, **back)
        run = kernels.make_splash_mha(masks.MultiHeadMask([one] * heads), head_shards=1, q_seq_shards=1, block_sizes=blocks,
                                      attn_logits_soft_cap=softcap or None, residual_checkpoint_name=SAVED, interpret=interpret)
        row = lambda q, k, v, a, b: run(q, k, v, segment_ids=kernels.SegmentIds(a, b))
        return lambda q, k, v: jax.vmap(row)(order(q * scale), order(k), order(v), queries.segments, keys.segments)

    if window is None or len(windows) == 1:
        out = of(0 if window is None else windows[0])(q_BTNH, k_BSKH, v_BSKH)
    else:
        number = jnp.argmax(jnp.array(windows) == window)
        out = jax.lax.switch(number, [of(size) for size in windows], q_BTNH, k_BSKH, v_BSKH)
    return jnp.moveaxis(out, 1, 2)[..., :q_BTNH.shape[3]].astype(q_BTNH.dtype)


SAVED = "attention"  # the name under which rematerialisation may keep a kernel's results, so that it does not run again

KERNELS: dict[str, Callable[..., jax.Array]] = {
    "reference": reference, "blocked": blocked, "xla": functools.partial(dot_product, implementation="xla"),
    "cudnn": functools.partial(dot_product, implementation="cudnn"), "splash": splash,
}


def _fuses() -> bool:
    """Whether the GPU here, if there is one, is one that cuDNN's fused attention knows: others, of AMD too, have no such number."""
    capability = str(getattr(jax.devices()[0], "compute_capability", "8.0"))
    return capability.partition(".")[0].isdigit() and int(capability.partition(".")[0]) >= 8


def choose(cfg: TransformerConfig, length: int, platform: str) -> str:
    """The kernel for training rows of `length` tokens on a "cpu", "gpu" or "tpu": the one `cfg.attention` names, or for "auto" the one for the platform
    which can do what the model needs: blocked on CPUs (see tools/bench.py), splash on TPUs, cudnn on GPUs, else reference.

    Raises:
      ValueError: one line: a forced kernel that cannot.
    """
    size = cfg.head_size or cfg.width // cfg.heads
    obstacles = {
        "reference": "",
        "blocked": "" if cfg.causal else "is for causal models",
        "xla": "has no soft-cap" if cfg.attention_softcap else "",
        "cudnn": ("runs on NVIDIA GPUs" if platform != "gpu" else "needs a GPU of compute capability 8 (A100) or newer" if not _fuses() else
                  "has no soft-cap" if cfg.attention_softcap else
                  "computes in bfloat16: set model.dtype=bfloat16" if cfg.dtype != "bfloat16" else
                  f"needs a head size that is a multiple of 8 and at most 128, not {size}" if size % 8 or size > 128 else ""),
        "splash": ("runs on TPUs" if platform != "tpu" else "is for causal models" if not cfg.causal else
                   f"needs rows of a multiple of 128 tokens, not {length}" if length % 128
                   else ""),
    }
    if cfg.positions == "relative":
        obstacles = {name: "adds no bias to the scores, which relative positions are" if name != "reference" else "" for name in obstacles}
    if cfg.attention == "auto":
        first = {"cpu": "blocked", "tpu": "splash", "gpu": "cudnn"}.get(platform, "reference")
        return "reference" if obstacles[first] else first
    if obstacles[cfg.attention]:
        able = [name for name, obstacle in obstacles.items() if not obstacle]
        raise ValueError(f"model.attention={cfg.attention} {obstacles[cfg.attention]}; here auto, {', '.join(able)} work")
    return cfg.attention
