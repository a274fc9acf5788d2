"""Attention in Triton, backward: one kernel for dq, one for dk and dv, both without atomics.

Math      p = 2^(s - lse);  dv = p^T do;  dp = do v^T;  ds = p (dp - delta) cap'(s);  dq = scale ds k;
          dk = scale ds^T q.  do is the cotangent of the ungated output; delta [t] = <do[t], o[t]>.
Tiling    dq: a program per block of queries of one head, which loops over keys as the forward pass does.
          dk, dv: a program per block of keys of one key head; it loops over the G heads of its group and over the
          queries that see the block, so that the heads' sums need neither atomics nor a second pass.

              queries ->       0    1    2    3    4
              key block 0      ▞    █    ▞    ░    ░      ▞ masked: diagonal or window's edge
              key block 1      ░    ▞    █    ▞    ░      █ no mask is computed
              key block 2      ░    ░    ▞    █    ▞      ░ not visited

State     dq [block_q, D], or dk and dv [block_kv, D], in float32 registers.
Traffic   dq reads K and V once per query block and head; dk and dv read q, do, lse and delta once per key block. 10 D
          FLOPs per visible pair, and 4 D to compute s and dp a second time.
Limits    As the forward kernel. float16 is multiplied as TF32, which has its precision and float32's range: gradients
          of scores neither overflow nor vanish.
Source    Dao, FlashAttention-2 (arXiv:2307.08691), for the recomputation from lse and the two loops.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from dantinox.kernels.ops.attention import segment_ids
from dantinox.kernels.ops.attention.triton.block_sizes import TritonBlockSizes, dkv_block_sizes, dq_block_sizes
from dantinox.kernels.ops.attention.triton.common import (
    LOWEST,
    NO_CAP,
    TritonAttentionConfig,
    cap_derivative,
    load_block,
    mask_scores,
    round_operand,
    scale_scores,
    seeing_queries,
    store_block,
    visible_keys,
)
from dantinox.kernels.triton_call import call_triton

Array = jax.Array
Segments = tuple[Array, Array]


@triton.jit
def load_operand(
    x,
    start,
    end,
    STRIDE: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    D_BLOCK: tl.constexpr,
    IN_BOUNDS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Load a block for a product: float16 as float32."""
    block = load_block(x, start, end, STRIDE, D, ROWS, D_BLOCK, IN_BOUNDS)
    if block.dtype == tl.float16:
        block = block.to(tl.float32)
    return round_operand(block, PRECISION)


@triton.jit
def weights_and_score_gradients(
    qk,
    dp,
    lse,
    delta,
    position,
    key,
    q_segment,
    kv_segment,
    S: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SEGMENTS: tl.constexpr,
    CAP: tl.constexpr,
    FACTOR: tl.constexpr,
    BOUND: tl.constexpr,
    INVERSE: tl.constexpr,
    CAPPED: tl.constexpr,
    INTERIOR: tl.constexpr,
):
    """Return p and ds in float32; what belongs to the queries is a column and to the keys a row, or the reverse."""
    s = scale_scores(qk, CAP, FACTOR, BOUND, CAPPED)
    if not INTERIOR:
        s = mask_scores(s, position, key, q_segment, kv_segment, S, CAUSAL, WINDOW, SEGMENTS)
    p = tl.exp2(s - lse)
    ds = p * (dp - delta)
    if CAP != NO_CAP:
        ds *= cap_derivative(s, INVERSE)
    return p, ds


@triton.jit
def accumulate_dq(
    dq,
    q_block,
    do_block,
    lse,
    delta,
    k,
    v,
    position,
    q_segment,
    kv_ids,
    start,
    end,
    S: tl.constexpr,
    D: tl.constexpr,
    STRIDE: tl.constexpr,
    D_BLOCK: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
    CAP: tl.constexpr,
    FACTOR: tl.constexpr,
    BOUND: tl.constexpr,
    INVERSE: tl.constexpr,
    CAPPED: tl.constexpr,
    INTERIOR: tl.constexpr,
):
    """Add the keys of [start, end) to dq / scale of a query block."""
    for kv_start in tl.range(start, end, BLOCK_KV):
        k_block = load_operand(k, kv_start, S, STRIDE, D, BLOCK_KV, D_BLOCK, INTERIOR, PRECISION)
        v_block = load_operand(v, kv_start, S, STRIDE, D, BLOCK_KV, D_BLOCK, INTERIOR, PRECISION)
        key = kv_start + tl.arange(0, BLOCK_KV)
        kv_segment = key
        if SEGMENTS and not INTERIOR:
            kv_segment = tl.load(kv_ids + key, mask=key < S, other=0)
        qk = tl.dot(q_block, tl.trans(k_block), input_precision=PRECISION)
        dp = tl.dot(do_block, tl.trans(v_block), input_precision=PRECISION)
        _, ds = weights_and_score_gradients(
            qk, dp, lse[:, None], delta[:, None], position[:, None], key[None, :], q_segment[:, None],
            kv_segment[None, :], S, CAUSAL, WINDOW, SEGMENTS, CAP, FACTOR, BOUND, INVERSE, CAPPED, INTERIOR,
        )  # fmt: skip
        ds = round_operand(ds.to(k_block.dtype), PRECISION)
        dq = tl.dot(ds, k_block, dq, input_precision=PRECISION)
    return dq


@triton.jit
def dq_kernel(
    q,
    k,
    v,
    do,
    lse,
    delta,
    q_ids,
    kv_ids,
    ranges,
    T: tl.constexpr,
    S: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    D_BLOCK: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
    FACTOR: tl.constexpr,
    BOUND: tl.constexpr,
    INVERSE: tl.constexpr,
    CAPPED: tl.constexpr,
    dq,
):
    """Compute dq of one block of queries of one head."""
    Q_BLOCKS: tl.constexpr = (T + BLOCK_Q - 1) // BLOCK_Q
    h = tl.program_id(0) % H
    q_block_index = Q_BLOCKS - 1 - tl.program_id(0) // H % Q_BLOCKS
    b = tl.program_id(0) // (H * Q_BLOCKS)
    q_start = q_block_index * BLOCK_Q
    t = q_start + tl.arange(0, BLOCK_Q)

    sequence = b.to(tl.int64)
    query = (sequence * T * H + h) * D
    key = (sequence * S * K + h // (H // K)) * D
    row = (sequence * H + h) * T + t
    q_ids += sequence * T
    kv_ids += sequence * S
    ranges += (sequence * Q_BLOCKS + q_block_index) * 4

    q_block = load_operand(q + query, q_start, T, H * D, D, BLOCK_Q, D_BLOCK, False, PRECISION)
    do_block = load_operand(do + query, q_start, T, H * D, D, BLOCK_Q, D_BLOCK, False, PRECISION)
    row_lse = tl.load(lse + row, mask=t < T, other=-LOWEST)
    row_delta = tl.load(delta + row, mask=t < T, other=0.0)
    q_segment = t
    if SEGMENTS:
        q_segment = tl.load(q_ids + t, mask=t < T, other=0)
    start, interior_start, interior_end, end = visible_keys(
        q_start, ranges, T, S, BLOCK_Q, BLOCK_KV, CAUSAL, WINDOW, SEGMENTS
    )
    acc = tl.zeros((BLOCK_Q, D_BLOCK), tl.float32)
    for part in tl.static_range(3):
        if part == 0:
            first, last = start, interior_start
        elif part == 1:
            first, last = interior_start, interior_end
        else:
            first, last = interior_end, end
        if part > 0 or WINDOW > 0 or SEGMENTS:
            acc = accumulate_dq(
                acc, q_block, do_block, row_lse, row_delta, k + key, v + key, t + (S - T), q_segment, kv_ids, first,
                last, S, D, K * D, D_BLOCK, BLOCK_KV, CAUSAL, WINDOW, SEGMENTS, PRECISION, CAP, FACTOR, BOUND,
                INVERSE, CAPPED, part == 1,
            )  # fmt: skip
    store_block(dq + query, acc * SCALE, q_start, T, H * D, D, BLOCK_Q, D_BLOCK)


@triton.jit
def accumulate_dkv(
    dk,
    dv,
    k_block,
    v_block,
    q,
    do,
    lse,
    delta,
    q_ids,
    key,
    kv_segment,
    start,
    end,
    T: tl.constexpr,
    S: tl.constexpr,
    D: tl.constexpr,
    STRIDE: tl.constexpr,
    D_BLOCK: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
    CAP: tl.constexpr,
    FACTOR: tl.constexpr,
    BOUND: tl.constexpr,
    INVERSE: tl.constexpr,
    CAPPED: tl.constexpr,
    INTERIOR: tl.constexpr,
):
    """Add the queries of [start, end) of one head to dk / scale and dv of a key block.

    Scores are transposed, keys down and queries across, so that p and ds are the left operands of both sums.
    """
    for q_start in tl.range(start, end, BLOCK_Q):
        q_block = load_operand(q, q_start, T, STRIDE, D, BLOCK_Q, D_BLOCK, T % BLOCK_Q == 0, PRECISION)
        do_block = load_operand(do, q_start, T, STRIDE, D, BLOCK_Q, D_BLOCK, T % BLOCK_Q == 0, PRECISION)
        t = q_start + tl.arange(0, BLOCK_Q)
        row_lse = tl.load(lse + t, mask=t < T, other=-LOWEST)
        row_delta = tl.load(delta + t, mask=t < T, other=0.0)
        q_segment = t
        if SEGMENTS and not INTERIOR:
            q_segment = tl.load(q_ids + t, mask=t < T, other=0)
        qk = tl.dot(k_block, tl.trans(q_block), input_precision=PRECISION)
        dp = tl.dot(v_block, tl.trans(do_block), input_precision=PRECISION)
        p, ds = weights_and_score_gradients(
            qk, dp, row_lse[None, :], row_delta[None, :], (t + (S - T))[None, :], key[:, None], q_segment[None, :],
            kv_segment[:, None], S, CAUSAL, WINDOW, SEGMENTS, CAP, FACTOR, BOUND, INVERSE, CAPPED, INTERIOR,
        )  # fmt: skip
        dv = tl.dot(round_operand(p.to(do_block.dtype), PRECISION), do_block, dv, input_precision=PRECISION)
        dk = tl.dot(round_operand(ds.to(q_block.dtype), PRECISION), q_block, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def dkv_kernel(
    q,
    k,
    v,
    do,
    lse,
    delta,
    q_ids,
    kv_ids,
    ranges,
    T: tl.constexpr,
    S: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    D_BLOCK: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
    FACTOR: tl.constexpr,
    BOUND: tl.constexpr,
    INVERSE: tl.constexpr,
    CAPPED: tl.constexpr,
    dk,
    dv,
):
    """Compute dk and dv of one block of keys of one key head."""
    G: tl.constexpr = H // K
    KV_BLOCKS: tl.constexpr = (S + BLOCK_KV - 1) // BLOCK_KV
    head = tl.program_id(0) % K
    kv_block_index = tl.program_id(0) // K % KV_BLOCKS
    b = tl.program_id(0) // (K * KV_BLOCKS)
    kv_start = kv_block_index * BLOCK_KV

    sequence = b.to(tl.int64)
    head_start = (sequence * S * K + head) * D
    q_ids += sequence * T
    kv_ids += sequence * S
    ranges += (sequence * KV_BLOCKS + kv_block_index) * 4

    key = kv_start + tl.arange(0, BLOCK_KV)
    kv_segment = key
    if SEGMENTS:
        kv_segment = tl.load(kv_ids + key, mask=key < S, other=0)
    k_block = load_operand(k + head_start, kv_start, S, K * D, D, BLOCK_KV, D_BLOCK, False, PRECISION)
    v_block = load_operand(v + head_start, kv_start, S, K * D, D, BLOCK_KV, D_BLOCK, False, PRECISION)
    start, interior_start, interior_end, end = seeing_queries(
        kv_start, ranges, T, S, BLOCK_Q, BLOCK_KV, CAUSAL, WINDOW, SEGMENTS
    )
    dk_sum = tl.zeros((BLOCK_KV, D_BLOCK), tl.float32)
    dv_sum = tl.zeros((BLOCK_KV, D_BLOCK), tl.float32)
    for g in range(G):
        h = head * G + g
        query = (sequence * T * H + h) * D
        row = (sequence * H + h) * T
        for part in tl.static_range(3):
            if part == 0:
                first, last = start, interior_start
            elif part == 1:
                first, last = interior_start, interior_end
            else:
                first, last = interior_end, end
            if part == 1 or SEGMENTS or (part == 0 and CAUSAL) or (part == 2 and WINDOW > 0):
                dk_sum, dv_sum = accumulate_dkv(
                    dk_sum, dv_sum, k_block, v_block, q + query, do + query, lse + row, delta + row, q_ids, key,
                    kv_segment, first, last, T, S, D, H * D, D_BLOCK, BLOCK_Q, CAUSAL, WINDOW, SEGMENTS, PRECISION,
                    CAP, FACTOR, BOUND, INVERSE, CAPPED, part == 1,
                )  # fmt: skip
    store_block(dk + head_start, dk_sum * SCALE, kv_start, S, K * D, D, BLOCK_KV, D_BLOCK)
    store_block(dv + head_start, dv_sum, kv_start, S, K * D, D, BLOCK_KV, D_BLOCK)


def backward(
    q: Array,
    k: Array,
    v: Array,
    do: Array,
    lse: Array,
    delta: Array,
    segments: Segments | None,
    config: TritonAttentionConfig,
) -> tuple[Array, Array, Array]:
    """Return dq, dk and dv.

    Args:
        q: queries [B, T, H, D].
        k: keys [B, S, K, D].
        v: values [B, S, K, D].
        do: cotangent of the ungated output [B, T, H, D], in q's dtype or float32.
        lse: log2-sum-exp2 of the scores [B, H, T], float32.
        delta: inner products of output and cotangent [B, H, T], float32.
        segments: (q_ids [B, T], kv_ids [B, S]) int32, or None.
        config: static parameters of the kernels.
    """
    B, T, H, D = q.shape
    S, K = k.shape[1:3]
    if q.dtype == jnp.float16:
        config = config._replace(precision="tf32")
    constants = config.constants(q, k, segments) | {"SCALE": config.scale}

    def call(kernel, sizes: TritonBlockSizes, out_type, grid: tuple[int, ...], ranges: Array):
        return call_triton(
            kernel,
            q,
            k,
            v,
            do,
            lse,
            delta,
            *((ranges, ranges) if segments is None else segments),
            ranges,
            out_type=out_type,
            grid=grid,
            capability=config.capability,
            num_warps=sizes.num_warps,
            num_stages=sizes.num_stages,
            name=f"attention_{kernel.__name__.removesuffix('_kernel')}",
            BLOCK_Q=sizes.block_q,
            BLOCK_KV=sizes.block_kv,
            **constants,
        )

    dq_sizes, dkv_sizes = (f(config.capability, q.dtype, D) for f in (dq_block_sizes, dkv_block_sizes))
    dq_ranges = dkv_ranges = jnp.zeros(1, jnp.int32)
    if segments is not None:
        q_ids, kv_ids = segments
        dq_ranges = segment_ids.kv_block_ranges(q_ids, dq_sizes.block_q, kv_ids, dq_sizes.block_kv)
        dkv_ranges = segment_ids.kv_block_ranges(kv_ids, dkv_sizes.block_kv, q_ids, dkv_sizes.block_q)
    like_q, like_k = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k))
    dq = call(dq_kernel, dq_sizes, like_q, (H * triton.cdiv(T, dq_sizes.block_q) * B,), dq_ranges)
    kv_grid = (K * triton.cdiv(S, dkv_sizes.block_kv) * B,)
    dk, dv = call(dkv_kernel, dkv_sizes, (like_k, like_k), kv_grid, dkv_ranges)
    return dq, dk, dv
