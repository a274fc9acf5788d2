"""Configuration, block sizes, block ranges, masks, soft cap and SMEM of the Hopper attention kernels."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dantinox.kernels import mosaic_gpu
from dantinox.kernels.mosaic_gpu import LOG2E as LOG2E
from dantinox.kernels.mosaic_gpu import TMA_ROWS as TMA_ROWS
from dantinox.kernels.mosaic_gpu import wgmma_smem as wgmma_smem

Array = jax.Array
Ref = Any
Index = Array | int
Segments = tuple[Array, Array]  # ids of the queries and of the keys

FAR_FUTURE = 2**24  # tokens; more than any block has
WARPGROUP_ROWS = 64  # of one wgmma
COMPUTE_WARPGROUPS = 2  # consumers; a third warpgroup is the producer
BLOCK_ROWS = WARPGROUP_ROWS * COMPUTE_WARPGROUPS  # queries or keys per thread block
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 240, 24
ROW_LAYOUT = plgpu.Layout.WGMMA.reduce(1)  # one value per row of an accumulator
COL_LAYOUT = plgpu.Layout.WGMMA.reduce(0)  # one value per column


class Sm90AttentionConfig(NamedTuple):
    """Sizes and options that shape the code of a kernel. Hashable, since `vjp.py` passes it to custom_vjp."""

    T: int
    S: int
    G: int  # query heads per key head
    causal: bool
    window: int | None
    scale: float
    softcap: float | None
    interpret: plgpu.InterpretGPUParams | None = None  # None compiles; the parameters interpret the kernel on the CPU


class BwdInputs(NamedTuple):
    """Inputs of both backward kernels, in global memory; see `bwd.backward`, which pads them."""

    q: Any
    k: Any
    v: Any
    do: Any
    lse: Any
    delta: Any
    q_ids: Any = None
    kv_ids: Any = None
    segment_ranges: Any = None  # per block of rows, the `SegmentRange` of the blocks to loop over
    unscale: Any = None  # [B, K] float32, factor on all gradients; None: 1


def split_refs(refs: Sequence[Ref], *types: type[NamedTuple]) -> list[Any]:
    """Group the positional references of a kernel into one NamedTuple per type."""
    groups, start = [], 0
    for kind in types:
        end = start + len(kind._fields)
        groups.append(kind(*refs[start:end]))
        start = end
    assert start == len(refs), f"{len(refs)} references for {start} names"
    return groups


class KvBlockRange(NamedTuple):
    """Key blocks of a range of queries: all in [start, end), those without a mask in [interior_start, interior_end)."""

    start: Array
    interior_start: Array
    interior_end: Array
    end: Array

    def intersect(self, other: "KvBlockRange") -> "KvBlockRange":
        """Return the blocks of both ranges."""
        start = lax.max(self.start, other.start)
        end = lax.max(start, lax.min(self.end, other.end))
        interior_start = lax.clamp(start, lax.max(self.interior_start, other.interior_start), end)
        interior_end = lax.min(lax.min(self.interior_end, other.interior_end), end)
        return KvBlockRange(start, interior_start, lax.max(interior_start, interior_end), end)


def visible_kv_range(q_start: Array, rows: int, block_kv: int, config: Sm90AttentionConfig) -> KvBlockRange:
    """Return the key blocks that queries q_start to q_start + rows - 1 see; those past T see none."""

    def block_of(key: Array) -> Array:
        return lax.div(lax.max(key, jnp.int32(0)), jnp.int32(block_kv))

    offset = config.S - config.T
    q_end = lax.min(q_start + rows, jnp.int32(config.T))
    kv_end, interior_end = jnp.int32(config.S), jnp.int32(config.S // block_kv)
    if config.causal:
        kv_end, interior_end = lax.min(kv_end, q_end + offset), lax.min(interior_end, block_of(q_start + offset + 1))
    start = interior_start = jnp.int32(0)
    if config.window is not None:
        start = block_of(q_start + offset - config.window + 1)
        interior_start = block_of(q_end + offset - config.window + block_kv - 1)
    end = jnp.where(q_start < config.T, lax.max(start, block_of(kv_end + block_kv - 1)), start)
    interior_start = lax.max(start, lax.min(interior_start, end))
    return KvBlockRange(start, interior_start, lax.max(interior_start, lax.min(interior_end, end)), end)


def visible_kv_blocks(q_start: Array, config: Sm90AttentionConfig, block_kv: int) -> tuple[Array, Array]:
    """Return (first block, count) of the key blocks that queries [q_start, q_start + BLOCK_ROWS) see."""
    S, offset = config.S, config.S - config.T
    start, end = jnp.int32(0), jnp.int32(pl.cdiv(S, block_kv))
    if config.causal:
        kv_end = jnp.clip(jnp.minimum(q_start + BLOCK_ROWS, config.T) + offset, 0, S)
        end = _div(kv_end + (block_kv - 1), block_kv)
    if config.window is not None:
        start = _div(jnp.maximum(q_start + (offset - config.window + 1), 0), block_kv)
    return start, jnp.maximum(end - start, 0)


def visible_q_blocks(kv_start: Array, rows: int, config: Sm90AttentionConfig, block_q: int) -> tuple[Array, Array]:
    """Return (first block, count) of the query blocks that see a key of [kv_start, kv_start + rows)."""
    T, offset = config.T, config.S - config.T
    start, end = jnp.int32(0), jnp.int32(pl.cdiv(T, block_q))
    if config.causal:
        start = _div(jnp.maximum(kv_start - offset, 0), block_q)
    if config.window is not None:
        q_end = jnp.clip(jnp.minimum(kv_start + rows, config.S) + (config.window - 1 - offset), 0, T)
        end = _div(q_end + (block_q - 1), block_q)
    return start, jnp.maximum(end - start, 0)


def _div(x: Array, divisor: int) -> Array:
    return lax.div(x, jnp.int32(divisor))


class SegmentRange(NamedTuple):
    """Blocks that may share a segment with a block of rows, [start, end); the interior ones hold that segment only."""

    start: Array
    interior_start: Array
    interior_end: Array
    end: Array

    @classmethod
    def load(cls, segment_ranges: Ref, batch: Array, block: Array) -> "SegmentRange":
        """Load the range of a block from the table of `segment_ids.kv_block_ranges`."""
        return cls(*(segment_ranges[batch, block, n] for n in range(4)))

    def clamp(self, first: Array, steps: Array) -> tuple[Array, Array]:
        """Limit (first block, count) to the range; if no block is in the range, keep the first within the blocks."""
        start = lax.clamp(first, self.start, jnp.maximum(first + steps - 1, first))
        return start, jnp.minimum(first + steps, self.end) - start

    def is_interior(self, block: Array) -> Array:
        """Return whether every pair of this block is of one segment."""
        return (block >= self.interior_start) & (block < self.interior_end)


def per_row(x: Array, columns: int) -> Array:
    """Broadcast one value per row over the columns."""
    return lax.broadcast_in_dim(x, (x.shape[0], columns), [0])


def per_column(x: Array, rows: int) -> Array:
    """Broadcast one value per column over the rows."""
    return lax.broadcast_in_dim(x, (rows, x.shape[0]), [1])


def iota(size: int, layout: Any) -> Array:
    """Return the index of each row (ROW_LAYOUT) or column (COL_LAYOUT)."""
    return plgpu.broadcasted_iota(jnp.int32, (size,), 0, layout=layout)


def apply_mask(
    *ps: Array,
    q_start: Array,
    kv_start: Array,
    config: Sm90AttentionConfig,
    q_axis: int,
    load_ids: Callable[[], tuple[Array, Array]] | None,
    one_segment: Array | None,
) -> list[Array]:
    """Zero the invisible pairs of each p; a block whose pairs are all visible is returned without a mask.

    Args:
        ps: weights of one block, [queries, keys] or transposed.
        q_start: first query of the block.
        kv_start: first key of the block.
        config: static parameters of the kernel.
        q_axis: the axis along which the queries run; the keys run along the other.
        load_ids: loads the segment ids of the rows and of the columns; None: no segments.
        one_segment: whether all tokens of the block are of one segment; None: no segments.
    """
    rows, columns = shape = ps[0].shape
    queries, keys = shape[q_axis], shape[1 - q_axis]
    distance = q_start + (config.S - config.T) - kv_start  # from the first key to the first query
    all_visible = []
    if config.causal:
        all_visible.append(distance >= keys - 1)
    if config.window is not None:
        all_visible.append(distance + (queries - 1) < config.window)
    if q_axis == 0 and not config.causal and config.S % keys:
        # Past the last key, k and v are zeros and p = 2^-lse: if finite, it adds nothing. dk and dv never store it.
        ps = tuple(jnp.minimum(p, 1.0) for p in ps)
    if load_ids is not None:
        all_visible.append(one_segment)
    if not all_visible:
        return [*ps]

    def keep_all() -> list[Array]:
        return [*ps]

    def keep_visible() -> list[Array]:
        # The mask compares eight columns: in the next eight, the values of a thread differ by a constant, which goes
        # into the comparison. Indices of all columns would stay in registers from block to block.
        row, conditions = iota(rows, ROW_LAYOUT), []
        if config.causal:
            column = per_column(iota(8, COL_LAYOUT), rows)
            offset = per_row(row + distance, 8) - column if q_axis == 0 else column - per_row(row - distance, 8)
            shifts = range(0, columns, 8) if q_axis == 0 else range(0, -columns, -8)
            conditions.append(jnp.concatenate([offset >= n for n in shifts], axis=1))
            if config.window is not None:
                conditions.append(jnp.concatenate([offset < config.window + n for n in shifts], axis=1))
        if load_ids is not None:
            if not config.causal:  # always true: Mosaic infers the layout of the ids from the iotas
                conditions.append(per_column(iota(columns, COL_LAYOUT), rows) <= per_row(row + FAR_FUTURE, columns))
            row_ids, column_ids = load_ids()
            conditions.append(per_row(row_ids, columns) == per_column(column_ids, rows))
        visible = _all_of(conditions)
        return [jnp.where(visible, p, jnp.zeros_like(p)) for p in ps]

    return lax.cond(_all_of(all_visible), keep_all, keep_visible)


def _all_of(conditions: list[Array]) -> Array:
    return functools.reduce(operator.and_, conditions)


def softcap_tanh(qk: Array, config: Sm90AttentionConfig) -> Array:
    """Return tanh(scale qk / softcap) in float32; a score is softcap times as large.

    The hardware's tanh takes one instruction instead of two, with a relative error of 2^-11. The output tolerates that
    error, but weights from exact scores and a log-sum-exp of approximate scores do not sum to one: in float16, with a
    cap of 50 and scores near it, the gradients exceed the tolerance of the tests.
    """
    return mosaic_gpu.softcap_tanh(qk, scale=config.scale, softcap=config.softcap)


def softmax_weights(qk: Array, lse: Array, config: Sm90AttentionConfig) -> tuple[Array, Array | None]:
    """Return (p, 1 - (s / softcap)^2 or None) of q k^T; lse has its shape."""
    if config.softcap is None:
        return jnp.exp2(qk * (config.scale * LOG2E) - lse), None
    t = softcap_tanh(qk, config)
    return jnp.exp2(t * (config.softcap * LOG2E) - lse), 1.0 - t * t


def interpret_operand_smem(columns: int, dtype: Any, config: Sm90AttentionConfig) -> Any:
    """Return shared memory for a left operand, which interpreted wgmma needs, or None when compiled."""
    if config.interpret is None:
        return None
    return wgmma_smem((COMPUTE_WARPGROUPS, WARPGROUP_ROWS, columns), dtype)


def wgmma_accumulate(acc: Ref, a: Array, b: Ref, operand_smem: Ref | None) -> None:
    """Start the asynchronous wgmma acc += a @ b."""
    if operand_smem is None:
        plgpu.wgmma(acc, a, b)
    else:
        operand_smem[...] = a
        plgpu.commit_smem()
        plgpu.wgmma(acc, operand_smem, b)


def wait_when(condition: Array, barriers: Ref, index: Index) -> None:
    """Wait for a barrier if the condition holds."""

    @pl.when(condition)
    def wait() -> None:
        plgpu.barrier_wait(barriers.at[index])


def drain_pipeline(steps: Array, stages: int, empty: Callable[[Array], Ref]) -> None:
    """Wait until the last stages are empty, so that no barrier is left between two phases."""

    @pl.loop(jnp.maximum(steps - stages, 0), steps)
    def wait_until_empty(step: Array) -> None:
        plgpu.barrier_wait(empty(lax.rem(step, jnp.int32(stages))))
