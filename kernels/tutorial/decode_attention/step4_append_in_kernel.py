"""Step 4, append in the kernel: it writes the new token into the cache that it reads, one memory tile of it.

Math      as step 3, with the new token first: m = scale q k_new, l = 1, acc = v_new; then all visible slots but its own
Tiling    grid (B, most blocks of a sequence), as step 3. The new cache is a second output, of which a sequence writes
          one tile; `input_output_aliases` says that it is the same memory as the cache that the kernel reads:

              slots ->      block  block  block  block
              sequence 0      n      ░      ░      ▞      ▞ loaded, computed, then masked; n has the new token too
              sequence 1      ░      ▞      n      ░
                                          ▒█▒▒            one tile of n is written back, 8 slots of float32 or 16 of
                                                          bfloat16: █ is the new token, ▒ are slots as loaded

State     m and l [K, G, 1] and acc [K, G, D] in float32, from the first block of a sequence to its last.
Traffic   as step 3, and one tile of k and of v per sequence instead of 2 B kernels of XLA. If the caller donates the
          cache, no byte of it is copied; otherwise, XLA copies it first, because its caller may still read it.
Limits    float32, bfloat16; float16 only interpreted. Any B, H, K, D, C, length. Window, scale; NotImplementedError:
          gate, softcap, a cache of another dtype than q. ValueError: other shapes; a block not divisible by 16.
Source    Pallas: input_output_aliases; the memory tiles of a TPU, 8 x 128 words of 32 bits.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dantinox.kernels.ops.decode_attention.kv_cache import KVCache, append_token
from dantinox.kernels.tutorial.decode_attention.common import NN, NT, TILE_BYTES, check, dot, interpret, iota
from dantinox.kernels.tutorial.decode_attention.step3_ring_buffer import block_of_step, max_blocks, visible_blocks

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
    if 0 in q.shape:
        return jnp.zeros_like(q), append_token(cache, k, v)
    tables = (*ring.newest(cache.length), *visible_blocks(ring, cache.length))
    q_spec, new_spec = (pl.BlockSpec((None, K, n, D), lambda b, j, *tables: (b, 0, 0, 0)) for n in (H // K, 1))
    kv_spec = pl.BlockSpec((None, K, block, D), lambda b, j, *tables: (b, 0, block_of_step(ring, b, j, *tables[2:]), 0))
    # The interpreter pads an input and the output that is aliased to it to whole blocks: they need equal ones there.
    tile = block if interpret() else TILE_BYTES // cache.k.dtype.itemsize
    tile_spec = pl.BlockSpec((None, K, tile, D), lambda b, j, *tables: (b, 0, tables[0][b] // tile, 0))
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(tables),
        grid=(B, max_blocks(ring)),
        in_specs=[q_spec, new_spec, new_spec, kv_spec, kv_spec],
        out_specs=[q_spec, tile_spec, tile_spec],
        scratch_shapes=[pltpu.VMEM((K, H // K, n), jnp.float32) for n in (1, 1, D)],
    )
    shapes = ((B, K, H // K, D), q.dtype), (cache.k.shape, cache.k.dtype), (cache.v.shape, cache.v.dtype)
    first_ring_buffer = len(tables) + 3  # the tables count as inputs
    kernel = pl.pallas_call(
        functools.partial(_kernel, ring=ring, scale=scale),
        out_shape=[jax.ShapeDtypeStruct(*shape) for shape in shapes],
        grid_spec=grid_spec,
        input_output_aliases={first_ring_buffer: 1, first_ring_buffer + 1: 2},  # input: output
        interpret=interpret(),
        name="append_in_kernel",
    )
    o, new_k, new_v = kernel(*tables, q.reshape(B, K, H // K, D), k[:, :, None], v[:, :, None], cache.k, cache.v)
    return o.reshape(B, H, D), cache._replace(k=new_k, v=new_v, length=cache.length + 1)


def _kernel(newest_ref, num_visible_ref, first_ref, count_ref, q_ref, *refs, ring, scale):
    new_k_ref, new_v_ref, k_ref, v_ref, o_ref, out_k_ref, out_v_ref, m_ref, l_ref, acc_ref = refs
    b, j = pl.program_id(0), pl.program_id(1)
    start = block_of_step(ring, b, j, first_ref, count_ref) * ring.block
    newest = newest_ref[b]

    @pl.when(j == 0)
    def init_state() -> None:
        m_ref[...] = dot(q_ref[...], new_k_ref[...], NT) * scale
        l_ref[...] = jnp.ones(l_ref.shape, jnp.float32)
        acc_ref[...] = jnp.broadcast_to(new_v_ref[...].astype(jnp.float32), acc_ref.shape)

    def visible(shape: tuple[int, ...], axis: int) -> Array:
        return ring.is_visible(start + iota(shape, axis), newest, num_visible_ref[b], min_age=1)

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

    @pl.when((j < count_ref[b]) & (start == newest // ring.block * ring.block))
    def append() -> None:  # a TPU writes whole tiles: the other slots of the tile are those that were loaded
        tile = out_k_ref.shape[1]
        offset = pl.multiple_of(newest % ring.block // tile * tile, tile)
        is_new = start + offset + iota((1, tile, 1), 1) == newest
        for new_ref, ref, out_ref in ((new_k_ref, k_ref, out_k_ref), (new_v_ref, v_ref, out_v_ref)):
            out_ref[...] = jnp.where(is_new, new_ref[...], ref[:, pl.ds(offset, tile)])

    @pl.when(j == pl.num_programs(1) - 1)
    def epilogue() -> None:
        o_ref[...] = (acc_ref[...] / l_ref[...]).astype(o_ref.dtype)
