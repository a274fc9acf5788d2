"""dq in Triton: a program loops over the keys that a block of queries sees; `bwd.py` has the header."""

import triton
import triton.language as tl

from dantinox.kernels.ops.attention.triton.bwd_common import load_operand, weights_and_score_gradients
from dantinox.kernels.ops.attention.triton.common import loop_range, query_program, store_block, visible_keys
from dantinox.kernels.triton_math import LOWEST, round_operand


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
    sequence, h, q_block_index = query_program(T, H, BLOCK_Q)
    q_start = q_block_index * BLOCK_Q
    t = q_start + tl.arange(0, BLOCK_Q)

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
        first, last = loop_range(part, start, interior_start, interior_end, end)
        if part > 0 or WINDOW > 0 or SEGMENTS:
            acc = accumulate_dq(
                acc, q_block, do_block, row_lse, row_delta, k + key, v + key, t + (S - T), q_segment, kv_ids, first,
                last, S, D, K * D, D_BLOCK, BLOCK_KV, CAUSAL, WINDOW, SEGMENTS, PRECISION, CAP, FACTOR, BOUND,
                INVERSE, CAPPED, part == 1,
            )  # fmt: skip
    store_block(dq + query, acc * SCALE, q_start, T, H * D, D, BLOCK_Q, D_BLOCK)
