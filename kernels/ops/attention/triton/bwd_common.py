"""Shared by the kernels of dq and of dk and dv: operands of float16, and the gradients of the scores of a block."""

import triton
import triton.language as tl

from dantinox.kernels.ops.attention.triton.common import load_block, mask_scores
from dantinox.kernels.triton_math import NO_CAP, cap_derivative, round_operand, scale_scores


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
    """Return p and ds in float32; values per query form a column and those per key form a row, or the reverse."""
    s = scale_scores(qk, CAP, FACTOR, BOUND, CAPPED)
    if not INTERIOR:
        s = mask_scores(s, position, key, q_segment, kv_segment, S, CAUSAL, WINDOW, SEGMENTS)
    p = tl.exp2(s - lse)
    ds = p * (dp - delta)
    if CAP != NO_CAP:
        ds *= cap_derivative(s, INVERSE)
    return p, ds
