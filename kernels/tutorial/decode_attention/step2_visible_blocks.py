"""Step 2, visible blocks only: the grid stops at the last block that holds a token.

Math      as step 1, over those blocks alone: exp of a masked score is 0
Tiling    grid (B, blocks of C). The lengths are in scalar memory before the kernel starts (scalar prefetch), so the
          index map can read them:

              slots ->      block  block  block  block
              sequence 0      ▞      ▞      ▞      ▞      ▞ loaded, computed, then masked; n has the new token too
              sequence 1      n      ░      ░      ░      ░ a grid step that neither loads nor computes

State     m and l [K, G, 1] and acc [K, G, D] in float32, from the first block of a sequence to its last.
Traffic   min(length + 1, C) slots of k and v, rounded up to a block: the index of a skipped step is that of the step
          before it, and Pallas fetches a block only when its index changes. XLA appends, as in step 1.
Limits    float32, bfloat16; float16 only interpreted. Any B, H, K, D, C, length. Window, scale; NotImplementedError:
          gate, softcap, a cache of another dtype than q. ValueError: other shapes; a block not divisible by 16.
Source    Pallas: scalar prefetch (PrefetchScalarGridSpec).
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dantinox.kernels.ops.decode_attention.kv_cache import KVCache, append_token
from dantinox.kernels.tutorial.decode_attention.common import M_INIT, NN, NT, check, dot, interpret, iota

Array = jax.Array


def decode_attention(
    q: Array,
    k: Array,
    v: Array,
    cache: KVCache,
    *,
    window: int | None = None,
    scale: float | None = None,
    block: int = 256,
    **unsupported: None,
) -> tuple[Array, KVCache]:
    """(o [B, H, D], the new cache), as `dantinox.kernels.decode_attention`: q [B, H, D], k and v [B, K, D]."""
    ring, scale = check(q, k, v, cache, window, scale, block, **unsupported)
    (B, H, D), K = q.shape, k.shape[1]
    last = jnp.minimum(cache.length, ring.C - 1) // block  # a full ring buffer has no unused slot
    tables = (*ring.newest(cache.length), last)
    cache = append_token(cache, k, v)
    if 0 in q.shape:
        return jnp.zeros_like(q), cache
    # An index map also takes the prefetched tables. Past the last block it repeats that block: nothing is loaded.
    q_spec = pl.BlockSpec((None, K, H // K, D), lambda b, j, *tables: (b, 0, 0, 0))
    kv_spec = pl.BlockSpec((None, K, block, D), lambda b, j, *tables: (b, 0, jnp.minimum(j, tables[2][b]), 0))
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(tables),
        grid=(B, ring.num_blocks),
        in_specs=[q_spec, kv_spec, kv_spec],
        out_specs=q_spec,
        scratch_shapes=[pltpu.VMEM((K, H // K, n), jnp.float32) for n in (1, 1, D)],
    )
    kernel = pl.pallas_call(
        functools.partial(_kernel, ring=ring, scale=scale),
        out_shape=jax.ShapeDtypeStruct((B, K, H // K, D), q.dtype),
        grid_spec=grid_spec,
        interpret=interpret(),
        name="visible_blocks",
    )
    o = kernel(*tables, q.reshape(B, K, H // K, D), cache.k, cache.v)
    return o.reshape(B, H, D), cache


def _kernel(newest_ref, num_visible_ref, last_ref, q_ref, k_ref, v_ref, o_ref, m_ref, l_ref, acc_ref, *, ring, scale):
    b, j = pl.program_id(0), pl.program_id(1)

    @pl.when(j == 0)
    def init_state() -> None:
        m_ref[...] = jnp.full(m_ref.shape, M_INIT, jnp.float32)
        l_ref[...] = jnp.zeros(l_ref.shape, jnp.float32)
        acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)

    def visible(shape: tuple[int, ...], axis: int) -> Array:
        return ring.is_visible(j * ring.block + iota(shape, axis), newest_ref[b], num_visible_ref[b])

    @pl.when(j <= last_ref[b])
    def process_block() -> None:
        s = dot(q_ref[...], k_ref[...], NT) * scale  # [K, G, block]
        s = jnp.where(visible((1, 1, ring.block), 2), s, -jnp.inf)
        m = jnp.maximum(jnp.max(s, axis=2, keepdims=True), m_ref[...])
        p = jnp.exp(s - m)
        decay = jnp.exp(m_ref[...] - m)  # rescales what was accumulated under a smaller maximum
        m_ref[...] = m
        l_ref[...] = decay * l_ref[...] + jnp.sum(p, axis=2, keepdims=True)
        v = jnp.where(visible((1, ring.block, 1), 1), v_ref[...], 0)  # unused slots may hold NaN, and 0 * NaN is NaN
        acc_ref[...] = decay * acc_ref[...] + dot(p.astype(v.dtype), v, NN)

    @pl.when(j == pl.num_programs(1) - 1)
    def epilogue() -> None:
        o_ref[...] = (acc_ref[...] / l_ref[...]).astype(o_ref.dtype)  # l > 0: a query sees its own token
