"""Decode attention in Triton: one kernel appends to the ring buffers and attends in splits, in place.

Math      s = cap(scale q k^T);  p = u exp(s - m);  o = sigmoid(gate) * sum(p v) / sum(p); a sink adds u exp(sink - m)
          to the sum. The power of two u keeps sums of huge values within float32.
Tiling    A program per split, tile of rows, KV head and sequence. The rows are the G query heads of a KV head, times T
          new tokens, filled up to 16 for tensor cores. The tokens that they see, from the oldest in the ring buffer to
          the newest, form tiles of block_kv, of which each split has as many; the last tiles are the new tokens. For
          tiles of 4, a window of 17 and 4 new tokens, which get slots 4 to 7:

              slots ->     0   4   8   12  16  20
              split 0      ░░░░░░░░░░░░████████░░░░                                █ read once
              split 1      ████▒▒▒▒░░░░░░░░░░░░████  and the new tokens in k, v    ▒ written, never read
                                                                                   ░ neither read nor written

State     m, l [rows] and the output [rows, D] in float32 registers; tiles of keys and values in stages of shared
          memory.
Traffic   Reads the visible tokens of each ring buffer once per tile of rows, for any C, q once per split, and writes
          one slot of each ring buffer per new token. With several splits it writes their outputs and two numbers per
          query in float32, which `combine.py` reads: splits * T G * 8 (D + 2) bytes per KV head, most of them from
          L2. At 8 splits of 1024 tokens, G 4 and D 128, they are 0.8% of what bfloat16 ring buffers hold. 4 D FLOPs
          per query and visible token.
Limits    q in float32 (rounded to TF32, or in three passes where the matmul precision asks for it), bfloat16, float16;
          a ring buffer in any of them, int8 or float8_e4m3fn; D up to 256, filled up to a power of two in registers;
          any C, T and G. The scaled scores of float32 and bfloat16 operands have to fit float32. No gradient.
          `kernels.decode_attention` raises the ValueErrors.
Source    Dao, Flash-Decoding (2023).

No program depends on another one, in whatever order they run, though all have the ring buffers they write to as
inputs. A query sees at most C - T tokens of the ring buffer: the T slots of the new tokens hold older ones, or none.
So no load, all of which are masked by the number of visible tokens, touches a slot that any program stores to; the new
tokens are read from k and v. The last split of each tile of rows stores a share of them, which no other program has.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from dantinox.kernels.ops.decode_attention.common import QuantizedToken
from dantinox.kernels.ops.decode_attention.kv_cache import KVCache
from dantinox.kernels.ops.decode_attention.triton.common import (
    MIN_FLOAT8_CAPABILITY,
    TritonDecodeConfig,
    as_bytes,
    finish,
    load_vectors,
    store_vectors,
    to_operand,
)
from dantinox.kernels.triton_call import call_triton
from dantinox.kernels.triton_math import LOWEST, round_operand, scale_scores

Array = jax.Array


@triton.jit
def attend(
    acc,
    m,
    l,
    q_tile,
    k,
    v,
    k_scale,
    v_scale,
    tile,
    first,
    count,
    t,
    C: tl.constexpr,
    STRIDE: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,
    T: tl.constexpr,
    D: tl.constexpr,
    D_BLOCK: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    WINDOW: tl.constexpr,
    IN_RING: tl.constexpr,
    SCALED: tl.constexpr,
    FLOAT8: tl.constexpr,
    PRECISION: tl.constexpr,
    SCALE: tl.constexpr,
    UNIT: tl.constexpr,
    CAP: tl.constexpr,
    FACTOR: tl.constexpr,
    BOUND: tl.constexpr,
    CAPPED: tl.constexpr,
):
    """Add one tile of tokens, of the ring buffer or of the new ones, to the output, the maximum and the sum.

    The tokens are `count`, of which the first is in slot `first` of C; query t sees those less than WINDOW before it.
    """
    DTYPE: tl.constexpr = q_tile.dtype
    token = tile * BLOCK_KV + tl.arange(0, BLOCK_KV)
    is_token = token < count
    slot = first + token
    slot = tl.where(slot < C, slot, slot - C).to(tl.int64)
    k_tile = load_vectors(k, slot * STRIDE, is_token, D, D_BLOCK)
    s = tl.dot(q_tile, tl.trans(to_operand(k_tile, DTYPE, FLOAT8, PRECISION)), input_precision=PRECISION)
    if SCALED:
        s *= tl.load(k_scale + slot * SCALE_STRIDE, mask=is_token, other=0.0)[None, :]
    s = scale_scores(s, CAP, FACTOR, BOUND, CAPPED, UNIT=1.0)
    visible = is_token[None, :]
    if T > 1:
        # New tokens come from their own index on, those of the ring buffer before index 0.
        distance = t[:, None] - token[None, :]
        if IN_RING:
            distance += count
        else:
            distance -= first
        visible = visible & (distance >= 0) & (distance < WINDOW)
    new_m = tl.maximum(m, tl.max(tl.where(visible, s, LOWEST), axis=1))
    # The difference is scaled, not the scores, which may overflow with float16 operands.
    p = tl.where(visible, tl.exp((s - new_m[:, None]) * SCALE) * UNIT, 0.0)
    decay = tl.exp((m - new_m) * SCALE)
    l = l * decay + tl.sum(p, axis=1)
    v_tile = load_vectors(v, slot * STRIDE, is_token, D, D_BLOCK)
    if SCALED:
        scale = tl.load(v_scale + slot * SCALE_STRIDE, mask=is_token, other=0.0)
        if tl.float16 == DTYPE:  # weights times scales may be beyond it
            wide = to_operand(v_tile, tl.float32, FLOAT8, "ieee") * scale[:, None]
            v_tile = wide.to(DTYPE)
        else:
            v_tile = to_operand(v_tile, DTYPE, FLOAT8, PRECISION)
            p *= scale[None, :]
    else:
        v_tile = to_operand(v_tile, DTYPE, FLOAT8, PRECISION)
    p = round_operand(p.to(DTYPE), PRECISION)
    acc = tl.dot(p, v_tile, acc * decay[:, None], input_precision=PRECISION)
    return acc, new_m, l


@triton.jit
def split_kernel(
    q,
    new_k,
    new_k_scale,
    new_v,
    new_v_scale,
    length,
    gate,
    sinks,
    cache_k,
    cache_v,
    cache_k_scale,
    cache_v_scale,
    T: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    D_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    BLOCK_NEW: tl.constexpr,
    SHARE: tl.constexpr,
    SHARE_BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
    SCALED: tl.constexpr,
    FLOAT8: tl.constexpr,
    PRECISION: tl.constexpr,
    SCALE: tl.constexpr,
    UNIT: tl.constexpr,
    CAP: tl.constexpr,
    FACTOR: tl.constexpr,
    BOUND: tl.constexpr,
    CAPPED: tl.constexpr,
    GATE_WIDTH: tl.constexpr,
    SINKS: tl.constexpr,
    o,
    stats,
):
    """Attend to one split of the tokens of a sequence, for a tile of the rows of one KV head."""
    G: tl.constexpr = H // K
    ROW_TILES: tl.constexpr = (T * G + ROWS - 1) // ROWS
    split = tl.program_id(0) % SPLITS
    row_tile = tl.program_id(0) // SPLITS % ROW_TILES
    head = tl.program_id(0) // (SPLITS * ROW_TILES) % K
    sequence = (tl.program_id(0) // (SPLITS * ROW_TILES * K)).to(tl.int64)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    t, is_query = row // G, row < T * G
    query = (sequence * T + t) * H + head * G + row % G

    cache_k, cache_v, new_k, new_v = as_bytes(cache_k), as_bytes(cache_v), as_bytes(new_k), as_bytes(new_v)
    ring, new = sequence * K + head, sequence * T * K + head
    cache_k, cache_v = cache_k + ring * C * D, cache_v + ring * C * D
    new_k, new_v = new_k + new * D, new_v + new * D
    if SCALED:
        cache_k_scale, cache_v_scale = cache_k_scale + ring * C, cache_v_scale + ring * C
        new_k_scale, new_v_scale = new_k_scale + new, new_v_scale + new

    first_t = row_tile * ROWS // G
    last_t = tl.minimum(T, ((row_tile + 1) * ROWS - 1) // G + 1) - 1
    old_length = tl.load(length + sequence)
    count = tl.maximum(tl.minimum(tl.minimum(old_length, C - T), WINDOW - 1 - first_t), 0)
    oldest = (old_length - count) % C
    first_new = tl.maximum(first_t - (WINDOW - 1), 0)
    new_count = last_t + 1 - first_new
    ring_tiles = (count + BLOCK_KV - 1) // BLOCK_KV
    tiles = ring_tiles + (new_count + BLOCK_NEW - 1) // BLOCK_NEW
    start, stop = tiles * split // SPLITS, tiles * (split + 1) // SPLITS

    q_tile = round_operand(load_vectors(q, query * D, is_query, D, D_BLOCK), PRECISION)
    acc = tl.zeros((ROWS, D_BLOCK), tl.float32)
    m = tl.full((ROWS,), LOWEST, tl.float32)
    l = tl.zeros((ROWS,), tl.float32)
    for tile in tl.range(start, tl.minimum(stop, ring_tiles)):
        acc, m, l = attend(
            acc, m, l, q_tile, cache_k, cache_v, cache_k_scale, cache_v_scale, tile, oldest, count, t, C, D, 1, T, D,
            D_BLOCK, BLOCK_KV, WINDOW, True, SCALED, FLOAT8, PRECISION, SCALE, UNIT, CAP, FACTOR, BOUND, CAPPED,
        )  # fmt: skip
    for tile in tl.range(tl.maximum(start - ring_tiles, 0), stop - ring_tiles):
        acc, m, l = attend(
            acc, m, l, q_tile, new_k, new_v, new_k_scale, new_v_scale, tile, first_new, new_count, t, T, K * D, K, T, D,
            D_BLOCK, BLOCK_NEW, WINDOW, False, SCALED, FLOAT8, PRECISION, SCALE, UNIT, CAP, FACTOR, BOUND, CAPPED,
        )  # fmt: skip

    if split == SPLITS - 1:
        share = tl.arange(0, SHARE_BLOCK)
        token = row_tile * SHARE + share
        is_token = (share < SHARE) & (token < T)
        slot = old_length % C + token
        slot = tl.where(slot < C, slot, slot - C).to(tl.int64)
        token = token.to(tl.int64)
        stored_k = load_vectors(new_k, token * K * D, is_token, D, D_BLOCK)
        stored_v = load_vectors(new_v, token * K * D, is_token, D, D_BLOCK)
        store_vectors(cache_k, slot * D, stored_k, is_token, D, D_BLOCK)
        store_vectors(cache_v, slot * D, stored_v, is_token, D, D_BLOCK)
        if SCALED:
            tl.store(cache_k_scale + slot, tl.load(new_k_scale + token * K, mask=is_token), mask=is_token)
            tl.store(cache_v_scale + slot, tl.load(new_v_scale + token * K, mask=is_token), mask=is_token)

    if SPLITS == 1:
        finish(
            acc, m, l, query, is_query, gate, sinks, o, H, T * H, D, D_BLOCK, SCALE, UNIT, GATE_WIDTH, SINKS
        )  # fmt: skip
    else:
        queries = tl.num_programs(0).to(tl.int64) // (SPLITS * ROW_TILES) * (T * G)
        part = split * queries + query
        store_vectors(o, part * D, acc, is_query, D, D_BLOCK)
        tl.store(stats + part, m, mask=is_query)
        tl.store(stats + SPLITS * queries + part, l, mask=is_query)


def append_and_attend(
    q: Array,
    tokens: QuantizedToken,
    cache: KVCache,
    gate: Array | None,
    sinks: Array | None,
    config: TritonDecodeConfig,
) -> tuple[Array, Array, KVCache]:
    """Return (o, stats, the updated cache).

    With one split, o is the output [B, T, H, D] in q's dtype and stats has no meaning. Otherwise o is the weighted sums
    of the splits [splits, B, T, H, D], and stats [2, splits, B, T, H] their maxima and their sums of weights, float32.

    Args:
        q: queries [B, T, H, D].
        tokens: the new tokens as the ring buffers store them: k and v [B, T, K, D], scales [B, T, K].
        cache: the cache.
        gate: logits [B, T, H, D] or [B, T, H, 1], or None.
        sinks: logits [B, H] float32, or None.
        config: static parameters.
    """
    sizes, B = config.sizes, q.shape[0]
    splits, share = config.splits(B), triton.cdiv(config.T, config.row_tiles)
    scaled = cache.k_scale is not None
    rings = [jax.new_ref(x) for x in (cache.k, cache.v, cache.k_scale, cache.v_scale) if x is not None]
    shape = q.shape if splits == 1 else (splits, *q.shape)
    stats = (1,) if splits == 1 else (2, splits, *q.shape[:3])
    o, stats = call_triton(
        split_kernel,
        q,
        tokens.k,
        tokens.k_scale if scaled else q,
        tokens.v,
        tokens.v_scale if scaled else q,
        cache.length.astype(jnp.int32),
        q if gate is None else gate,
        q if sinks is None else sinks,
        *(rings if scaled else (*rings, q, q)),
        out_type=(
            jax.ShapeDtypeStruct(shape, q.dtype if splits == 1 else jnp.float32),
            jax.ShapeDtypeStruct(stats, jnp.float32),
        ),
        grid=(B * config.K * config.row_tiles * splits,),
        capability=config.capability,
        num_warps=sizes.num_warps,
        num_stages=sizes.num_stages,
        name="decode_attention",
        T=config.T,
        K=config.K,
        C=config.C,
        ROWS=config.rows,
        BLOCK_KV=sizes.block_kv,
        BLOCK_NEW=min(sizes.block_kv, max(16, triton.next_power_of_2(config.T))),
        SHARE=share,
        SHARE_BLOCK=triton.next_power_of_2(share),
        WINDOW=config.max_visible,
        SCALED=scaled,
        FLOAT8=config.capability >= MIN_FLOAT8_CAPABILITY,
        PRECISION=config.precision,
        **config.row_constants(splits, gate, sinks),
        **config.cap_constants(),
    )
    k, v, *scales = (jax.freeze(ring) for ring in rings)
    return o, stats, KVCache(k, v, cache.length + config.T, *scales)
