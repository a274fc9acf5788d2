"""The grid of the interpreted forward and backward kernels, and the loads of a step.

Inputs are not blocked: they are scalar-prefetch operands. The interpreter carries blocked inputs through its loop and
writes every block back, so XLA would copy all of each array in every step. It only reads prefetched operands, and a
kernel that slices them reads no more than its block.

Arrays are those of `dantinox.kernels.ops.attention.packing`, with one subtile per block. Blocks of several heads have a
leading axis, those of one head have none.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dantinox.kernels.cost import Cost
from dantinox.kernels.ops.attention.block_schedule import (
    FIRST_KV_BLOCK,
    FIRST_USE_OF_KV,
    LAST_KV_BLOCK,
    NEEDS_MASK,
    BlockSchedule,
)
from dantinox.kernels.ops.attention.common import (
    MASK_VALUE,
    NN,
    AttentionConfig,
    SegmentTables,
    dot_per_head,
    scale_scores,
    visible_mask,
)
from dantinox.kernels.ops.attention.pallas_cpu.block_sizes import CpuBlockSizes

Array = jax.Array
Ref = Any
CpuAttentionConfig = AttentionConfig[CpuBlockSizes]


class BlockStep:
    """One grid step, as the kernel body sees it: a block of the score matrix.

    Args:
        config: static parameters of the kernel.
        schedule: references to the tables of the schedule.
        num_kv_blocks: key blocks that the step processes as one, from `kv_block` on.
    """

    def __init__(self, config: CpuAttentionConfig, schedule: BlockSchedule, num_kv_blocks: int = 1) -> None:
        self.config, self.num_kv_blocks = config, num_kv_blocks
        head_step, step = pl.program_id(0), pl.program_id(1)
        kv_heads = config.block_sizes.kv_heads
        self.heads = head_step if kv_heads == 1 else pl.ds(head_step * kv_heads, kv_heads)
        self.q_block, self.kv_block, flags = schedule.q[step], schedule.kv[step], schedule.flags[step]
        self.is_first_kv_block = (flags & FIRST_KV_BLOCK) != 0
        self.is_last_kv_block = (flags & LAST_KV_BLOCK) != 0
        self.is_first_use_of_kv = (flags & FIRST_USE_OF_KV) != 0

    def load_q(self, ref: Ref) -> Array:
        """Return the step's block of an array [heads, query blocks, n, rows]."""
        return ref[self.heads, self.q_block]

    def load_kv(self, ref: Ref, kv_axis: int = -1) -> Array:
        """Return the step's blocks of an array [heads, key blocks, ...], concatenated along the axis of the keys."""
        blocks = [ref[self.heads, self.kv_block + n] for n in range(self.num_kv_blocks)]
        return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, kv_axis)

    def masked_scores(self, k: Array, q: Array, segments: SegmentTables | None) -> Array:
        """Return the scores [keys, rows] of the step, masked where a query does not see the key."""
        s = scale_scores(self.config, dot_per_head(k, q, NN))
        visible = visible_mask(self.config, s.shape, self.q_block, self.kv_block, 0, 0)
        if segments is not None:
            visible &= self.load_q(segments.q_ids) == self.load_kv(segments.kv_ids).swapaxes(-1, -2)
        return jnp.where(visible, s, MASK_VALUE)


def merge_kv_blocks(schedule: BlockSchedule, num_kv_blocks: int, kv_blocks_per_step: int) -> BlockSchedule:
    """Merge the steps of a query block into one step over all key blocks that it sees.

    Args:
        schedule: steps of one key block each.
        num_kv_blocks: number of key blocks.
        kv_blocks_per_step: key blocks of a step, at least as many as any query block sees.
    """
    max_visible = int(np.bincount(schedule.q).max())
    assert max_visible <= kv_blocks_per_step, (
        f"a query block sees {max_visible} key blocks, a step takes {kv_blocks_per_step}"
    )
    starts_q_block = (schedule.flags & FIRST_KV_BLOCK) != 0
    kv = np.maximum(0, np.minimum(schedule.kv[starts_q_block], num_kv_blocks - kv_blocks_per_step))
    return BlockSchedule(schedule.q[starts_q_block], kv, np.full_like(kv, FIRST_KV_BLOCK | LAST_KV_BLOCK | NEEDS_MASK))


def q_block_spec(config: CpuAttentionConfig, x: jax.ShapeDtypeStruct) -> pl.BlockSpec:
    """Return the spec of a block of an output [heads, query blocks, n, rows]."""
    block_shape = (_head_axis(config), None, *x.shape[2:])
    return pl.BlockSpec(block_shape, lambda g, n, schedule, *_: (g, schedule.q[n], 0, 0))


def kv_block_spec(config: CpuAttentionConfig, x: jax.ShapeDtypeStruct) -> pl.BlockSpec:
    """Return the spec of a block of an output [heads, key blocks, n, keys]."""
    block_shape = (_head_axis(config), None, *x.shape[2:])
    return pl.BlockSpec(block_shape, lambda g, n, schedule, *_: (g, schedule.kv[n], 0, 0))


def block_scratch(config: CpuAttentionConfig, *shape: int) -> Any:
    """Return float32 scratch memory of a block; `shape` does not include the axis of heads."""
    heads = _head_axis(config)
    return pltpu.VMEM(shape if heads is None else (heads, *shape), jnp.float32)


def _head_axis(config: CpuAttentionConfig) -> int | None:
    """Return the number of heads per block, or None if a block has one head and no such axis."""
    kv_heads = config.block_sizes.kv_heads
    return None if kv_heads == 1 else kv_heads


def call_over_blocks[Inputs, Outputs](
    kernel: Callable[..., None],
    config: CpuAttentionConfig,
    schedule: BlockSchedule,
    inputs: Inputs,
    outputs: Outputs,
    out_specs: Outputs,
    scratch_shapes: Sequence[Any],
    *,
    num_kv_blocks: int = 1,
    name: str,
    cost: Cost,
) -> Outputs:
    """Run `kernel(step, inputs, outputs, *scratch)` over (groups of heads, visible blocks).

    Args:
        kernel: takes a `BlockStep`, and references in the structure of the arguments below.
        config: static parameters of the kernel.
        schedule: the steps.
        inputs: a NamedTuple of arrays [heads, blocks, ...].
        outputs: a NamedTuple of shapes and dtypes.
        out_specs: the block specs of the outputs.
        scratch_shapes: memory that the steps share.
        num_kv_blocks: key blocks per step.
        name: name of the kernel.
        cost: cost estimate for the compiler.
    """

    def body(schedule: BlockSchedule, inputs: Inputs, outputs: Outputs, *scratch: Ref) -> None:
        kernel(BlockStep(config, schedule, num_kv_blocks), inputs, outputs, *scratch)

    heads = jax.tree.leaves(inputs)[0].shape[0]
    (results,) = pl.pallas_call(
        body,
        out_shape=[outputs],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(heads // config.block_sizes.kv_heads, len(schedule)),
            in_specs=[],
            out_specs=[out_specs],
            scratch_shapes=scratch_shapes,
        ),
        cost_estimate=cost.to_pallas(),
        interpret=True,
        name=name,
    )(BlockSchedule(*map(jnp.asarray, schedule)), inputs)
    return results
