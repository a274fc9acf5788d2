"""Static parameters and the device functions that the Triton attention kernels share.

A program computes one block: queries down, keys across. Its loop has three parts, of which only the outer two apply the
causal and the window's mask:

    keys ->        [start, interior_start)   [interior_start, interior_end)   [interior_end, end)
    query block       ▞ window's edge             █ no mask                      ▞ diagonal, last keys
"""

from typing import Any, NamedTuple

import jax
import triton
import triton.language as tl

from dantinox.kernels.triton_math import head_block, score_constants

Array = jax.Array
NO_GATE, HEAD_GATE, ELEMENTWISE_GATE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


class TritonAttentionConfig(NamedTuple):
    """Static parameters of the kernels; the arrays hold the sizes.

    Attributes:
        causal: whether a query sees no later key.
        window: keys that a query sees, or None.
        scale: factor on the scores.
        softcap: bound of the scores, or None.
        precision: how the kernels multiply float32 operands, as `tl.dot` names it: tf32 or tf32x3.
        capability: compute capability of the device, (major, minor).
    """

    causal: bool
    window: int | None
    scale: float
    softcap: float | None
    precision: str
    capability: tuple[int, int]

    def constants(self, q: Array, k: Array, segments: Any) -> dict[str, Any]:
        """Return the compile-time constants that all kernels have."""
        (_, T, H, D), (_, S, K, _) = q.shape, k.shape
        sizes = {"T": T, "S": S, "H": H, "K": K, "D": D, "D_BLOCK": head_block(D)}
        mask = {"CAUSAL": self.causal, "WINDOW": self.window or 0, "SEGMENTS": segments is not None}
        return sizes | mask | {"PRECISION": self.precision} | score_constants(self.scale, self.softcap)


@triton.jit
def load_block(
    x,
    start,
    end,
    STRIDE: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    D_BLOCK: tl.constexpr,
    IN_BOUNDS: tl.constexpr,
):
    """Load rows [start, start + ROWS) of one head, with zeros from `end` and from column D on."""
    r, d = tl.arange(0, ROWS), tl.arange(0, D_BLOCK)
    pointers = x + tl.cast(start, tl.int64) * STRIDE + (r[:, None] * STRIDE + d[None, :])
    if IN_BOUNDS and D == D_BLOCK:
        return tl.load(pointers)
    if IN_BOUNDS:
        return tl.load(pointers, mask=(d < D)[None, :], other=0.0)
    return tl.load(pointers, mask=(start + r < end)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def store_block(x, value, start, end, STRIDE: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, D_BLOCK: tl.constexpr):
    """Store rows [start, start + ROWS) of one head, without those from `end` on."""
    r, d = tl.arange(0, ROWS), tl.arange(0, D_BLOCK)
    pointers = x + tl.cast(start, tl.int64) * STRIDE + (r[:, None] * STRIDE + d[None, :])
    tl.store(pointers, value.to(x.dtype.element_ty), mask=(start + r < end)[:, None] & (d < D)[None, :])


@triton.jit
def mask_scores(
    s,
    position,
    key,
    q_segment,
    kv_segment,
    S: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """Set the scores of pairs that are not visible to -inf.

    The queries' positions and segments form a column and the keys' form a row, or the reverse.
    """
    visible = key < S
    if CAUSAL:
        visible = visible & (position - key >= 0)
    if WINDOW > 0:
        visible = visible & (position - key < WINDOW)
    if SEGMENTS:
        visible = visible & (q_segment == kv_segment)
    return tl.where(visible, s, float("-inf"))


@triton.jit
def visible_keys(
    q_start,
    ranges,
    T: tl.constexpr,
    S: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """Return (start, interior_start, interior_end, end) of the keys that a block of queries sees."""
    first = q_start + S - T
    last = tl.minimum(q_start + BLOCK_Q, T) - 1 + S - T
    start = first * 0
    interior_start = start
    end = start + S
    interior_end = start + S
    if CAUSAL:
        end = tl.minimum(last + 1, S)
        interior_end = tl.minimum(first + 1, S)
    if WINDOW > 0:
        start = first - WINDOW + 1
        interior_start = last - WINDOW + 1
    start, interior_start = floor(start, BLOCK_KV), ceil(interior_start, BLOCK_KV)
    interior_end, end = floor(interior_end, BLOCK_KV), ceil(end, BLOCK_KV)
    return intersect(start, interior_start, interior_end, end, ranges, BLOCK_KV, SEGMENTS)


@triton.jit
def seeing_queries(
    kv_start,
    ranges,
    T: tl.constexpr,
    S: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """Return (start, interior_start, interior_end, end) of the queries that see a block of keys.

    Queries from T on are in the interior: their lse makes every weight zero.
    """
    first = kv_start + T - S  # the query at the position of the first key
    start = first * 0
    interior_start = start
    end = start + T
    interior_end = start + (T + BLOCK_Q - 1)
    if CAUSAL:
        start = first
        interior_start = first + BLOCK_KV - 1
    if WINDOW > 0:
        end = tl.minimum(first + (BLOCK_KV - 1 + WINDOW), T)
        interior_end = tl.minimum(first + WINDOW, interior_end)
    start, interior_start = floor(start, BLOCK_Q), ceil(interior_start, BLOCK_Q)
    interior_end, end = floor(interior_end, BLOCK_Q), ceil(end, BLOCK_Q)
    return intersect(start, interior_start, interior_end, end, ranges, BLOCK_Q, SEGMENTS)


@triton.jit
def loop_range(PART: tl.constexpr, start, interior_start, interior_end, end):
    """Return the first and the last position, exclusive, of one of the three parts of a loop; 1 is the interior."""
    if PART == 0:
        return start, interior_start
    elif PART == 1:
        return interior_start, interior_end
    else:
        return interior_end, end


@triton.jit
def query_program(T: tl.constexpr, H: tl.constexpr, BLOCK_Q: tl.constexpr):
    """Return the sequence, the head and the query block of this program: heads fastest, the last block first."""
    Q_BLOCKS: tl.constexpr = (T + BLOCK_Q - 1) // BLOCK_Q
    h = tl.program_id(0) % H
    q_block_index = Q_BLOCKS - 1 - tl.program_id(0) // H % Q_BLOCKS
    sequence = (tl.program_id(0) // (H * Q_BLOCKS)).to(tl.int64)
    return sequence, h, q_block_index


@triton.jit
def floor(x, BLOCK: tl.constexpr):
    """Round down to a block's start, from 0 on."""
    return tl.maximum(x, 0) // BLOCK * BLOCK


@triton.jit
def ceil(x, BLOCK: tl.constexpr):
    """Round up to a block's start, from 0 on."""
    return (tl.maximum(x, 0) + BLOCK - 1) // BLOCK * BLOCK


@triton.jit
def intersect(start, interior_start, interior_end, end, ranges, BLOCK: tl.constexpr, SEGMENTS: tl.constexpr):
    """Limit a range to the blocks that may share a segment, and its interior to those of one segment."""
    if SEGMENTS:
        start = tl.maximum(start, tl.load(ranges) * BLOCK)
        interior_start = tl.maximum(interior_start, tl.load(ranges + 1) * BLOCK)
        interior_end = tl.minimum(interior_end, tl.load(ranges + 2) * BLOCK)
        end = tl.minimum(end, tl.load(ranges + 3) * BLOCK)
    end = tl.maximum(start, end)
    interior_start = tl.minimum(tl.maximum(interior_start, start), end)
    interior_end = tl.maximum(interior_start, interior_end)
    return start, interior_start, interior_end, end
