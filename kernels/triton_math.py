"""Shared by the Triton kernels: order of programs, operands of tensor cores, soft cap on scores and logits."""

import math
from typing import Any

import jax
import numpy as np
import triton
import triton.language as tl

from dantinox.kernels import softcap as caps

LOG2_E = math.log2(math.e)
ONE_PASS = (None, "default", "fastest", "bfloat16", "tensorfloat32", "BF16_BF16_F32", "TF32_TF32_F32")
NO_CAP, SIMPLE_CAP, EXTREME_CAP = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
LOWEST = tl.constexpr(float(np.finfo(np.float32).min))  # no finite score is below it
LINEAR = tl.constexpr(caps.LINEAR)
MIN_HEAD_BLOCK = 16


def head_block(D: int) -> int:
    """Return the columns of a tile of heads: a power of two, of at least 16."""
    return max(MIN_HEAD_BLOCK, triton.next_power_of_2(D))


def float32_precision() -> str:
    """Return how float32 operands are multiplied: like XLA, with TF32 unless a higher precision is asked for."""
    return "tf32" if jax.config.jax_default_matmul_precision in ONE_PASS else "tf32x3"


def score_constants(scale: float, softcap: float | None, unit: float = LOG2_E) -> dict[str, Any]:
    """Return the constants of `scale_scores` and `cap_derivative`, for scores times `unit`; see `kernels.softcap`."""
    if softcap is None:
        return {"CAP": NO_CAP.value, "FACTOR": scale * unit, "BOUND": 1.0, "INVERSE": 1.0, "CAPPED": 1.0}
    bound = max(softcap, caps.MIN_CAPPED_SCORE)
    ratio = abs(scale) / softcap
    inverse_bound = 1 / (bound * unit)
    if softcap < caps.MAX_SIMPLE_SOFTCAP and (ratio == 0 or caps.SIMPLE_RATIOS[0] <= ratio <= caps.SIMPLE_RATIOS[1]):
        return {
            "CAP": SIMPLE_CAP.value,
            "FACTOR": scale / softcap,
            "BOUND": bound * unit,
            "INVERSE": inverse_bound,
            "CAPPED": 1.0,
        }
    return {"CAP": EXTREME_CAP.value, "FACTOR": scale, "BOUND": bound, "INVERSE": inverse_bound, "CAPPED": softcap}


@triton.jit
def program_tile(program, ROW_BLOCKS: tl.constexpr, COLUMN_BLOCKS: tl.constexpr, GROUP_BLOCKS: tl.constexpr):
    """Return the block of rows and of columns of a program.

    Programs that run at the same time have GROUP_BLOCKS blocks of rows and many blocks of columns.
    """
    group_start = program // (GROUP_BLOCKS * COLUMN_BLOCKS) * GROUP_BLOCKS
    index = program % (GROUP_BLOCKS * COLUMN_BLOCKS)
    blocks = tl.minimum(ROW_BLOCKS - group_start, GROUP_BLOCKS)
    return group_start + index % blocks, index // blocks


@triton.jit
def round_operand(x, PRECISION: tl.constexpr):
    """Round float32 to the 10 bits that TF32 keeps, half away from zero: tensor cores would cut the others off."""
    if (x.dtype == tl.float32) & (PRECISION == "tf32"):
        bits = x.to(tl.int32, bitcast=True)
        is_finite = (bits & 0x7F800000) != 0x7F800000
        x = tl.where(is_finite, (bits + 0x1000) & -0x2000, bits).to(tl.float32, bitcast=True)
    return x


@triton.jit
def tanh(x):
    """Compute tanh within 2 units in the last place, without the cancellation of 2 sigmoid(2x) - 1 near zero."""
    a = tl.abs(x)
    z = x * x
    small = x + x * z * (-0.33333284 + z * (0.13331601 + z * (-0.05373073 + z * (0.020629145 + z * -0.0056990227))))
    large = 1.0 - 2.0 / (tl.exp(2.0 * a) + 1.0)
    return tl.where(a < 0.625, small, tl.where(x < 0, -large, large))


@triton.jit
def scale_scores(
    qk,
    CAP: tl.constexpr,
    FACTOR: tl.constexpr,
    BOUND: tl.constexpr,
    CAPPED: tl.constexpr,
    UNIT: tl.constexpr = 1.4426950408889634,
):
    """Compute UNIT * cap(scale * qk), times log2(e) by default; see `kernels.softcap.cap_scores`."""
    if CAP == NO_CAP:
        return qk * FACTOR
    if CAP == SIMPLE_CAP:
        return tanh(qk * FACTOR) * BOUND
    s = qk * FACTOR
    is_linear = tl.abs(s) < CAPPED * LINEAR
    SHRINK: tl.constexpr = 0.0625
    t = tanh(tl.where(is_linear, 0.0, s * SHRINK) * (1.0 / (CAPPED * SHRINK)))
    return tl.where(is_linear, s, t * BOUND) * UNIT


@triton.jit
def cap_derivative(s, INVERSE: tl.constexpr):
    """Compute 1 - tanh^2 from the result of `scale_scores`."""
    t = s * INVERSE
    return 1.0 - tl.minimum(t * t, 1.0)
