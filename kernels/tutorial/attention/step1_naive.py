"""Step 1, naive: one program per head, its whole score matrix on the chip.

Math      s = scale q k^T, -inf where masked;  p = exp(s - max s);  o = p v / sum p
Tiling    grid (B, H). A head is one tile, and none is skipped:

              keys ->      S
              T queries    ▞      ▞ computed, then masked

State     none: a program processes one head.
Traffic   q and o once per query head, k and v once per key head: the heads of a group follow each other, and Pallas
          fetches a block only when its index changes. This is the minimum; without a kernel the T S scores would be
          written and read as well. 4 D FLOPs per pair, T S pairs, masked or not; the chip holds T S scores.
Limits    float32, bfloat16; float16 only interpreted. Any T, S, H, K, D whose T S scores fit; compiled, the program is
          unrolled over them and grows with T S. Causal, window, scale; NotImplementedError: gate, softcap, segment_ids.
          ValueError: other shapes and dtypes.
Source    Vaswani et al., Attention Is All You Need (arXiv:1706.03762), equation 1.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from dantinox.kernels.tutorial.attention.common import M_INIT, NN, NT, Mask, call_options, check, dot, heads_first, iota

Array = jax.Array


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    **unsupported: None,
) -> Array:
    """[B, T, H, D], as `dantinox.kernels.attention`: q [B, T, H, D], k and v [B, S, K, D]."""
    mask, scale = check(q, k, v, causal, window, scale, **unsupported)
    B, T, H, D = q.shape
    S, K = k.shape[1:3]
    if 0 in (q.size, k.size):
        return jnp.zeros_like(q)
    # None: the kernel does not see this axis; each step takes one index of it. Query head h uses key head h // G.
    q_spec = pl.BlockSpec((None, None, T, D), lambda b, h: (b, h, 0, 0))
    kv_spec = pl.BlockSpec((None, None, S, D), lambda b, h: (b, h // (H // K), 0, 0))
    kernel = pl.pallas_call(
        functools.partial(_kernel, mask=mask, scale=scale),
        out_shape=jax.ShapeDtypeStruct((B, H, T, D), q.dtype),
        grid=(B, H),
        in_specs=[q_spec, kv_spec, kv_spec],
        out_specs=q_spec,
        name="naive",
        **call_options(),
    )
    return heads_first(kernel(heads_first(q), heads_first(k), heads_first(v)))


def _kernel(q_ref: Any, k_ref: Any, v_ref: Any, o_ref: Any, *, mask: Mask, scale: float) -> None:
    s = dot(q_ref[...], k_ref[...], NT) * scale  # [T, S]
    query = mask.S - mask.T + iota(s.shape, 0)
    s = mask.apply(s, query, iota(s.shape, 1))
    m = jnp.maximum(jnp.max(s, axis=1, keepdims=True), M_INIT)
    p = jnp.exp(s - m)
    l = jnp.sum(p, axis=1, keepdims=True)
    o = dot(p.astype(v_ref.dtype), mask.zero_unseen(v_ref[...], 0), NN)
    o_ref[...] = (o / jnp.where(l == 0, 1, l)).astype(o_ref.dtype)  # l is 0 where a query sees no key
