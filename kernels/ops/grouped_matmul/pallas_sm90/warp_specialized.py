"""What the grouped matmuls share on Hopper: roles of a thread block's warpgroups, the ring between them, the launch.

    warpgroup 2    tile 0: load load load load   tile 1: load load load load          by TMA, while a stage is free
    the ring       ▓▓▓▓ stages, filled by one, released by two ▓▓▓▓
    warpgroup 0    tile 0:   multiply multiply multiply write   tile 1: multiply
    warpgroup 1    tile 0:    multiply multiply multiply write   tile 1: multiply

A warpgroup that multiplies releases a stage when its own product is done with it, the last one of a tile before it
writes: what the next tile needs is loaded meanwhile. Nothing else makes the two wait for each other, so one may write
while the other still multiplies.
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
WARPGROUPS = HEIGHT // ROWS  # that multiply
CHUNK, CHUNKS = 64, 2  # columns that are written at once; such pieces of shared memory
SIDE = 8  # rows of a TMA tile
PANEL = 16  # tiles of rows whose columns are multiplied at the same time
COMPUTE_REGISTERS, MEMORY_REGISTERS = 240, 24
ROW = plgpu.Layout.WGMMA.reduce(1)  # a number a row of the sums

Roles = tuple[Callable[[Callable[..., None]], Array], Callable[..., None], Callable[..., None]]


class Static(NamedTuple):
    """What is fixed when the kernels are traced."""

    cores: int
    interpret: plgpu.InterpretGPUParams | None = None  # None compiles; the parameters interpret the kernels on the CPU
    width: int | None = None  # columns of a tile; None lets `block_sizes.py` choose

    def among(self, *widths: int) -> tuple[int, ...]:
        """The given width where it is one of these, else all of them."""
        return (self.width,) if self.width in widths else widths


class Ring(NamedTuple):
    """Stages of shared memory, a power of two: filled in order by one warpgroup, released by the others.

    Fillings are numbered from 0 on, over all tiles of a block.
    """

    here: Any
    free: Any
    stages: int

    def stage(self, n: Array) -> Array:
        """Where the n-th filling lies."""
        return n & (self.stages - 1)

    def fill(self, n: Array, copy: Callable[[Array], None]) -> None:
        """copy(stage) once those that multiply have released what lay there."""
        pl.when(n >= self.stages)(lambda: plgpu.barrier_wait(self.free.at[self.stage(n)]))
        copy(self.stage(n))

    def wait(self, n: Array) -> None:
        """Until the n-th filling is here."""
        plgpu.barrier_wait(self.here.at[self.stage(n)])

    def release(self, n: Array) -> None:
        """This warpgroup needs the n-th filling no more."""
        plgpu.barrier_arrive(self.free.at[self.stage(n)])

    def skip(self, first: Array, fillings: Any) -> None:
        """Releases fillings that this warpgroup has no use for."""

        @pl.loop(0, fillings)
        def _(k: Array) -> None:
            self.wait(first + k)
            self.release(first + k)

    def drain(self, used: Array) -> None:
        """Until all stages are free."""

        @pl.loop(jnp.maximum(used - self.stages, 0), used)
        def _(n: Array) -> None:
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
    """One block a core; its last warpgroup loads, the others multiply.

    Args:
        roles: (references to `arrays` and `outs`, ring=, staged=, and those of `rings` and `scratch` by name) ->
            (walk, load, compute), where walk(run) calls run for every tile of the block, its first filling among the
            arguments, and returns how many fillings there were.
        rings: shapes of what a stage has; copies: that fill it.
        dtype: of the rings and of what is on its way out.
    """
    swizzled = lambda *tile: (plgpu.TilingTransform(tile), plgpu.SwizzleTransform(128))
    shared = {
        **{ring: plgpu.SMEM((stages, *s), dtype, transforms=swizzled(8, CHUNK)) for ring, s in rings.items()},
        # Tiles of one row: the rows that a store takes may begin anywhere.
        "staged": plgpu.SMEM((WARPGROUPS, CHUNKS, ROWS, CHUNK), dtype, transforms=swizzled(1, CHUNK)),
        "here": plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        "free": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
    }

    def body(*refs: Any, here: Any, free: Any, staged: Any, **memory: Any) -> None:
        warpgroup = lax.axis_index("warpgroup")
        ring = Ring(here, free, stages)
        walk, load, compute = roles(*refs, warpgroup=warpgroup, ring=ring, staged=staged.at[warpgroup], **memory)

        @pl.when(warpgroup < WARPGROUPS)
        def _() -> None:
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            walk(compute)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == WARPGROUPS)
        def _() -> None:
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
        # What is summed over a row lies in the registers of four neighbours: no shared memory is kept for that.
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=16),
        interpret=static.interpret or False,
        kernel_name=name,
    )(*arrays)


def place(n: Array, down: Any, across: int) -> tuple[Array, Array]:
    """(row, column) of the n-th of down x across tiles: panel after panel, every second one from right to left."""
    panel = lax.div(n, jnp.int32(PANEL * across))
    n = n - panel * (PANEL * across)
    height = jnp.minimum(PANEL, down - panel * PANEL)
    column = lax.div(n, height)
    row = panel * PANEL + n - column * height
    return row, jnp.where(panel % 2 == 1, across - 1 - column, column)


def every(total: Any, run: Callable[[Array, Array], Array]) -> Array:
    """used = run(n, used) for the tiles n of this block; `used` counts the fillings, from 0 on."""
    blocks = lax.axis_size("block")
    mine = lax.div(total - lax.axis_index("block") + (blocks - 1), jnp.int32(blocks))
    step = lambda n, used: run(lax.axis_index("block") + n * blocks, used)
    return lax.fori_loop(0, mine, step, jnp.int32(0))


class Task(NamedTuple):
    """A tile of rows of a group: the visit, its number, the first column, the first filling and how many there are."""

    visit: TileTask
    number: Array
    column: Array
    used: Array
    fillings: Array

    def rows_for_warpgroup(self, warpgroup: Array) -> tuple[Array, Array, Array]:
        """(the first of this warpgroup's rows; low, count: the rows low <= n < low + count of them are the visit's)."""
        first = self.visit.row + warpgroup * ROWS
        low = jnp.maximum(self.visit.row_start - first, 0)
        return first, low, jnp.maximum(jnp.minimum(self.visit.row_end - first, ROWS) - low, 0)


def plan(group_sizes: Array, N: int) -> GroupMetadata:
    """The visits of N rows in tiles of `HEIGHT` that begin where TMA can."""
    return make_group_metadata(group_sizes, N, HEIGHT, align=SIDE)


def table(of: GroupMetadata) -> tuple[Array, Array]:
    """What a kernel reads of a plan, and how much there is of it."""
    return jnp.stack(of[1:], axis=1), of.count[None]


def tasks(
    table: Any, count: Array, E: int, across: int, columns: int, fillings: Callable[[Array], Any]
) -> Callable[..., Array]:
    """walk(run) -> fillings, for `across` tiles of `columns` for each visit.

    Args:
        fillings: how many a tile takes, by its first column; those of nobody take none.
    """

    def walk(run: Callable[[Task], None]) -> Array:
        def one(n: Array, used: Array) -> Array:
            number, column = place(n, count, across)
            visit = TileTask(*(table[number, field] for field in range(4)))
            first = column * columns
            task = Task(visit, number, first, used, jnp.where(visit.group < E, fillings(first), 0))
            run(task)
            return used + task.fillings

        return every(count * across, one)

    return walk


def wgmma_reduce(
    ring: Ring, used: Array, steps: Any, operands: Callable[[Any, Array], Sequence[tuple[Any, Any]]], *columns: int
) -> tuple[Array, ...]:
    """The sums over the fillings from the `used`-th on of the products of `operands(step, stage)`, one a sum.

    Those of one step are under way while those of the next begin.

    Args:
        columns: of each sum, which has `ROWS` rows.
    """

    def add(*accs: Any) -> tuple[Array, ...]:
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

    return pl.run_scoped(add, *(plgpu.ACC((ROWS, n)) for n in columns))


def leave(staged: Any, n: int, value: Array, send: Callable[[Any], None]) -> None:
    """Sends the n-th piece of a tile, [ROWS, CHUNK], by way of shared memory; it may be on its way still."""
    piece = staged.at[n % CHUNKS]
    # Those of the last tile are long gone.
    plgpu.wait_smem_to_gmem(CHUNKS - 1 if n else 0, wait_read_only=True)
    piece[...] = value.astype(piece.dtype)
    plgpu.commit_smem()
    send(piece)
    plgpu.commit_smem_to_gmem_group()


def chunks(columns: int, there: Any, one: Callable[[int], None]) -> None:
    """one(first column) for every chunk of a tile that has any of the columns that are there."""
    for first in range(0, columns, CHUNK):
        if isinstance(there, int) and there >= columns:
            one(first)
        else:
            pl.when(first < there)(functools.partial(one, first))


def runs(low: Array, count: Array, copy: Callable[[Any, int], None]) -> None:
    """copy(first, size) for runs that make up the rows low <= n < low + count: TMA stores only sizes known before."""
    pl.when(count == ROWS)(lambda: copy(0, ROWS))

    # Apart, or the compiler works out the addresses of all runs of all pieces first, and keeps them.
    @pl.when(count < ROWS)
    def _() -> None:
        size = ROWS // 2
        while size:
            at = low + (count & -(2 * size))  # after the larger runs
            pl.when((count & size) != 0)(functools.partial(copy, at, size))
            size //= 2
