"""Step 3, ring buffer: from the oldest visible block to the newest, across the end of the ring buffer.

Math      as step 2: a softmax does not depend on the order of its terms, so the slots are never put in order
Tiling    grid (B, most blocks that hold max_visible tokens in sequence). Two tables say where a sequence starts and in
          how many blocks it is:

              slots ->      block  block  block  block    ▞ loaded, computed, then masked; n has the new token too
              sequence 0      n      ░      ░      ▞      visits 3, 0: the window wraps around
              sequence 1      ░      ▞      n      ░      visits 1, 2; ░ is not loaded

State     m and l [K, G, 1] and acc [K, G, D] in float32, from the first block of a sequence to its last.
Traffic   min(length + 1, C, window) slots of k and v, rounded up to whole blocks at both ends. With a window, neither
          the bytes nor the steps of the grid depend on C. XLA appends, as in step 1.
Limits    float32, bfloat16; float16 only interpreted. Any B, H, K, D, C, length. Window, scale; NotImplementedError:
          gate, softcap, a cache of another dtype than q. ValueError: other shapes; a block not divisible by 16.
Source    Jiang et al., Mistral 7B (arXiv:2310.06825), section 2: a rolling buffer cache for a sliding window.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dantinox.kernels.ops.decode_attention.kv_cache import KVCache, append_token
from dantinox.kernels.tutorial.decode_attention.common import M_INIT, NN, NT, Ring, check, dot, interpret, iota

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
    tables = (*ring.newest(cache.length), *visible_blocks(ring, cache.length))
    cache = append_token(cache, k, v)
    if 0 in q.shape:
        return jnp.zeros_like(q), cache
    # An index map also takes the prefetched tables. Past the last block it repeats that block: nothing is loaded.
    q_spec = pl.BlockSpec((None, K, H // K, D), lambda b, j, *tables: (b, 0, 0, 0))
    kv_spec = pl.BlockSpec((None, K, block, D), lambda b, j, *tables: (b, 0, block_of_step(ring, b, j, *tables[2:]), 0))
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(tables),
        grid=(B, max_blocks(ring)),
        in_specs=[q_spec, kv_spec, kv_spec],
        out_specs=q_spec,
        scratch_shapes=[pltpu.VMEM((K, H // K, n), jnp.float32) for n in (1, 1, D)],
    )
    kernel = pl.pallas_call(
        functools.partial(_kernel, ring=ring, scale=scale),
        out_shape=jax.ShapeDtypeStruct((B, K, H // K, D), q.dtype),
        grid_spec=grid_spec,
        interpret=interpret(),
        name="ring_buffer",
    )
    o = kernel(*tables, q.reshape(B, K, H // K, D), cache.k, cache.v)
    return o.reshape(B, H, D), cache


def max_blocks(ring: Ring) -> int:
    """Most blocks of a sequence. One more than contiguous slots need if the ring buffer ends inside a block."""
    return min(ring.num_blocks, -(-(ring.max_visible - 1) // ring.block) + 1 + (ring.C % ring.block > 0))


def visible_blocks(ring: Ring, length: Array) -> tuple[Array, Array]:
    """(first block, number of blocks) of each sequence [B]."""
    newest, num_visible = ring.newest(length)
    oldest = (newest + 1 - num_visible) % ring.C
    first, last = oldest // ring.block, newest // ring.block
    wrapped = jnp.minimum(ring.num_blocks, ring.num_blocks - first + last + 1)  # both ends may be in one block
    return first, jnp.where(oldest > newest, wrapped, last - first + 1)


def block_of_step(ring: Ring, b: Array, j: Array, first: Array, count: Array) -> Array:
    """The j-th block of sequence b; after its last block, that block again."""
    return (first[b] + jnp.minimum(j, count[b] - 1)) % ring.num_blocks


def _kernel(newest_ref, num_visible_ref, first_ref, count_ref, q_ref, k_ref, v_ref, o_ref, *state, ring, scale):
    m_ref, l_ref, acc_ref = state
    b, j = pl.program_id(0), pl.program_id(1)
    start = block_of_step(ring, b, j, first_ref, count_ref) * ring.block

    @pl.when(j == 0)
    def init_state() -> None:
        m_ref[...] = jnp.full(m_ref.shape, M_INIT, jnp.float32)
        l_ref[...] = jnp.zeros(l_ref.shape, jnp.float32)
        acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)

    def visible(shape: tuple[int, ...], axis: int) -> Array:
        return ring.is_visible(start + iota(shape, axis), newest_ref[b], num_visible_ref[b])

    @pl.when(j < count_ref[b])
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
