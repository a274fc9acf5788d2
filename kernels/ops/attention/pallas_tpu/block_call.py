"""The `pallas_call` of the forward and backward TPU kernels: a grid over (head groups, visible blocks)."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dantinox.kernels.cost import Cost
from dantinox.kernels.ops.attention.pallas_tpu.block_schedule import BlockSchedule
from dantinox.kernels.ops.attention.pallas_tpu.common import AttentionKernelConfig, BlockContext, SegmentTables
from dantinox.kernels.ops.attention.pallas_tpu.refs import BlockRef, PhaseValues, SubtileRef, UnblockedRef

Array = jax.Array
VMEM_LIMIT_BYTES = 56 * 2**20  # of the smallest chip's 64 MiB


class Operand(NamedTuple):
    """An input of a kernel.

    Attributes:
        array: [heads, subtiles, rows, columns].
        follows: the axis of the score matrix whose block index selects the block.
        kv_axis: the axis of a subtile that holds keys.
    """

    array: Array
    follows: Literal["q", "kv"]
    kv_axis: int = -1


class Output(NamedTuple):
    """An output of a kernel: shape and dtype, and how the grid writes it."""

    shape: jax.ShapeDtypeStruct
    spec: pl.BlockSpec


class ScratchShape(NamedTuple):
    """Scratch memory: shape, without the heads, and dtype."""

    shape: tuple[int, ...]
    dtype: Any


def block_spec(
    config: AttentionKernelConfig, follows: Literal["q", "kv"], *subtile: int, first_block: int = 0
) -> pl.BlockSpec:
    """Spec of a block of an array [heads, subtiles, *subtile] that follows the query or the key block.

    Index maps take (head group, step) and the tables; the array begins with block `first_block`.
    """
    num_q_subtiles, num_kv_subtiles = config.num_subtiles
    kv_heads = config.block_sizes.kv_heads
    if follows == "q":
        return pl.BlockSpec((kv_heads, num_q_subtiles, *subtile), lambda g, n, i, *_: (g, i[n] - first_block, 0, 0))
    return pl.BlockSpec((kv_heads, num_kv_subtiles, *subtile), lambda g, n, i, j, *_: (g, j[n] - first_block, 0, 0))


def pallas_call_over_blocks(
    kernel: Callable[..., None],
    config: AttentionKernelConfig,
    schedule: BlockSchedule,
    inputs: dict[str, Operand],
    outputs: dict[str, Output],
    scratch: dict[str, ScratchShape],
    phase_scratch: dict[str, ScratchShape],
    *,
    segments: SegmentTables | None,
    kv_blocks_per_step: int = 1,
    name: str,
    cost: Cost,
) -> dict[str, Array]:
    """Runs `kernel(block, name_ref=..., ...)` over (head groups, visible blocks).

    Args:
        kernel: takes a `BlockContext` and, by keyword, a reference `<name>_ref` for each of the names below.
        inputs: operands by name.
        outputs: outputs by name.
        scratch: what is kept from step to step.
        phase_scratch: what is kept from phase to phase.
        kv_blocks_per_step: key blocks per step, as in `AttentionBlockSizes`.

    Returns:
        The outputs by name.
    """
    tables = {
        "q_block_table": jnp.asarray(schedule.q),
        "kv_block_table": jnp.asarray(schedule.kv),
        "flags_table": jnp.asarray(schedule.flags),
    }
    kv_heads, num_subtiles = config.block_sizes.kv_heads, dict(zip(("q", "kv"), config.num_subtiles))
    if segments is not None:
        tables["overlap_table"] = segments.overlap[:, schedule.q, schedule.kv]
        inputs = inputs | {"q_ids": Operand(segments.q_ids, "q"), "kv_ids": Operand(segments.kv_ids, "kv")}
    heads = next(iter(inputs.values())).array.shape[0]
    # The interpreter carries blocked inputs through its loop and writes every block back, so XLA copies whole arrays in
    # each step. It only reads prefetched operands: sliced in the kernel, they cost a step no more than its block.
    unblocked, blocked = (inputs, {}) if config.interpret else ({}, inputs)
    memory = scratch if config.interpret else scratch | phase_scratch
    names = (*tables, *unblocked, *blocked, *outputs, *memory)

    def body(*refs: Any) -> None:
        by_name = dict(zip(names, refs, strict=True))
        block = BlockContext(config, **{table: by_name.pop(table) for table in tables})

        def unblocked_ref(ref: Any, operand: Operand) -> UnblockedRef:
            return UnblockedRef(
                ref,
                operand.follows,
                operand.kv_axis,
                kv_heads=kv_heads,
                head_step=block.head_step,
                block=block.q_block if operand.follows == "q" else block.kv_block,
                num_subtiles=num_subtiles[operand.follows],
                kv_blocks_per_step=kv_blocks_per_step,
            )

        kernel_refs: dict[str, SubtileRef] = {
            ref_name: unblocked_ref(ref, unblocked[ref_name]) if ref_name in unblocked else BlockRef(ref, kv_heads)
            for ref_name, ref in by_name.items()
        }
        if config.interpret:
            kernel_refs |= {
                ref_name: PhaseValues(scratch_shape.dtype) for ref_name, scratch_shape in phase_scratch.items()
            }
        block.q_ids_ref, block.kv_ids_ref = kernel_refs.pop("q_ids", None), kernel_refs.pop("kv_ids", None)
        kernel(block, **{f"{ref_name}_ref": ref for ref_name, ref in kernel_refs.items()})

    run = pl.pallas_call(
        body,
        out_shape=[output.shape for output in outputs.values()],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(tables) + len(unblocked),
            grid=(heads // kv_heads, len(schedule)),
            in_specs=[block_spec(config, x.follows, *x.array.shape[2:]) for x in blocked.values()],
            out_specs=[output.spec for output in outputs.values()],
            scratch_shapes=[pltpu.VMEM((kv_heads, *shape), dtype) for shape, dtype in memory.values()],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT_BYTES
        ),
        cost_estimate=cost.to_pallas(),
        interpret=config.interpret,
        name=name,
    )
    results = run(*tables.values(), *(operand.array for operand in inputs.values()))
    return dict(zip(outputs, results, strict=True))
