"""Static parameters of the Triton decode attention, and the device functions that its two kernels share."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from dantinox.kernels.ops.decode_attention.triton import block_sizes
from dantinox.kernels.triton_math import LOWEST, head_block, round_operand, score_constants

Array = jax.Array
MIN_FLOAT8_CAPABILITY = (8, 9)  # whose instructions convert float8_e4m3fn


class TritonDecodeConfig(NamedTuple):
    """Static parameters of the kernels.

    Attributes:
        T, H, K, D, C: sizes, by the letters of their axes.
        dtype: dtype of the queries.
        max_visible: upper bound on the tokens that a query sees, at most C.
        scale: factor on the scores, positive.
        softcap: bound of the scores, or None.
        precision: how the kernels multiply float32 operands, as `tl.dot` names it: tf32 or tf32x3.
        capability: compute capability of the device, (major, minor).
    """

    T: int
    H: int
    K: int
    D: int
    C: int
    dtype: Any
    max_visible: int
    scale: float
    softcap: float | None
    precision: str
    capability: tuple[int, int]

    @property
    def sizes(self) -> block_sizes.TritonBlockSizes:
        """Sizes of the split kernel."""
        return block_sizes.split_block_sizes(self.dtype, self.D)

    @property
    def rows(self) -> int:
        """Queries per tile: those of the query heads of a KV head, token by token."""
        return block_sizes.rows_per_tile(self.T * self.H // self.K, self.sizes)

    @property
    def row_tiles(self) -> int:
        """Tiles of rows of a KV head."""
        return triton.cdiv(self.T * self.H // self.K, self.rows)

    def splits(self, B: int) -> int:
        """Return the splits per sequence."""
        num_visible = min(self.C - self.T, self.max_visible - 1)
        return block_sizes.splits(self.capability, B, self.K * self.row_tiles, num_visible, self.sizes)

    def row_constants(self, splits: int, gate: Array | None, sinks: Array | None) -> dict[str, Any]:
        """Return the compile-time constants that both kernels have."""
        return {
            "H": self.H,
            "D": self.D,
            "D_BLOCK": head_block(self.D),
            "SPLITS": splits,
            "SCALE": self.scale if self.softcap is None else 1.0,
            "UNIT": self.weight_unit,
            "GATE_WIDTH": 0 if gate is None else gate.shape[-1],
            "SINKS": sinks is not None,
        }

    @property
    def weight_unit(self) -> float:
        """Weight of the largest score: so small that weighted sums are no larger than the values, which may be huge.

        Values of float16 are not, and their weights would vanish.
        """
        return 1.0 if self.dtype == jnp.float16 else 2.0 ** -math.ceil(math.log2(self.max_visible))

    def cap_constants(self) -> dict[str, Any]:
        """Return the constants of the soft cap; without one the scores are scaled in the exponent."""
        constants = score_constants(self.scale if self.softcap is not None else 1.0, self.softcap, unit=1.0)
        return {name: constants[name] for name in ("CAP", "FACTOR", "BOUND", "CAPPED")}


@triton.jit
def load_vectors(x, offset, is_valid, D: tl.constexpr, D_BLOCK: tl.constexpr):
    """Load the vectors at these offsets; zeros where one is not valid, and from column D on."""
    d = tl.arange(0, D_BLOCK)
    pointers = (x + offset)[:, None] + d[None, :]
    if D == D_BLOCK:
        return tl.load(pointers, mask=is_valid[:, None], other=0)
    return tl.load(pointers, mask=is_valid[:, None] & (d < D)[None, :], other=0)


@triton.jit
def store_vectors(x, offset, value, is_valid, D: tl.constexpr, D_BLOCK: tl.constexpr):
    """Store vectors at these offsets where they are valid."""
    d = tl.arange(0, D_BLOCK)
    tl.store((x + offset)[:, None] + d[None, :], value, mask=is_valid[:, None] & (d < D)[None, :])


@triton.jit
def as_bytes(x):
    """Return a pointer to float8_e4m3fn as one to bytes: GPUs before 8.9 have no such type."""
    if x.dtype.element_ty == tl.float8e4nv:
        x = x.to(tl.pointer_type(tl.uint8), bitcast=True)
    return x


@triton.jit
def to_operand(x, DTYPE: tl.constexpr, FLOAT8: tl.constexpr, PRECISION: tl.constexpr):
    """Convert what a ring buffer holds to an operand of a product; bytes hold float8_e4m3fn.

    Without instructions for it, its bits become those of a float16 that is 2^8 times smaller, subnormals included.
    """
    if x.dtype == tl.uint8:
        if FLOAT8:
            x = x.to(tl.float8e4nv, bitcast=True)
        else:
            bits = x.to(tl.uint16)
            half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True) * 256.0
            x = tl.where((bits & 0x7F) == 0x7F, float("nan"), half)
    return round_operand(x.to(DTYPE), PRECISION)


@triton.jit
def finish(
    acc,
    m,
    l,
    query,
    is_query,
    gate,
    sinks,
    o,
    H: tl.constexpr,
    ROWS_PER_SEQUENCE: tl.constexpr,
    D: tl.constexpr,
    D_BLOCK: tl.constexpr,
    SCALE: tl.constexpr,
    UNIT: tl.constexpr,
    GATE_WIDTH: tl.constexpr,
    SINKS: tl.constexpr,
):
    """Add the sinks, divide by the sum of the weights, apply the gate and store the output of queries [B T H]."""
    if SINKS:
        top = tl.minimum(tl.maximum(m * SCALE, LOWEST), -LOWEST)
        sink = tl.load(sinks + query // ROWS_PER_SEQUENCE * H + query % H, mask=is_query, other=float("-inf"))
        peak = tl.maximum(top, sink)
        decay = tl.exp(top - peak)
        acc = acc * decay[:, None]
        l = l * decay + tl.exp(sink - peak) * UNIT
    acc = acc / tl.where(l == 0, 1.0, l)[:, None]  # rows past the last query have no key
    if GATE_WIDTH == 1:
        logit = tl.load(gate + query, mask=is_query, other=0.0).to(tl.float32)
        acc *= tl.sigmoid(logit)[:, None]
    elif GATE_WIDTH > 1:
        acc *= tl.sigmoid(load_vectors(gate, query * D, is_query, D, D_BLOCK).to(tl.float32))
    store_vectors(o, query * D, acc.to(o.dtype.element_ty), is_query, D, D_BLOCK)
