"""Warp-specialized pipeline of the Hopper grouped matmuls: warpgroup roles, SMEM stages between them, persistent tiles.

    warpgroup 2    tile 0: load load load load   tile 1: load load load load          producer: TMA into empty stages
    SMEM stages    ▓▓▓▓ filled by one warpgroup, released by two ▓▓▓▓
    warpgroup 0    tile 0:   multiply multiply multiply write   tile 1: multiply
    warpgroup 1    tile 0:    multiply multiply multiply write   tile 1: multiply

A consumer warpgroup releases a stage when its own wgmma has read it, and the last stage of a tile before it stores the
tile, so the producer already loads the next tile. The consumers are not synchronized otherwise: one may store while the
other still multiplies.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dantinox.kernels.mosaic_gpu import SWIZZLES, swizzled_smem
from dantinox.kernels.ops.grouped_matmul.pallas_sm90.block_sizes import BLOCK_M, WARPGROUP_ROWS
from dantinox.kernels.ops.grouped_matmul.pallas_sm90.tile_scheduler import WarpgroupRows

Array = jax.Array
Ref = Any  # a reference in GMEM or SMEM, or barriers
COMPUTE_WARPGROUPS = BLOCK_M // WARPGROUP_ROWS  # consumers; a third warpgroup is the producer
CHUNK_COLUMNS = 64  # columns per store: those of the widest swizzle of 16-bit values; TMA drops those past the last
STORE_BUFFERS = 2  # SMEM buffers of one chunk, per consumer
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 240, 24
ROW_LAYOUT = plgpu.Layout.WGMMA.reduce(1)  # one value per row of an accumulator


class Sm90GmmConfig(NamedTuple):
    """Launch options of the kernels. Hashable, since `vjp.py` passes it to custom_vjp."""

    num_sms: int  # persistent thread blocks
    interpret: plgpu.InterpretGPUParams | None = None  # None compiles; the parameters interpret the kernels on the CPU
    width: int | None = None  # columns per tile, of all weights together; None lets `block_sizes.py` choose

    def allowed_widths(self, *widths: int) -> tuple[int, ...]:
        """Return the configured width alone if a kernel supports it, else all the widths that it supports."""
        return (self.width,) if self.width in widths else widths


class SmemPipeline(NamedTuple):
    """A ring buffer of SMEM stages between the producer, which fills them in order, and the consumers.

    Steps are numbered from 0 over all tiles of a thread block; each fills one stage.

    Attributes:
        full: one barrier per stage, completed by the copies that fill it.
        empty: one barrier per stage, completed by the consumers that release it.
        stages: number of stages, a power of two.
    """

    full: Ref
    empty: Ref
    stages: int

    def slot(self, step: Array) -> Array:
        """Return the stage that a step fills."""
        return step & (self.stages - 1)

    def produce(self, step: Array, copy: Callable[[Array], None]) -> None:
        """Run copy(slot) once the consumers have released the stage."""

        @pl.when(step >= self.stages)
        def wait_until_empty() -> None:
            plgpu.barrier_wait(self.empty.at[self.slot(step)])

        copy(self.slot(step))

    def consumer_wait(self, step: Array) -> None:
        """Wait until the stage of a step has been filled."""
        plgpu.barrier_wait(self.full.at[self.slot(step)])

    def consumer_release(self, step: Array) -> None:
        """Release the stage of a step."""
        plgpu.barrier_arrive(self.empty.at[self.slot(step)])

    def skip(self, first_step: Array, num_steps: Any) -> None:
        """Release the stages of steps that this consumer does not use."""

        @pl.loop(0, num_steps)
        def wait_and_release(k: Array) -> None:
            self.consumer_wait(first_step + k)
            self.consumer_release(first_step + k)

    def drain(self, num_steps: Array) -> None:
        """Wait until all stages are empty, after `num_steps` steps."""

        @pl.loop(jnp.maximum(num_steps - self.stages, 0), num_steps)
        def wait_until_empty(step: Array) -> None:
            plgpu.barrier_wait(self.empty.at[self.slot(step)])


def store_smem(dtype: Any, swizzle: int) -> Any:
    """Return the type of the buffers from which the consumers store chunks of a tile, in rows of `swizzle` bytes."""
    columns = CHUNK_COLUMNS if swizzle > SWIZZLES[-1] else swizzle // jnp.dtype(dtype).itemsize
    # The narrowest tiles side by side would have bank conflicts, so each is an array of its own.
    shape = COMPUTE_WARPGROUPS, STORE_BUFFERS, CHUNK_COLUMNS // columns, WARPGROUP_ROWS, columns
    return swizzled_smem(shape, dtype, swizzle, tile_rows=1)  # a store may begin at any row


def full_barriers(stages: int, *, copies: int) -> Any:
    """Return the type of a pipeline's full barriers, for `copies` TMA copies per stage."""
    return plgpu.Barrier(num_arrivals=copies, num_barriers=stages)


def empty_barriers(stages: int) -> Any:
    """Return the type of a pipeline's empty barriers."""
    return plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=stages)


class WarpgroupRoles(Protocol):
    """A kernel on one thread block: the work of its producer and its consumers on each tile."""

    def for_each_tile(self, run_tile: Callable[[Any], None]) -> Array:
        """Run run_tile(tile) for the tiles of this thread block; return the number of pipeline steps."""

    def load(self, tile: Any) -> None:
        """Fill the pipeline stages of a tile; the producer calls this."""

    def compute(self, tile: Any) -> None:
        """Read and release the pipeline stages of a tile and store its results; a consumer calls this."""


def launch_warp_specialized(
    make_roles: Callable[..., WarpgroupRoles],
    inputs: Any,
    outputs: Any,
    scratch: Any,
    config: Sm90GmmConfig,
    *,
    stages: int,
    name: str,
) -> Any:
    """Launch one persistent thread block per SM; its last warpgroup is the producer, the others are consumers.

    Args:
        make_roles: called as make_roles(inputs, outputs, scratch, pipeline, warpgroup), with references in the first
            three NamedTuples.
        inputs: namedTuple of arrays, tuples of arrays or None.
        outputs: namedTuple of the shapes of the results, or None.
        scratch: namedTuple of shared memory and barriers in order of allocation, or None; it has `full` and `empty`.
        config: see `Sm90GmmConfig`.
        stages: SMEM stages of the pipeline.
        name: name of the kernel.

    Returns:
        The results, in the structure of `outputs`.
    """

    def kernel_body(*refs: Ref) -> None:
        out_start, scratch_start = len(inputs), len(inputs) + len(outputs)
        gmem = type(inputs)(*refs[:out_start])
        out = type(outputs)(*refs[out_start:scratch_start])
        smem = type(scratch)(*refs[scratch_start:])
        warpgroup = lax.axis_index("warpgroup")
        pipeline = SmemPipeline(smem.full, smem.empty, stages)
        roles = make_roles(gmem, out, smem, pipeline, warpgroup)

        @pl.when(warpgroup < COMPUTE_WARPGROUPS)
        def consumer() -> None:
            plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
            roles.for_each_tile(roles.compute)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == COMPUTE_WARPGROUPS)
        def producer() -> None:
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
            pipeline.drain(roles.for_each_tile(roles.load))

    return plgpu.kernel(
        kernel_body,
        out_type=outputs,
        scratch_types=scratch,
        grid=(config.num_sms,),
        grid_names=("block",),
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="warpgroup",
        # Row sums are reduced between the registers of four neighbouring threads, without shared memory.
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=16),
        interpret=config.interpret or False,
        kernel_name=name,
    )(*inputs)


def wgmma_reduce(
    pipeline: SmemPipeline,
    first_step: Array,
    num_steps: Any,
    operands: Callable[[Any, Array], Sequence[tuple[Any, Any]]],
    *columns: int,
) -> tuple[Array, ...]:
    """Sum the products of operands(k, slot) over `num_steps` pipeline steps, one accumulator each.

    The products of one step are still in flight when those of the next start.

    Args:
        pipeline: filled by the producer.
        first_step: number of the first step.
        num_steps: number of steps.
        operands: returns a pair of wgmma operands per accumulator for the k-th of these steps.
        columns: columns of each accumulator, which has `WARPGROUP_ROWS` rows.
    """

    def accumulate(*accs: Any) -> tuple[Array, ...]:
        def accumulate_step(k: Array, _: None) -> None:
            pipeline.consumer_wait(first_step + k)
            for acc, (a, b) in zip(accs, operands(k, pipeline.slot(first_step + k)), strict=True):
                plgpu.wgmma(acc, a, b)
            plgpu.wgmma_wait(len(accs))

            @pl.when(k > 0)
            def release_previous() -> None:
                pipeline.consumer_release(first_step + k - 1)

        lax.fori_loop(0, num_steps, accumulate_step, None)
        plgpu.wgmma_wait(0)

        @pl.when(num_steps > 0)
        def release_last() -> None:
            pipeline.consumer_release(first_step + num_steps - 1)

        return tuple(acc[...] for acc in accs)

    return pl.run_scoped(accumulate, *(plgpu.ACC((WARPGROUP_ROWS, n)) for n in columns))


def store_chunk_async(buffers: Ref, n: int, value: Array, start_copy: Callable[[int, Ref], None]) -> None:
    """Start to store the n-th chunk of a tile, [WARPGROUP_ROWS, CHUNK_COLUMNS], through shared memory.

    Args:
        buffers: the consumer's part of `store_smem`.
        n: index of the chunk.
        value: the chunk.
        start_copy: called as start_copy(column of the chunk, buffer of some columns); starts their copies to global
            memory.
    """
    _, parts, _, columns = buffers.shape
    pieces = [(i * columns, buffers.at[n % STORE_BUFFERS, i]) for i in range(parts)]
    # For n = 0 this waits for the stores of the previous tile, which ended long before.
    plgpu.wait_smem_to_gmem(STORE_BUFFERS - 1 if n else 0, wait_read_only=True)
    for first, buffer in pieces:
        buffer[...] = value[:, first : first + columns].astype(buffer.dtype)
    plgpu.commit_smem()
    for first, buffer in pieces:
        start_copy(first, buffer)
    plgpu.commit_smem_to_gmem_group()


def for_each_chunk(columns: int, remaining: Any, run_chunk: Callable[[int], None]) -> None:
    """Call run_chunk(first column) for every chunk of a tile that has any of the remaining columns."""
    for first_column in range(0, columns, CHUNK_COLUMNS):
        if isinstance(remaining, int) and remaining >= columns:
            run_chunk(first_column)
        else:
            pl.when(first_column < remaining)(functools.partial(run_chunk, first_column))


def copy_rows_by_powers_of_two(rows: WarpgroupRows, target: Ref, chunk_column: Array, first: int, buffer: Ref) -> None:
    """Start the copies of a consumer's rows of some columns of a chunk to `target`: TMA needs static sizes."""

    def copy(start: Any, size: int) -> None:
        destination = target.at[pl.ds(rows.first + start, size), pl.ds(chunk_column + first, buffer.shape[-1])]
        plgpu.copy_smem_to_gmem(buffer.at[pl.ds(start, size)], destination, commit_group=False)

    @pl.when(rows.count == WARPGROUP_ROWS)
    def copy_all() -> None:
        copy(0, WARPGROUP_ROWS)

    # A separate branch; otherwise the compiler computes the addresses of all runs first and keeps them in registers.
    @pl.when(rows.count < WARPGROUP_ROWS)
    def copy_runs() -> None:
        size = WARPGROUP_ROWS // 2
        while size:
            start = rows.offset + (rows.count & -(2 * size))  # after the larger runs
            pl.when((rows.count & size) != 0)(functools.partial(copy, start, size))
            size //= 2
