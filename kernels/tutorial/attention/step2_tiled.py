"""Step 2, tiled: one tile of queries at a time, against all keys. A row of scores needs no other row.

Math      s = scale q k^T, -inf where masked;  p = exp(s - max s);  o = p v / sum p
Tiling    grid (B, H, tiles of T). Every row is computed against all keys; nothing is skipped:

              keys ->      S
              q_tile       ▞
              q_tile       ▞      ▞ computed, then masked
              q_tile       ▞

State     none: a program processes one tile. k and v stay on the chip while the head does not change.
Traffic   as step 1, the minimum: the index of k and v does not depend on the tile, so they are not fetched again.
          4 D FLOPs per pair, T S pairs; the chip holds q_tile S scores.
Limits    float32, bfloat16; float16 only interpreted. Any T, S, H, K, D whose keys and q_tile S scores fit: T is no
          longer limited, S is. Causal, window, scale; NotImplementedError: gate, softcap, segment_ids.
          ValueError: other shapes and dtypes; a q_tile that is not a multiple of 16.
Source    Rabe and Staats, Self-attention Does Not Need O(n^2) Memory (arXiv:2112.05682): its loop over queries.
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
    q_tile: int = 256,
    **unsupported: None,
) -> Array:
    """[B, T, H, D], as `dantinox.kernels.attention`: q [B, T, H, D], k and v [B, S, K, D]."""
    tiles = {"q_tile": q_tile}
    mask, scale = check(q, k, v, causal, window, scale, tiles, **unsupported)
    B, T, H, D = q.shape
    S, K = k.shape[1:3]
    if 0 in (q.size, k.size):
        return jnp.zeros_like(q)
    # The last tile may reach past T: its extra rows hold arbitrary values, affect no other row and are not written.
    q_spec = pl.BlockSpec((None, None, q_tile, D), lambda b, h, i: (b, h, i, 0))
    kv_spec = pl.BlockSpec((None, None, S, D), lambda b, h, i: (b, h // (H // K), 0, 0))
    kernel = pl.pallas_call(
        functools.partial(_kernel, mask=mask, scale=scale),
        out_shape=jax.ShapeDtypeStruct((B, H, T, D), q.dtype),
        grid=(B, H, pl.cdiv(T, q_tile)),
        in_specs=[q_spec, kv_spec, kv_spec],
        out_specs=q_spec,
        name="tiled",
        **call_options(),
    )
    return heads_first(kernel(heads_first(q), heads_first(k), heads_first(v)))


def _kernel(q_ref: Any, k_ref: Any, v_ref: Any, o_ref: Any, *, mask: Mask, scale: float) -> None:
    s = dot(q_ref[...], k_ref[...], NT) * scale  # [q_tile, S]
    query = mask.S - mask.T + pl.program_id(2) * s.shape[0] + iota(s.shape, 0)
    s = mask.apply(s, query, iota(s.shape, 1))
    m = jnp.maximum(jnp.max(s, axis=1, keepdims=True), M_INIT)
    p = jnp.exp(s - m)
    l = jnp.sum(p, axis=1, keepdims=True)
    o = dot(p.astype(v_ref.dtype), mask.zero_unseen(v_ref[...], 0), NN)
    o_ref[...] = (o / jnp.where(l == 0, 1, l)).astype(o_ref.dtype)  # l is 0 where a query sees no key
