"""Step 5, 8-bit cache: int8 keys and values, and one scale per vector, which multiplies scores and weights.

Math      as step 4 with k = k8 k_scale and v = v8 v_scale, but no vector is dequantized:
          s = scale k_scale (q k8^T), -inf where not visible;  p as before;  acc = exp(m - m') acc + (p v_scale) v8
Tiling    grid (B, most blocks of a sequence), as step 4. A block has values and scales, and so has the tile that
          receives the new token, which XLA quantizes before the kernel starts:

              slots ->      block  block  block  block
              sequence 0      n      ░      ░      ▞      ▞ loaded, computed, then masked; n has the new token too
              sequence 1      ░      ▞      n      ░
                                          ▒█▒▒            written back: 32 slots of values, 128 slots of scales

State     m and l [K, G, 1] and acc [K, G, D] in float32, from the first block of a sequence to its last.
Traffic   D + 4 bytes per vector instead of 2 D (bfloat16) or 4 D (float32). A scale costs one product per score and
          one per weight; dequantizing the vectors would cost D / G times as many.
Limits    q float32, bfloat16; float16 only interpreted. An int8 cache; any B, H, K, D, C, length. Window, scale;
          NotImplementedError: gate, softcap, other caches. ValueError: other shapes; a block not divisible by 128.
Source    Hooper et al., KVQuant (arXiv:2401.18079); Liu et al., KIVI (arXiv:2402.02750): values per token, as here.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dantinox.kernels.ops.decode_attention.kv_cache import KVCache, append_token, quantize
from dantinox.kernels.tutorial.decode_attention.common import LANES, NN, NT, TILE_BYTES, check, dot, interpret, iota
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
    ring, scale = check(q, k, v, cache, window, scale, block, eight_bits=True, **unsupported)
    (B, H, D), K = q.shape, k.shape[1]
    if 0 in q.shape:
        return jnp.zeros_like(q), append_token(cache, k, v)
    tables = (*ring.newest(cache.length), *visible_blocks(ring, cache.length))
    token = [x[:, :, None] for x in (*quantize(k, jnp.int8), *quantize(v, jnp.int8))]  # [B, K, 1, D] and [B, K, 1]
    ring_buffers = (cache.k, cache.k_scale, cache.v, cache.v_scale)
    tiles = [block] * 4 if interpret() else [TILE_BYTES, LANES] * 2

    def spec(x: Array, slots: int, index: Any = lambda b, j, *tables: 0) -> pl.BlockSpec:
        return pl.BlockSpec((None, K, slots, *x.shape[3:]), lambda b, *n: (b, 0, index(b, *n), 0)[: x.ndim])

    q_heads = q.reshape(B, K, H // K, D)
    in_specs = [spec(q_heads, H // K), *(spec(x, 1) for x in token)]
    in_specs += [spec(x, block, lambda b, j, *tables: block_of_step(ring, b, j, *tables[2:])) for x in ring_buffers]
    out_specs = [spec(q_heads, H // K)]
    out_specs += [spec(x, n, lambda b, j, *tables, n=n: tables[0][b] // n) for x, n in zip(ring_buffers, tiles)]
    kernel = pl.pallas_call(
        functools.partial(_kernel, ring=ring, scale=scale),
        out_shape=[jax.ShapeDtypeStruct(q_heads.shape, q.dtype), *(jax.typeof(x) for x in ring_buffers)],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(tables),
            grid=(B, max_blocks(ring)),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=[pltpu.VMEM((K, H // K, n), jnp.float32) for n in (1, 1, D)],
        ),
        input_output_aliases={len(tables) + 5 + n: 1 + n for n in range(4)},  # input: output
        interpret=interpret(),
        name="eight_bit_cache",
    )
    o, *new = kernel(*tables, q_heads, *token, *ring_buffers)
    return o.reshape(B, H, D), KVCache(new[0], new[2], cache.length + 1, new[1], new[3])


def _kernel(newest_ref, num_visible_ref, first_ref, count_ref, q_ref, *refs, ring, scale):
    token, cache, o_ref, outputs, (m_ref, l_ref, acc_ref) = refs[:4], refs[4:8], refs[8], refs[9:13], refs[13:]
    (new_k_ref, new_ks_ref, new_v_ref, new_vs_ref), (k_ref, ks_ref, v_ref, vs_ref) = token, cache
    b, j = pl.program_id(0), pl.program_id(1)
    start = block_of_step(ring, b, j, first_ref, count_ref) * ring.block
    newest, dtype = newest_ref[b], q_ref.dtype

    @pl.when(j == 0)
    def init_state() -> None:
        m_ref[...] = dot(q_ref[...], new_k_ref[...].astype(dtype), NT) * (scale * new_ks_ref[...][:, None])
        l_ref[...] = jnp.ones(l_ref.shape, jnp.float32)
        acc_ref[...] = jnp.broadcast_to(new_v_ref[...].astype(jnp.float32) * new_vs_ref[...][:, None], acc_ref.shape)

    @pl.when(j < count_ref[b])
    def process_block() -> None:
        visible = ring.is_visible(start + iota((1, 1, ring.block), 2), newest, num_visible_ref[b], min_age=1)
        s = dot(q_ref[...], k_ref[...].astype(dtype), NT) * (scale * ks_ref[...][:, None])  # [K, G, block]
        s = jnp.where(visible, s, -jnp.inf)
        m = jnp.maximum(jnp.max(s, axis=2, keepdims=True), m_ref[...])
        p = jnp.exp(s - m)
        decay = jnp.exp(m_ref[...] - m)  # rescales what was accumulated under a smaller maximum
        m_ref[...] = m
        l_ref[...] = decay * l_ref[...] + jnp.sum(p, axis=2, keepdims=True)
        p = p * jnp.where(visible, vs_ref[...][:, None], 0)  # a scale may be NaN where unused, an int8 value cannot
        acc_ref[...] = decay * acc_ref[...] + dot(p.astype(dtype), v_ref[...].astype(dtype), NN)

    @pl.when((j < count_ref[b]) & (start == newest // ring.block * ring.block))
    def append() -> None:
        for new_ref, ref, out_ref in zip(token, cache, outputs):
            tile = out_ref.shape[1]
            offset = pl.multiple_of(newest % ring.block // tile * tile, tile)
            is_new = start + offset + iota((1, tile, 1)[: len(out_ref.shape)], 1) == newest
            out_ref[...] = jnp.where(is_new, new_ref[...], ref[:, pl.ds(offset, tile)])

    @pl.when(j == pl.num_programs(1) - 1)
    def epilogue() -> None:
        o_ref[...] = (acc_ref[...] / l_ref[...]).astype(o_ref.dtype)
