"""Rung 1, naive: one program a head, its whole score matrix on the chip.

Math      s = scale q k^T, -inf where hidden;  p = exp(s - max s);  o = p v / sum p
Tiling    grid (B, H). A head is one tile, and none is skipped:

              keys ->      S
              T queries    ▞      ▞ computed, then masked

State     none: a program begins and ends with its head.
Traffic   q and o once a query head, k and v once a key head: the heads of a group follow each other, and Pallas fetches
          a block only when its index changes. Nothing can move less; without a kernel the T S scores would be written
          and read as well. 4 D FLOPs for each of the T S pairs, hidden ones like others; the chip holds T S scores.
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
from jax.experimental.pallas import tpu as pltpu

from dantinox.kernels.tutorial.common import FLOOR, NN, NT, VMEM_BYTES, Mask, check, dot, heads_first, interpreted, iota

Array = jax.Array


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    **absent: None,
) -> Array:
    """[B, T, H, D], as `dantinox.kernels.attention`: q [B, T, H, D], k and v [B, S, K, D]."""
    mask, scale = check(q, k, v, causal, window, scale, **absent)
    B, T, H, D = q.shape
    S, K = k.shape[1:3]
    if 0 in (q.size, k.size):
        return jnp.zeros_like(q)
    # None: an axis that the kernel does not see, one step of the grid along it. Query head h has key head h // G.
    queries = pl.BlockSpec((None, None, T, D), lambda b, h: (b, h, 0, 0))
    keys = pl.BlockSpec((None, None, S, D), lambda b, h: (b, h // (H // K), 0, 0))
    run = pl.pallas_call(
        functools.partial(_kernel, mask=mask, scale=scale),
        out_shape=jax.ShapeDtypeStruct((B, H, T, D), q.dtype),
        grid=(B, H),
        in_specs=[queries, keys, keys],
        out_specs=queries,
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=VMEM_BYTES),
        interpret=interpreted(),
        name="naive",
    )
    return heads_first(run(heads_first(q), heads_first(k), heads_first(v)))


def _kernel(q_ref: Any, k_ref: Any, v_ref: Any, o_ref: Any, *, mask: Mask, scale: float) -> None:
    s = dot(q_ref[...], k_ref[...], NT) * scale  # [T, S]
    query = mask.S - mask.T + iota(s.shape, 0)
    s = mask.hide(s, query, iota(s.shape, 1))
    m = jnp.maximum(jnp.max(s, axis=1, keepdims=True), FLOOR)
    p = jnp.exp(s - m)
    l = jnp.sum(p, axis=1, keepdims=True)
    o = dot(p.astype(v_ref.dtype), mask.clear(v_ref[...], 0), NN)
    o_ref[...] = (o / jnp.where(l == 0, 1, l)).astype(o_ref.dtype)  # l is 0 where no key is seen
