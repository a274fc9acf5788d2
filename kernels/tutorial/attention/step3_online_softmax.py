"""Step 3, online softmax: one tile of keys at a time. Two numbers per row hold the state of its softmax.

Math      for each tile of keys:  s = scale q k^T, -inf where masked;  m' = max(m, max s);  p = exp(s - m')
          l = exp(m - m') l + sum p;  acc = exp(m - m') acc + p v;  m = m';      at the end o = acc / l
Tiling    grid (B, H, tiles of T, tiles of S), the key tiles of a query tile in sequence, none skipped:

              keys ->     k_tile k_tile k_tile
              q_tile        ▞      ▞      ▞
              q_tile        ▞      ▞      ▞      ▞ computed, then masked
              q_tile        ▞      ▞      ▞

State     m and l [q_tile, 1] and acc [q_tile, D] in float32, from the first key tile of a query tile to its last.
Traffic   q and o once per query head, k and v once per query tile: 2 (1 + S / q_tile) T D elements, 2 q_tile FLOPs per
          element of k and v that is fetched. 4 D FLOPs per pair, T S pairs. The chip holds q_tile k_tile scores,
          independent of T and S.
Limits    float32, bfloat16; float16 only interpreted. Any T, S, H, K, D. Causal, window, scale; NotImplementedError:
          gate, softcap, segment_ids. ValueError: other shapes and dtypes; tiles that are not multiples of 16.
Source    Milakov and Gimelshein, Online normalizer calculation for softmax (arXiv:1805.02867); Dao et al.,
          FlashAttention (arXiv:2205.14135).
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

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
    k_tile: int = 256,
    **unsupported: None,
) -> Array:
    """[B, T, H, D], as `dantinox.kernels.attention`: q [B, T, H, D], k and v [B, S, K, D]."""
    tiles = {"q_tile": q_tile, "k_tile": k_tile}
    mask, scale = check(q, k, v, causal, window, scale, tiles, **unsupported)
    B, T, H, D = q.shape
    S, K = k.shape[1:3]
    if 0 in (q.size, k.size):
        return jnp.zeros_like(q)
    # The last tile may reach past T: its extra rows hold arbitrary values, affect no other row and are not written.
    q_spec = pl.BlockSpec((None, None, q_tile, D), lambda b, h, i, j: (b, h, i, 0))
    kv_spec = pl.BlockSpec((None, None, k_tile, D), lambda b, h, i, j: (b, h // (H // K), j, 0))
    kernel = pl.pallas_call(
        functools.partial(_kernel, mask=mask, scale=scale),
        out_shape=jax.ShapeDtypeStruct((B, H, T, D), q.dtype),
        grid=(B, H, pl.cdiv(T, q_tile), pl.cdiv(S, k_tile)),
        in_specs=[q_spec, kv_spec, kv_spec],
        out_specs=q_spec,
        scratch_shapes=[pltpu.VMEM((q_tile, n), jnp.float32) for n in (1, 1, D)],
        name="online_softmax",
        **call_options(),
    )
    return heads_first(kernel(heads_first(q), heads_first(k), heads_first(v)))


def _kernel(q_ref, k_ref, v_ref, o_ref, m_ref, l_ref, acc_ref, *, mask: Mask, scale: float) -> None:
    i, j = pl.program_id(2), pl.program_id(3)

    @pl.when(j == 0)
    def init_state() -> None:
        m_ref[...] = jnp.full(m_ref.shape, M_INIT, jnp.float32)
        l_ref[...] = jnp.zeros(l_ref.shape, jnp.float32)
        acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)

    s = dot(q_ref[...], k_ref[...], NT) * scale  # [q_tile, k_tile]
    query = mask.S - mask.T + i * s.shape[0] + iota(s.shape, 0)
    s = mask.apply(s, query, j * s.shape[1] + iota(s.shape, 1))
    m = jnp.maximum(jnp.max(s, axis=1, keepdims=True), m_ref[...])
    p = jnp.exp(s - m)
    decay = jnp.exp(m_ref[...] - m)  # rescales what was accumulated under a smaller maximum
    m_ref[...] = m
    l_ref[...] = decay * l_ref[...] + jnp.sum(p, axis=1, keepdims=True)
    v = mask.zero_unseen(v_ref[...], j * s.shape[1])
    acc_ref[...] = decay * acc_ref[...] + dot(p.astype(v.dtype), v, NN)

    @pl.when(j == pl.num_programs(3) - 1)
    def epilogue() -> None:
        l = l_ref[...]
        o_ref[...] = (acc_ref[...] / jnp.where(l == 0, 1, l)).astype(o_ref.dtype)  # l is 0 where a query sees no key
