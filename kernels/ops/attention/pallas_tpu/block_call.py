"""The `pallas_call` of the forward and backward TPU kernels: a grid over (heads, visible blocks)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dantinox.kernels.cost import Cost
from dantinox.kernels.ops.attention.block_schedule import BlockSchedule
from dantinox.kernels.ops.attention.common import AttentionConfig, SegmentTables
from dantinox.kernels.ops.attention.pallas_tpu.block_sizes import VMEM_LIMIT_BYTES, TpuBlockSizes
from dantinox.kernels.ops.attention.pallas_tpu.common import BlockContext, pack_blocks, unpack_block
from dantinox.kernels.ops.attention.pallas_tpu.refs import BlockRef, QueriesRef

Array = jax.Array
Config = AttentionConfig[TpuBlockSizes]


class Blocked(NamedTuple):
    """An input or output of a kernel.

    Attributes:
        array: the input, or shape and dtype of the output.
        spec: the block of each step; its index map takes (head, step) and the tables.
        ref: how the kernel reads and writes the block.
    """

    array: Any
    spec: pl.BlockSpec
    ref: Callable[[Any], BlockRef] = BlockRef


class QBlockRange(NamedTuple):
    """Query blocks that an array has blocks for; the steps of others stay at the nearest of them.

    Attributes:
        start: the first.
        stop: the one after the last.
    """

    start: int
    stop: int

    def clamp(self, q_block: Any) -> Any:
        """Return the nearest query block of the range."""
        return jnp.clip(q_block, self.start, self.stop - 1)


class ScratchShape(NamedTuple):
    """Shape, without the axis of heads, and dtype of scratch memory."""

    shape: tuple[int, ...]
    dtype: Any


def row_blocks(config: Config, array: Any, held: QBlockRange | None = None) -> Blocked:
    """Return an array [heads, query subtiles, n, rows] in query blocks; it holds all of them, or only `held`."""
    num_q_subtiles, _ = config.num_subtiles

    def index_map(g: Any, n: Any, blocks: Any, *_: Any) -> tuple[Any, ...]:
        q_block = unpack_block(blocks[n]).q
        return g, q_block if held is None else held.clamp(q_block) - held.start, 0, 0

    return Blocked(array, pl.BlockSpec((1, num_q_subtiles, *array.shape[2:]), index_map))


def query_blocks(config: Config, array: Any, written: QBlockRange | None = None) -> Blocked:
    """Return an array [heads, G, T, D] in query blocks; an output's steps write all of them, or only `written`."""
    rows, _ = config.block_sizes.subtile(config.G)
    block_shape = (1, config.G, config.block_sizes.block_q, array.shape[3])

    def index_map(g: Any, n: Any, blocks: Any, *_: Any) -> tuple[Any, ...]:
        q_block = unpack_block(blocks[n]).q
        return g, 0, q_block if written is None else written.clamp(q_block), 0

    return Blocked(array, pl.BlockSpec(block_shape, index_map), lambda ref: QueriesRef(ref, rows))


def key_blocks(config: Config, array: Any) -> Blocked:
    """Return an array [heads, key subtiles, ...] in key blocks."""
    _, num_kv_subtiles = config.num_subtiles
    block_shape = (1, num_kv_subtiles, *array.shape[2:])
    return Blocked(array, pl.BlockSpec(block_shape, lambda g, n, blocks, *_: (g, unpack_block(blocks[n]).kv, 0, 0)))


def pallas_call_over_blocks(
    kernel: Callable[..., None],
    config: Config,
    schedule: BlockSchedule,
    inputs: dict[str, Blocked],
    outputs: dict[str, Blocked],
    scratch: dict[str, ScratchShape],
    *,
    segments: SegmentTables | None,
    name: str,
    cost: Cost,
    written: dict[str, Array] | None = None,
) -> dict[str, Array]:
    """Run `kernel(block, name_ref=..., ...)` over (heads, visible blocks).

    Args:
        kernel: takes a `BlockContext` and, by keyword, a reference `<name>_ref` for each of the names below.
        config: static parameters of the kernel.
        schedule: the visible blocks.
        inputs: inputs by name.
        outputs: outputs by name.
        scratch: memory that the steps and the phases of a step share, by name.
        segments: segment ids, or None.
        name: name of the kernel.
        cost: cost estimate for the compiler.
        written: arrays that outputs are written into, by name; blocks that no step writes keep their contents.

    Returns:
        The outputs by name.
    """
    tables = {"block_table": jnp.asarray(pack_blocks(schedule))}
    if segments is not None:
        tables["overlap_table"] = segments.overlap[:, schedule.q, schedule.kv]
        ids = {"q_ids": row_blocks(config, segments.q_ids), "kv_ids": key_blocks(config, segments.kv_ids)}
        inputs = inputs | ids
    written = written or {}
    heads = next(iter(inputs.values())).array.shape[0]
    names = (*tables, *inputs, *(f"{output} so far" for output in written), *outputs, *scratch)

    def body(*refs: Any) -> None:
        by_name = dict(zip(names, refs, strict=True))
        block = BlockContext(config, **{table: by_name.pop(table) for table in tables})
        for output in written:
            del by_name[f"{output} so far"]
        wrappers = {ref_name: x.ref for ref_name, x in (inputs | outputs).items()}
        kernel_refs = {ref_name: wrappers.get(ref_name, BlockRef)(ref) for ref_name, ref in by_name.items()}
        block.q_ids_ref, block.kv_ids_ref = kernel_refs.pop("q_ids", None), kernel_refs.pop("kv_ids", None)
        kernel(block, **{f"{ref_name}_ref": ref for ref_name, ref in kernel_refs.items()})

    first_written = len(tables) + len(inputs)
    run = pl.pallas_call(
        body,
        out_shape=[output.array for output in outputs.values()],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(tables),
            grid=(heads, len(schedule)),
            in_specs=[*(x.spec for x in inputs.values()), *(pl.BlockSpec(memory_space=pl.ANY) for _ in written)],
            out_specs=[output.spec for output in outputs.values()],
            scratch_shapes=[pltpu.VMEM((1, *shape), dtype) for shape, dtype in scratch.values()],
        ),
        input_output_aliases={first_written + n: list(outputs).index(output) for n, output in enumerate(written)},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_LIMIT_BYTES,
            disable_bounds_checks=True,  # the tables name blocks of the arrays only
        ),
        cost_estimate=cost.to_pallas(),
        name=name,
    )
    results = run(*tables.values(), *(x.array for x in inputs.values()), *written.values())
    return dict(zip(outputs, results, strict=True))
