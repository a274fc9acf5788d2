"""The sum of the splits of the Triton decode attention, in a fixed order, so that two runs are bit-equal.

One kernel for all queries: as operations of XLA, the maximum and the sums would be two or three kernels, each of which
takes as long to start as this one does in all. It reads splits * 4 (D + 2) bytes per query, which `kernel.py` has just
written, so most come from L2. A split without visible tokens has no weight, and its sums are not read.
"""

import jax
import triton
import triton.language as tl

from dantinox.kernels.ops.decode_attention.triton.common import TritonDecodeConfig, finish
from dantinox.kernels.triton_call import call_triton
from dantinox.kernels.triton_math import LOWEST

Array = jax.Array
MAX_CHUNK = 16  # splits whose sums are in registers at a time


@triton.jit
def combine_kernel(
    parts,
    stats,
    gate,
    sinks,
    QUERIES: tl.constexpr,
    ROWS_PER_SEQUENCE: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    D_BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    SCALE: tl.constexpr,
    UNIT: tl.constexpr,
    GATE_WIDTH: tl.constexpr,
    SINKS: tl.constexpr,
    o,
):
    """Combine the splits of one query."""
    query = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, D_BLOCK)
    every = tl.arange(0, SPLITS_BLOCK)
    largest = tl.max(tl.load(stats + every.to(tl.int64) * QUERIES + query, mask=every < SPLITS, other=LOWEST), axis=0)
    acc = tl.zeros((1, D_BLOCK), tl.float32)
    total = tl.zeros((1,), tl.float32)
    for first in tl.range(0, SPLITS, CHUNK):
        split = first + tl.arange(0, CHUNK)
        part = split.to(tl.int64) * QUERIES + query
        m = tl.load(stats + part, mask=split < SPLITS, other=LOWEST)
        l = tl.load(stats + SPLITS * QUERIES + part, mask=split < SPLITS, other=0.0)
        has_weight = l != 0
        weight = tl.where(has_weight, tl.exp((m - largest) * SCALE), 0.0)
        in_bounds = has_weight[:, None] & (d < D)[None, :]
        sums = tl.load((parts + part * D)[:, None] + d[None, :], mask=in_bounds, other=0.0)
        acc += tl.sum(sums * weight[:, None], axis=0)[None, :]
        total += tl.sum(l * weight, axis=0)
    row = tl.arange(0, 1)
    finish(
        acc, largest + row.to(tl.float32), total, query + row, row == 0, gate, sinks, o, H, ROWS_PER_SEQUENCE, D,
        D_BLOCK, SCALE, UNIT, GATE_WIDTH, SINKS,
    )  # fmt: skip


def combine(
    parts: Array, stats: Array, q: Array, gate: Array | None, sinks: Array | None, config: TritonDecodeConfig
) -> Array:
    """Return the output [B, T, H, D] in q's dtype from the results of several splits; see `append_and_attend`."""
    (B, T, H, _), splits = q.shape, parts.shape[0]
    return call_triton(
        combine_kernel,
        parts,
        stats,
        q if gate is None else gate,
        q if sinks is None else sinks,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(B * T * H,),
        capability=config.capability,
        name="decode_attention_combine",
        QUERIES=B * T * H,
        ROWS_PER_SEQUENCE=T * H,
        SPLITS_BLOCK=triton.next_power_of_2(splits),
        CHUNK=min(MAX_CHUNK, triton.next_power_of_2(splits)),
        **config.row_constants(splits, gate, sinks),
    )
