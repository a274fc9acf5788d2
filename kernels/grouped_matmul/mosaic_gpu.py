"""Grouped matmul on Hopper: every row times its own group's matrix, by two warpgroups that multiply and one that loads.

Math      y_n = x_n w_e for the rows n of group e, or x_n w_e^T with the matrices read as they lie; 0 for nobody's rows
Tiling    as many thread blocks as cores, each takes tile after tile; a tile is a visit (`groups.py`: 128 rows from the
          group's first on, rounded down to a multiple of 8) times 256 columns. Blocks that run at the same time have
          the columns of `PANEL` visits between them, so that rows and matrices are read from L2.

              columns ->         0   1   2   3
              visit 0, group 0   1   3   5   7        the order in panels of two visits; the next panel
              visit 1, group 0   2   4   6   8        goes back from right to left
              visit 2, group 1  15  13  11   9
              visit 3, nobody's ░░  ░░  ░░  ░░        zeros are written, nothing is loaded or multiplied

          The third warpgroup loads pieces of 64 of the contraction into a ring of stages by TMA, those of the next
          tile while this one is written. Each of the others multiplies 64 of the rows and writes those that are the
          visit's: all at once, or in runs of 32, 16, 8, 4, 2, 1, for TMA stores no number that is not known before.
State     64 x 256 sums of a warpgroup in float32 registers.
Traffic   a tile reads 128 rows of x and 256 columns of w, 85 FLOPs a byte, from L2; a panel reads its rows and its
          groups' matrices once from memory. Writes y once. 2 N K J FLOPs.
Limits    bfloat16, float16; K and J multiples of 64; `hopper.refusal` refuses the rest. What rows of other groups or
          of nobody hold, NaN included, is multiplied at most into sums that are not written.
Source    Gale et al., MegaBlocks (arXiv:2211.15841), for the tiles; NVIDIA's CUTLASS for the warp specialisation.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.grouped_matmul.groups import Visit, visits

Array = jax.Array
WARPGROUPS, ROWS = 2, 64  # that multiply; the rows of each
COLUMNS, INNER = 256, 64  # of a tile; of the contraction at once
STAGES = 4  # a power of two
CHUNK, CHUNKS = 64, 2  # columns that are written at once; such pieces of shared memory
SIDE = 8  # rows of a TMA tile
PANEL = 16  # tiles of rows whose columns are multiplied at the same time
COMPUTE_REGISTERS, MEMORY_REGISTERS = 240, 24


def ring(*shape: int, dtype: Any) -> Any:
    """Shared memory for all stages, in the layout that wgmma reads."""
    return plgpu.SMEM((STAGES, *shape), dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def shared(x: tuple[int, ...], w: tuple[int, ...], dtype: Any, copies: int = 2) -> dict[str, Any]:
    """The shared memory of a block: the rings of both operands, what is on its way out, and the barriers."""
    # Tiles of one row: the rows that a store takes may begin anywhere.
    by_row = plgpu.TilingTransform((1, CHUNK)), plgpu.SwizzleTransform(128)
    return {
        "x_ring": ring(*x, dtype=dtype),
        "w_ring": ring(*w, dtype=dtype),
        "staged": plgpu.SMEM((WARPGROUPS, CHUNKS, ROWS, CHUNK), dtype, transforms=by_row),
        "here": plgpu.Barrier(num_arrivals=copies, num_barriers=STAGES),
        "free": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=STAGES),
    }


def place(n: Array, down: Any, across: int) -> tuple[Array, Array]:
    """(row, column) of the n-th of down x across tiles."""
    panel = lax.div(n, jnp.int32(PANEL * across))
    n = n - panel * (PANEL * across)
    height = jnp.minimum(PANEL, down - panel * PANEL)
    column = lax.div(n, height)
    row = panel * PANEL + n - column * height
    return row, jnp.where(panel % 2 == 1, across - 1 - column, column)


def every(total: Any, run: Callable[[Array, Array], Array]) -> Array:
    """used = run(n, used) for the tiles n of this block; `used` counts the stages that were filled, from 0 on."""
    blocks = lax.axis_size("block")
    mine = lax.div(total - lax.axis_index("block") + (blocks - 1), jnp.int32(blocks))
    step = lambda n, used: run(lax.axis_index("block") + n * blocks, used)
    return lax.fori_loop(0, mine, step, jnp.int32(0))


def fill(free: Any, n: Array, copy: Callable[[Array], None]) -> None:
    """copy(stage) for the n-th filling, once the stage is free."""
    stage = n & (STAGES - 1)
    pl.when(n >= STAGES)(lambda: plgpu.barrier_wait(free.at[stage]))
    copy(stage)


def drain(free: Any, used: Array) -> None:
    """Until all stages are free."""

    @pl.loop(jnp.maximum(used - STAGES, 0), used)
    def _(n: Array) -> None:
        plgpu.barrier_wait(free.at[n & (STAGES - 1)])


def total(steps: Any, used: Array, here: Any, free: Any, operands: Callable[[Any, Array, Array], tuple]) -> Array:
    """The sum of the products of `operands(step, stage)`; one product is under way while the next is begun."""

    def add(acc: Any) -> Array:
        def step(k: Array, _: None) -> None:
            stage = (used + k) & (STAGES - 1)
            plgpu.barrier_wait(here.at[stage])
            plgpu.wgmma(acc, *operands(k, stage))
            plgpu.wgmma_wait(1)
            pl.when(k > 0)(lambda: plgpu.barrier_arrive(free.at[(used + k - 1) & (STAGES - 1)]))

        lax.fori_loop(0, steps, step, None)
        plgpu.wgmma_wait(0)
        pl.when(steps > 0)(lambda: plgpu.barrier_arrive(free.at[(used + steps - 1) & (STAGES - 1)]))
        return acc[...]

    return pl.run_scoped(add, plgpu.ACC((ROWS, COLUMNS)))


def write(sums: Array, staged: Any, columns: Any, send: Callable[[Any, int], None]) -> None:
    """send(shared memory, first column) for each chunk of the first `columns`; the last may be on its way still."""
    for n in range(COLUMNS // CHUNK):

        def one(n: int = n) -> None:
            piece = staged.at[n % CHUNKS]
            # Those of the last tile are long gone.
            plgpu.wait_smem_to_gmem(CHUNKS - 1 if n else 0, wait_read_only=True)
            piece[...] = sums[:, n * CHUNK : (n + 1) * CHUNK].astype(piece.dtype)
            plgpu.commit_smem()
            send(piece, n * CHUNK)
            plgpu.commit_smem_to_gmem_group()

        if isinstance(columns, int) and columns >= COLUMNS:
            one()
        else:
            pl.when(n * CHUNK < columns)(one)


def product(
    x: Array,
    w: Array,
    group_sizes: Array,
    *,
    cores: int,
    transposed: bool = False,
    interpret: plgpu.InterpretGPUParams | None = None,
    name: str = "grouped_matmul",
) -> Array:
    """[N, J] in x's dtype, zeros in rows that are nobody's.

    Args:
        x: [N, K], rows sorted by group.
        w: [E, K, J], or [E, J, K] where `transposed`; K and J multiples of 64.
        cores: of the device; so many blocks run at once.
        interpret: runs on the CPU.
    """
    (N, K), E, J = x.shape, w.shape[0], w.shape[1 if transposed else 2]
    height, across, steps = WARPGROUPS * ROWS, pl.cdiv(J, COLUMNS), pl.cdiv(K, INNER)
    plan = visits(group_sizes, N, height, aligned=True, unit=SIDE)
    table = jnp.stack(plan[1:], axis=1)

    def body(x, w, table, count, y, *, x_ring, w_ring, staged, here, free) -> None:
        warpgroup = lax.axis_index("warpgroup")
        count = count[0]

        def each(run: Callable[[Visit, Array, Array], Array]) -> Array:
            def one(n: Array, used: Array) -> Array:
                v, column = place(n, count, across)
                visit = Visit(*(table[v, field] for field in range(4)))
                needed = jnp.where(visit.group < E, steps, 0)
                run(visit, column * COLUMNS, used, needed)
                return used + needed

            return every(count * across, one)

        def load(visit: Visit, column: Array, used: Array, needed: Array) -> None:
            rows = pl.ds(pl.multiple_of(visit.row, SIDE), height)
            columns = pl.ds(column, COLUMNS)

            @pl.loop(0, needed)
            def _(k: Array) -> None:
                inner = pl.ds(k * INNER, INNER)

                def copy(stage: Array) -> None:
                    matrix = w.at[visit.group, columns, inner] if transposed else w.at[visit.group, inner, columns]
                    plgpu.copy_gmem_to_smem(x.at[rows, inner], x_ring.at[stage], here.at[stage])
                    plgpu.copy_gmem_to_smem(matrix, w_ring.at[stage], here.at[stage])

                fill(free, used + k, copy)

        def compute(visit: Visit, column: Array, used: Array, needed: Array) -> None:
            def operands(_: Any, stage: Array) -> tuple[Any, Any]:
                matrix = w_ring.at[stage]
                rows = x_ring.at[stage, pl.ds(warpgroup * ROWS, ROWS)]
                return rows, matrix.transpose((1, 0)) if transposed else matrix

            sums = total(needed, used, here, free, operands)
            first = visit.row + warpgroup * ROWS
            low = jnp.maximum(visit.low - first, 0)
            n = jnp.maximum(jnp.minimum(visit.high - first, ROWS) - low, 0)  # rows that are the visit's

            def send(piece: Any, across: int) -> None:
                size = ROWS
                while size:
                    at = low + (n & -(2 * size))  # after the larger runs
                    pl.when((n & size) != 0)(functools.partial(run, piece, column + across, at, size))
                    size //= 2

            def run(piece: Any, column: Array, at: Array, size: int) -> None:
                target = y.at[pl.ds(first + at, size), pl.ds(column, CHUNK)]
                plgpu.copy_smem_to_gmem(piece.at[pl.ds(at, size)], target, commit_group=False)

            columns = COLUMNS if J % COLUMNS == 0 else J - column
            pl.when(n > 0)(lambda: write(sums, staged.at[warpgroup], columns, send))

        @pl.when(warpgroup < WARPGROUPS)
        def _() -> None:
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            each(compute)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == WARPGROUPS)
        def _() -> None:
            plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")
            drain(free, each(load))

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((N, J), x.dtype),
        scratch_types=shared((height, INNER), (COLUMNS, INNER) if transposed else (INNER, COLUMNS), x.dtype),
        grid=(cores,),
        grid_names=("block",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret or False,
        kernel_name=name,
    )(jnp.pad(x, ((0, -N % SIDE), (0, 0))), w, table, plan.count[None])
