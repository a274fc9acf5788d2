"""dk and dv in Triton: a program loops over the queries that see a block of keys; `bwd.py` has the header."""

import triton
import triton.language as tl

from dantinox.kernels.ops.attention.triton.bwd_common import load_operand, weights_and_score_gradients
from dantinox.kernels.ops.attention.triton.common import loop_range, seeing_queries, store_block
from dantinox.kernels.triton_math import LOWEST, round_operand


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
            first, last = loop_range(part, start, interior_start, interior_end, end)
            if part == 1 or SEGMENTS or (part == 0 and CAUSAL) or (part == 2 and WINDOW > 0):
                dk_sum, dv_sum = accumulate_dkv(
                    dk_sum, dv_sum, k_block, v_block, q + query, do + query, lse + row, delta + row, q_ids, key,
                    kv_segment, first, last, T, S, D, H * D, D_BLOCK, BLOCK_Q, CAUSAL, WINDOW, SEGMENTS, PRECISION,
                    CAP, FACTOR, BOUND, INVERSE, CAPPED, part == 1,
                )  # fmt: skip
    store_block(dk + head_start, dk_sum * SCALE, kv_start, S, K * D, D, BLOCK_KV, D_BLOCK)
    store_block(dv + head_start, dv_sum, kv_start, S, K * D, D, BLOCK_KV, D_BLOCK)
