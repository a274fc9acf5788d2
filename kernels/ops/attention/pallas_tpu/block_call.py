"""The `pallas_call` of the forward and backward TPU kernels: a grid over (heads, visible blocks)."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dantinox.kernels.cost import Cost
from dantinox.kernels.ops.attention.block_schedule import BlockSchedule
from dantinox.kernels.ops.attention.common import AttentionConfig, SegmentTables
from dantinox.kernels.ops.attention.pallas_tpu.block_sizes import TpuBlockSizes
from dantinox.kernels.ops.attention.pallas_tpu.common import BlockContext
from dantinox.kernels.ops.attention.pallas_tpu.refs import BlockRef

Array = jax.Array
VMEM_LIMIT_BYTES = 56 * 2**20  # of the smallest chip's 64 MiB


class Operand(NamedTuple):
    """An input of a kernel.

    Attributes:
        array: [heads, subtiles, rows, columns].
        follows: the axis of the score matrix whose block index selects the block.
    """

    array: Array
    follows: Literal["q", "kv"]


class Output(NamedTuple):
    """Shape and dtype of an output of a kernel, and how the grid writes it."""

    shape: jax.ShapeDtypeStruct
    spec: pl.BlockSpec


class ScratchShape(NamedTuple):
    """Shape, without the axis of heads, and dtype of scratch memory."""

    shape: tuple[int, ...]
    dtype: Any


def block_spec(
    config: AttentionConfig[TpuBlockSizes], follows: Literal["q", "kv"], *subtile: int, first_block: int = 0
) -> pl.BlockSpec:
    """Return the spec of a block of an array [heads, subtiles, *subtile] that follows the query or key block.

    Index maps take (head, step) and the tables; the array begins with block `first_block`.
    """
    num_q_subtiles, num_kv_subtiles = config.num_subtiles
    if follows == "q":
        return pl.BlockSpec((1, num_q_subtiles, *subtile), lambda g, n, i, *_: (g, i[n] - first_block, 0, 0))
    return pl.BlockSpec((1, num_kv_subtiles, *subtile), lambda g, n, i, j, *_: (g, j[n] - first_block, 0, 0))


def pallas_call_over_blocks(
    kernel: Callable[..., None],
    config: AttentionConfig[TpuBlockSizes],
    schedule: BlockSchedule,
    inputs: dict[str, Operand],
    outputs: dict[str, Output],
    scratch: dict[str, ScratchShape],
    *,
    segments: SegmentTables | None,
    name: str,
    cost: Cost,
) -> dict[str, Array]:
    """Run `kernel(block, name_ref=..., ...)` over (heads, visible blocks).

    Args:
        kernel: takes a `BlockContext` and, by keyword, a reference `<name>_ref` for each of the names below.
        config: static parameters of the kernel.
        schedule: the visible blocks.
        inputs: operands by name.
        outputs: outputs by name.
        scratch: memory that the steps and the phases of a step share, by name.
        segments: segment ids, or None.
        name: name of the kernel.
        cost: cost estimate for the compiler.

    Returns:
        The outputs by name.
    """
    tables = {
        "q_block_table": jnp.asarray(schedule.q),
        "kv_block_table": jnp.asarray(schedule.kv),
        "flags_table": jnp.asarray(schedule.flags),
    }
    if segments is not None:
        tables["overlap_table"] = segments.overlap[:, schedule.q, schedule.kv]
        inputs = inputs | {"q_ids": Operand(segments.q_ids, "q"), "kv_ids": Operand(segments.kv_ids, "kv")}
    heads = next(iter(inputs.values())).array.shape[0]
    names = (*tables, *inputs, *outputs, *scratch)

    def body(*refs: Any) -> None:
        by_name = dict(zip(names, refs, strict=True))
        block = BlockContext(config, **{table: by_name.pop(table) for table in tables})
        kernel_refs = {ref_name: BlockRef(ref) for ref_name, ref in by_name.items()}
        block.q_ids_ref, block.kv_ids_ref = kernel_refs.pop("q_ids", None), kernel_refs.pop("kv_ids", None)
        kernel(block, **{f"{ref_name}_ref": ref for ref_name, ref in kernel_refs.items()})

    run = pl.pallas_call(
        body,
        out_shape=[output.shape for output in outputs.values()],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(tables),
            grid=(heads, len(schedule)),
            in_specs=[block_spec(config, x.follows, *x.array.shape[2:]) for x in inputs.values()],
            out_specs=[output.spec for output in outputs.values()],
            scratch_shapes=[pltpu.VMEM((1, *shape), dtype) for shape, dtype in scratch.values()],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT_BYTES
        ),
        cost_estimate=cost.to_pallas(),
        name=name,
    )
    results = run(*tables.values(), *(operand.array for operand in inputs.values()))
    return dict(zip(outputs, results, strict=True))
