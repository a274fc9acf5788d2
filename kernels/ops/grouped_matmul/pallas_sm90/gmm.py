"""Grouped matmul on Hopper: every row times its own group's matrix, by two warpgroups that multiply and one that loads.

Math      y_n = p_n sum over i of x^i_n w^i_e for the rows n of group e, or x^i_n w^i_e^T with the matrices read as they
          lie; 0 for nobody's rows. One pair x, w but in a mixture's dx; p, the router's weight, only on its way down.
Tiling    as many thread blocks as cores, each takes tile after tile; a tile is a visit (`group_metadata.py`: 128 rows
          from the group's first on, rounded down to a multiple of 8) times 256 columns, or fewer where
          `block_sizes.hopper` finds that less is wasted. Blocks that run at the same time have the columns of `PANEL`
          visits between them, so that rows and matrices are read from L2.

              columns ->         0   1   2   3
              visit 0, group 0   1   3   5   7        the order in panels of two visits; the next panel
              visit 1, group 0   2   4   6   8        goes back from right to left
              visit 2, group 1  15  13  11   9
              visit 3, nobody's ░░  ░░  ░░  ░░        zeros are written, nothing is loaded or multiplied

          The third warpgroup loads pieces of 64 of the contraction into a ring of stages by TMA, those of the next
          tile while this one is written (`warp_specialized.py`). Each of the others multiplies 64 of the rows and
          writes those that are the visit's: all at once, or in runs of 32, 16, 8, 4, 2, 1, for TMA stores no number
          that is not known before. One that has none of the visit's rows multiplies nothing: so rows come in 64s, and
          groups of few rows, whichever they are, take half the products.
State     64 x 256 sums of a warpgroup in float32 registers, 128 of a thread's 240.
Traffic   a tile reads 128 rows of x and 256 columns of w, 85 FLOPs a byte, from L2; a panel reads its rows and its
          groups' matrices once from memory. Writes y once; p is two registers of a thread, 4 bytes a row read. To
          weight the rows outside would read and write y again: 4 bytes a feature. 2 N K J FLOPs.
Limits    bfloat16, float16; K and J multiples of 64; `vjp.refusal` refuses the rest. What rows of other groups or
          of nobody hold, NaN included, is multiplied at most into sums that are not written.
Source    Gale et al., MegaBlocks (arXiv:2211.15841), for the tiles; NVIDIA's CUTLASS for the warp specialisation.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dantinox.kernels.ops.grouped_matmul.pallas_sm90 import block_sizes, warp_specialized
from dantinox.kernels.ops.grouped_matmul.pallas_sm90.block_sizes import HEIGHT, INNER, ROWS
from dantinox.kernels.ops.grouped_matmul.pallas_sm90.warp_specialized import CHUNK, SIDE, Ring, Static, Task

Array = jax.Array
WIDTHS = (256, 192, 128, 64)  # of a tile


def product(
    xs: Sequence[Array],
    ws: Sequence[Array],
    group_sizes: Array,
    static: Static,
    *,
    scale: Array | None = None,
    transposed: bool = False,
    name: str = "grouped_matmul",
) -> Array:
    """[N, J] in x's dtype, zeros in rows that are nobody's.

    Args:
        xs: arrays [N, K], rows sorted by group; the products of all are added up.
        ws: as many [E, K, J], or [E, J, K] where `transposed`; K and J multiples of 64.
        scale: [N] float32, multiplied into the rows.
    """
    (N, K), E, J, dtype = xs[0].shape, ws[0].shape[0], ws[0].shape[1 if transposed else 2], xs[0].dtype
    tile = block_sizes.hopper(N, E, K * len(xs), J, static.cores, widths=static.among(*WIDTHS))
    across, steps = pl.cdiv(J, tile.columns), pl.cdiv(K, INNER)
    rows = [whole(x) for x in xs]
    scales = [] if scale is None else [jnp.pad(scale, (0, -N % SIDE + HEIGHT))]

    def body(*refs: Any, warpgroup: Array, ring: Ring, staged: Any, x_ring: Any, w_ring: Any) -> warp_specialized.Roles:
        x_refs, w_refs = refs[: len(xs)], refs[len(xs) : 2 * len(xs)]
        *p, table, count, y = refs[2 * len(xs) :]

        def load(task: Task) -> None:
            for i, (x, w) in enumerate(zip(x_refs, w_refs, strict=True)):
                first = task.used + i * steps
                fill(ring, task, first, steps, x, w, x_ring, w_ring, tile.columns, transposed)

        def compute(task: Task) -> None:
            first, low, mine = task.rows_for_warpgroup(warpgroup)

            @pl.when(mine > 0)
            def _() -> None:
                weight = [
                    plgpu.load(each.at[pl.ds(first, ROWS)], layout=warp_specialized.ROW, optimized=False) for each in p
                ]
                operands = lambda _, stage: [pair(x_ring, w_ring, stage, warpgroup, transposed)]
                (sums,) = warp_specialized.wgmma_reduce(ring, task.used, task.fillings, operands, tile.columns)

                def one(n: int) -> None:
                    part = sums[:, n : n + CHUNK]
                    for each in weight:
                        part *= lax.broadcast_in_dim(each, part.shape, [0])
                    warp_specialized.leave(staged, n // CHUNK, part, rows_to(y, first, task.column + n, low, mine))

                warp_specialized.chunks(tile.columns, tile.columns if J % tile.columns == 0 else J - task.column, one)

            pl.when(mine == 0)(lambda: ring.skip(task.used, task.fillings))

        return (
            warp_specialized.tasks(table, count[0], E, across, tile.columns, lambda _: len(xs) * steps),
            load,
            compute,
        )

    (y,) = warp_specialized.launch(
        body,
        [*rows, *ws, *scales, *warp_specialized.table(warp_specialized.plan(group_sizes, N))],
        [jax.ShapeDtypeStruct((N, J), dtype)],
        static,
        stages=tile.stages,
        copies=2,
        rings={"x_ring": (HEIGHT, INNER), "w_ring": (tile.columns, INNER) if transposed else (INNER, tile.columns)},
        dtype=dtype,
        name=name,
    )
    return y


def whole(x: Array) -> Array:
    """x with rows in multiples of `SIDE`."""
    return jnp.pad(x, ((0, -x.shape[0] % SIDE), (0, 0)))


def fill(
    ring: Ring,
    task: Task,
    first: Array,
    steps: int,
    x: Any,
    w: Any,
    x_ring: Any,
    w_ring: Any,
    columns: int,
    transposed: bool,
) -> None:
    """Fillings `first` to `first + steps`: a tile's rows of x, and columns of its group's matrix; none for nobody's."""
    rows, across = pl.ds(pl.multiple_of(task.visit.row, SIDE), HEIGHT), pl.ds(task.column, columns)

    @pl.loop(0, jnp.where(task.fillings > 0, steps, 0))
    def _(k: Array) -> None:
        inner = pl.ds(k * INNER, INNER)

        def copy(stage: Array) -> None:
            matrix = w.at[task.visit.group, across, inner] if transposed else w.at[task.visit.group, inner, across]
            plgpu.copy_gmem_to_smem(x.at[rows, inner], x_ring.at[stage], ring.here.at[stage])
            plgpu.copy_gmem_to_smem(matrix, w_ring.at[stage], ring.here.at[stage])

        ring.fill(first + k, copy)


def pair(x_ring: Any, w_ring: Any, stage: Array, warpgroup: Array, transposed: bool) -> tuple[Any, Any]:
    """What a warpgroup multiplies of a stage."""
    matrix = w_ring.at[stage]
    return x_ring.at[stage, pl.ds(warpgroup * ROWS, ROWS)], matrix.transpose((1, 0)) if transposed else matrix


def rows_to(y: Any, first: Array, column: Array, low: Array, count: Array) -> Any:
    """send(piece): the rows low <= n < low + count of a piece to those of y from `first` on."""

    def send(piece: Any) -> None:
        def copy(at: Array, size: int) -> None:
            target = y.at[pl.ds(first + at, size), pl.ds(column, CHUNK)]
            plgpu.copy_smem_to_gmem(piece.at[pl.ds(at, size)], target, commit_group=False)

        warp_specialized.runs(low, count, copy)

    return send
