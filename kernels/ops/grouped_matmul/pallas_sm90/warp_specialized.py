"""Warp-specialized pipeline of the Hopper grouped matmuls: warpgroup roles, SMEM stages between them, persistent tiles.

    warpgroup 2    tile 0: load load load load   tile 1: load load load load          producer: TMA into empty stages
    SMEM stages    ▓▓▓▓ filled by one warpgroup, released by two ▓▓▓▓
    warpgroup 0    tile 0:   multiply multiply multiply write   tile 1: multiply
    warpgroup 1    tile 0:    multiply multiply multiply write   tile 1: multiply

A consumer warpgroup releases a stage when its own product has read it, and the last stage of a tile before it stores
the tile, so the producer already loads the next tile. The consumers are not synchronized otherwise: one may store while
the other still multiplies.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dantinox.kernels.ops.grouped_matmul.group_metadata import GroupMetadata, TileTask, make_group_metadata
from dantinox.kernels.ops.grouped_matmul.pallas_sm90.block_sizes import HEIGHT, ROWS

Array = jax.Array
WARPGROUPS = HEIGHT // ROWS  # consumers
CHUNK, CHUNKS = 64, 2  # columns per store; SMEM buffers for stores
SIDE = 8  # rows of a TMA tile
PANEL = 16  # row tiles whose columns are processed together
COMPUTE_REGISTERS, MEMORY_REGISTERS = 240, 24
ROW = plgpu.Layout.WGMMA.reduce(1)  # one value per row of an accumulator

Roles = tuple[Callable[[Callable[..., None]], Array], Callable[..., None], Callable[..., None]]


class Static(NamedTuple):
    """Static parameters of the kernels."""

    cores: int
    interpret: plgpu.InterpretGPUParams | None = None  # None compiles; the parameters interpret the kernels on the CPU
    width: int | None = None  # columns of a tile; None lets `block_sizes.py` choose

    def among(self, *widths: int) -> tuple[int, ...]:
        """The given width where it is one of these, else all of them."""
        return (self.width,) if self.width in widths else widths


class Ring(NamedTuple):
    """A circular buffer of SMEM stages, a power of two: one warpgroup fills them in order, the others release them.

    Fillings are numbered from 0 on, over all tiles of a thread block.

    Attributes:
        here: full barriers, one per stage.
        free: empty barriers, one per stage.
        stages: number of stages.
    """

    here: Any
    free: Any
    stages: int

    def stage(self, n: Array) -> Array:
        """Returns the stage of the n-th filling."""
        return n & (self.stages - 1)

    def fill(self, n: Array, copy: Callable[[Array], None]) -> None:
        """Runs copy(stage) once the consumers have released the stage."""
        pl.when(n >= self.stages)(lambda: plgpu.barrier_wait(self.free.at[self.stage(n)]))
        copy(self.stage(n))

    def wait(self, n: Array) -> None:
        """Waits until the n-th filling has arrived."""
        plgpu.barrier_wait(self.here.at[self.stage(n)])

    def release(self, n: Array) -> None:
        """Releases the stage of the n-th filling."""
        plgpu.barrier_arrive(self.free.at[self.stage(n)])

    def skip(self, first: Array, fillings: Any) -> None:
        """Releases fillings that this warpgroup does not use."""

        @pl.loop(0, fillings)
        def wait_and_release(k: Array) -> None:
            self.wait(first + k)
            self.release(first + k)

    def drain(self, used: Array) -> None:
        """Waits until all stages are empty."""

        @pl.loop(jnp.maximum(used - self.stages, 0), used)
        def wait_until_empty(n: Array) -> None:
            plgpu.barrier_wait(self.free.at[self.stage(n)])


def launch(
    roles: Callable[..., Roles],
    arrays: Sequence[Array],
    outs: Sequence[jax.ShapeDtypeStruct],
    static: Static,
    *,
    stages: int,
    copies: int,
    rings: Mapping[str, tuple[int, ...]],
    dtype: Any,
    scratch: Mapping[str, Any] | None = None,
    name: str,
) -> list[Array]:
    """Launches one persistent thread block per SM; its last warpgroup loads, the others multiply.

    Args:
        roles: (references to `arrays` and `outs`, ring=, staged=, and those of `rings` and `scratch` by name) ->
            (walk, load, compute), where walk(run) calls run for every tile of the thread block and returns the number
            of fillings.
        arrays: operands.
        outs: shapes of the results.
        stages: SMEM stages.
        copies: TMA copies per stage.
        rings: shape per stage of each operand in SMEM, by name.
        dtype: of the stages and of the store buffers.
        scratch: further scratch memory, by name.
        name: of the kernel.
    """
    swizzled = lambda *tile: (plgpu.TilingTransform(tile), plgpu.SwizzleTransform(128))
    shared = {
        **{ring: plgpu.SMEM((stages, *s), dtype, transforms=swizzled(8, CHUNK)) for ring, s in rings.items()},
        # TMA tiles of one row, because a store may begin at any row.
        "staged": plgpu.SMEM((WARPGROUPS, CHUNKS, ROWS, CHUNK), dtype, transforms=swizzled(1, CHUNK)),
        "here": plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        "free": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
    }

    def body(*refs: Any, here: Any, free: Any, staged: Any, **memory: Any) -> None:
        warpgroup = lax.axis_index("warpgroup")
        ring = Ring(here, free, stages)
        walk, load, compute = roles(*refs, warpgroup=warpgroup, ring=ring, staged=staged.at[warpgroup], **memory)

        @pl.when(warpgroup < WARPGROUPS)
        def consumer() -> None:
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            walk(compute)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == WARPGROUPS)
        def producer() -> None:
            plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")
            ring.drain(walk(load))

    return plgpu.kernel(
        body,
        out_type=list(outs),
        scratch_types=shared | dict(scratch or {}),
        grid=(static.cores,),
        grid_names=("block",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        # Row sums are reduced between the registers of four neighbouring threads, without shared memory.
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=16),
        interpret=static.interpret or False,
        kernel_name=name,
    )(*arrays)


def snake_order(n: Array, down: Any, across: int) -> tuple[Array, Array]:
    """Returns (row, column) of the n-th of down x across tiles: panel by panel, every second one from right to left.

    As `plgpu.planar_snake`, but for a number of rows that is known on the device only.
    """
    panel = lax.div(n, jnp.int32(PANEL * across))
    n = n - panel * (PANEL * across)
    height = jnp.minimum(PANEL, down - panel * PANEL)
    column = lax.div(n, height)
    row = panel * PANEL + n - column * height
    return row, jnp.where(panel % 2 == 1, across - 1 - column, column)


def for_each_persistent_tile(total: Any, run: Callable[[Array, Array], Array]) -> Array:
    """Runs used = run(n, used) for the tiles n of this thread block; `used` counts the fillings, from 0 on."""
    blocks = lax.axis_size("block")
    num_tiles = lax.div(total - lax.axis_index("block") + (blocks - 1), jnp.int32(blocks))

    def step(n: Array, used: Array) -> Array:
        return run(lax.axis_index("block") + n * blocks, used)

    return lax.fori_loop(0, num_tiles, step, jnp.int32(0))


class Task(NamedTuple):
    """A tile of one group: its visit, the number of that, its first column, its first filling and their number."""

    visit: TileTask
    number: Array
    column: Array
    used: Array
    fillings: Array

    def rows_for_warpgroup(self, warpgroup: Array) -> tuple[Array, Array, Array]:
        """Returns (first row of this warpgroup, low, count): its rows low <= n < low + count belong to the visit."""
        first = self.visit.row + warpgroup * ROWS
        low = jnp.maximum(self.visit.row_start - first, 0)
        return first, low, jnp.maximum(jnp.minimum(self.visit.row_end - first, ROWS) - low, 0)


def plan(group_sizes: Array, N: int) -> GroupMetadata:
    """Returns the visits of N rows in tiles of `HEIGHT` rows, aligned for TMA."""
    return make_group_metadata(group_sizes, N, HEIGHT, align=SIDE)


def table(metadata: GroupMetadata) -> tuple[Array, Array]:
    """Packs the metadata into one table for a kernel, with the number of its rows."""
    return jnp.stack(metadata[1:], axis=1), metadata.count[None]


def tasks(
    table: Any, count: Array, E: int, across: int, columns: int, fillings: Callable[[Array], Any]
) -> Callable[..., Array]:
    """Returns walk(run) -> fillings, for `across` tiles of `columns` columns per visit.

    Args:
        fillings: stages that a tile fills, by its first column; tiles of unassigned rows fill none.
    """

    def walk(run: Callable[[Task], None]) -> Array:
        def run_tile(n: Array, used: Array) -> Array:
            number, column = snake_order(n, count, across)
            visit = TileTask(*(table[number, field] for field in range(4)))
            first = column * columns
            task = Task(visit, number, first, used, jnp.where(visit.group < E, fillings(first), 0))
            run(task)
            return used + task.fillings

        return for_each_persistent_tile(count * across, run_tile)

    return walk


def wgmma_reduce(
    ring: Ring, used: Array, steps: Any, operands: Callable[[Any, Array], Sequence[tuple[Any, Any]]], *columns: int
) -> tuple[Array, ...]:
    """Sums the products of `operands(step, stage)` over `steps` fillings from the `used`-th on, one accumulator each.

    The products of one step are still in flight when those of the next start.

    Args:
        columns: columns of each accumulator, which has `ROWS` rows.
    """

    def accumulate(*accs: Any) -> tuple[Array, ...]:
        def step(k: Array, _: None) -> None:
            ring.wait(used + k)
            for acc, pair in zip(accs, operands(k, ring.stage(used + k)), strict=True):
                plgpu.wgmma(acc, *pair)
            plgpu.wgmma_wait(len(accs))
            pl.when(k > 0)(lambda: ring.release(used + k - 1))

        lax.fori_loop(0, steps, step, None)
        plgpu.wgmma_wait(0)
        pl.when(steps > 0)(lambda: ring.release(used + steps - 1))
        return tuple(acc[...] for acc in accs)

    return pl.run_scoped(accumulate, *(plgpu.ACC((ROWS, n)) for n in columns))


def leave(staged: Any, n: int, value: Array, send: Callable[[Any], None]) -> None:
    """Starts to store the n-th chunk of a tile, [ROWS, CHUNK], through shared memory."""
    chunk = staged.at[n % CHUNKS]
    # The stores of the previous tile have ended long before.
    plgpu.wait_smem_to_gmem(CHUNKS - 1 if n else 0, wait_read_only=True)
    chunk[...] = value.astype(chunk.dtype)
    plgpu.commit_smem()
    send(chunk)
    plgpu.commit_smem_to_gmem_group()


def chunks(columns: int, remaining: Any, run: Callable[[int], None]) -> None:
    """Calls run(first column) for every chunk of a tile that has any of the remaining columns."""
    for first in range(0, columns, CHUNK):
        if isinstance(remaining, int) and remaining >= columns:
            run(first)
        else:
            pl.when(first < remaining)(functools.partial(run, first))


def for_each_power_of_two_run(low: Array, count: Array, copy: Callable[[Any, int], None]) -> None:
    """Calls copy(first, size) for runs that cover the rows low <= n < low + count: TMA needs static sizes."""
    pl.when(count == ROWS)(lambda: copy(0, ROWS))

    # In its own branch; otherwise the compiler computes the addresses of all runs first and keeps them in registers.
    @pl.when(count < ROWS)
    def copy_runs() -> None:
        size = ROWS // 2
        while size:
            start = low + (count & -(2 * size))  # after the larger runs
            pl.when((count & size) != 0)(functools.partial(copy, start, size))
            size //= 2
