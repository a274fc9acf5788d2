"""Grouped matmul on Hopper: every row times the matrix of its group, by two consumer warpgroups and a producer.

Math      y_n = p_n sum over i of x^i_n w^i_e for the rows n of group e, or x^i_n w^i_e^T without transposing in memory;
          0 for unassigned rows. Only a MoE's dx has more than one pair x, w; only its down projection has router
          weights p.
Tiling    one persistent thread block per SM takes tile after tile. A tile is a visit (`group_metadata.py`: 128 rows
          from the group's first on, rounded down to a multiple of 8) times 256 columns, or fewer if
          `block_sizes.hopper` estimates that less is wasted. Blocks that run at the same time share the columns of
          `PANEL` visits, so that they read rows and matrices from L2.

              columns ->          0   1   2   3
              visit 0, group 0    1   3   5   7       the order in panels of two visits; the next panel
              visit 1, group 0    2   4   6   8       runs from right to left
              visit 2, group 1   15  13  11   9
              visit 3, unassigned ░░  ░░  ░░  ░░      zeros are written, nothing is loaded or multiplied

          The producer loads 64 of the contraction per stage by TMA, those of the next tile while the consumers store
          this one (`warp_specialized.py`). Each consumer multiplies 64 of the rows and stores those of the visit: all
          at once, or in runs of 32, 16, 8, 4, 2, 1, because TMA needs static sizes. A consumer without rows of the
          visit multiplies nothing, so rows come in 64s and small groups need half the products.
State     64 x 256 accumulators per warpgroup in float32 registers, 128 of the 240 registers per thread.
Traffic   a tile reads 128 rows of x and 256 columns of w, 85 FLOPs per byte, from L2; a panel reads its rows and its
          groups' matrices once from memory. Writes y once; p takes two registers per thread and 4 bytes per row read.
          Weighting the rows outside would read and write y again: 4 bytes per feature. 2 N K J FLOPs.
Limits    bfloat16, float16; K and J multiples of 64; `vjp.refusal` rejects the rest. Values of other groups' rows and
          of unassigned rows, NaN included, only enter accumulator rows that are not stored.
Source    Gale et al., MegaBlocks (arXiv:2211.15841), for the tiles; NVIDIA's CUTLASS for the warp specialization.
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
    """Multiplies each row by the matrix of its group: [N, J] in x's dtype, zeros in unassigned rows.

    Args:
        xs: arrays [N, K], rows sorted by group; their products are summed.
        ws: one [E, K, J] per array, or [E, J, K] if `transposed`; K and J multiples of 64.
        scale: [N] float32, multiplies the rows of the result.
    """
    (N, K), E, J, dtype = xs[0].shape, ws[0].shape[0], ws[0].shape[1 if transposed else 2], xs[0].dtype
    tile = block_sizes.hopper(N, E, K * len(xs), J, static.cores, widths=static.among(*WIDTHS))
    across, steps = pl.cdiv(J, tile.columns), pl.cdiv(K, INNER)
    rows = [whole(x) for x in xs]
    scales = [] if scale is None else [jnp.pad(scale, (0, -N % SIDE + HEIGHT))]

    def define_roles(
        *refs: Any, warpgroup: Array, ring: Ring, staged: Any, x_ring: Any, w_ring: Any
    ) -> warp_specialized.Roles:
        x_refs, w_refs = refs[: len(xs)], refs[len(xs) : 2 * len(xs)]
        *scale_refs, table, count, y = refs[2 * len(xs) :]

        def load(task: Task) -> None:
            for i, (x, w) in enumerate(zip(x_refs, w_refs, strict=True)):
                first = task.used + i * steps
                fill(ring, task, first, steps, x, w, x_ring, w_ring, tile.columns, transposed)

        def compute(task: Task) -> None:
            first, low, count_in_tile = task.rows_for_warpgroup(warpgroup)

            @pl.when(count_in_tile > 0)
            def multiply_and_store() -> None:
                weights = [
                    plgpu.load(scale_ref.at[pl.ds(first, ROWS)], layout=warp_specialized.ROW, optimized=False)
                    for scale_ref in scale_refs
                ]

                def operands(_: Any, stage: Array) -> list[tuple[Any, Any]]:
                    return [pair(x_ring, w_ring, stage, warpgroup, transposed)]

                (sums,) = warp_specialized.wgmma_reduce(ring, task.used, task.fillings, operands, tile.columns)

                def store_chunk(n: int) -> None:
                    chunk = sums[:, n : n + CHUNK]
                    for weight in weights:
                        chunk *= lax.broadcast_in_dim(weight, chunk.shape, [0])
                    warp_specialized.leave(
                        staged, n // CHUNK, chunk, rows_to(y, first, task.column + n, low, count_in_tile)
                    )

                remaining = tile.columns if J % tile.columns == 0 else J - task.column
                warp_specialized.chunks(tile.columns, remaining, store_chunk)

            pl.when(count_in_tile == 0)(lambda: ring.skip(task.used, task.fillings))

        return (
            warp_specialized.tasks(table, count[0], E, across, tile.columns, lambda _: len(xs) * steps),
            load,
            compute,
        )

    (y,) = warp_specialized.launch(
        define_roles,
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
    """Pads the rows of x to a multiple of `SIDE`."""
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
    """Loads fillings `first` to `first + steps`: rows of x and columns of the group's matrix; none if unassigned."""
    rows, across = pl.ds(pl.multiple_of(task.visit.row, SIDE), HEIGHT), pl.ds(task.column, columns)

    @pl.loop(0, jnp.where(task.fillings > 0, steps, 0))
    def load_stage(k: Array) -> None:
        inner = pl.ds(k * INNER, INNER)

        def copy(stage: Array) -> None:
            matrix = w.at[task.visit.group, across, inner] if transposed else w.at[task.visit.group, inner, across]
            plgpu.copy_gmem_to_smem(x.at[rows, inner], x_ring.at[stage], ring.here.at[stage])
            plgpu.copy_gmem_to_smem(matrix, w_ring.at[stage], ring.here.at[stage])

        ring.fill(first + k, copy)


def pair(x_ring: Any, w_ring: Any, stage: Array, warpgroup: Array, transposed: bool) -> tuple[Any, Any]:
    """Returns the wgmma operands of a warpgroup in a stage."""
    matrix = w_ring.at[stage]
    return x_ring.at[stage, pl.ds(warpgroup * ROWS, ROWS)], matrix.transpose((1, 0)) if transposed else matrix


def rows_to(y: Any, first: Array, column: Array, low: Array, count: Array) -> Any:
    """Returns send(chunk), which stores rows low <= n < low + count of a chunk to y from row `first` on."""

    def send(chunk: Any) -> None:
        def copy(start: Array, size: int) -> None:
            target = y.at[pl.ds(first + start, size), pl.ds(column, CHUNK)]
            plgpu.copy_smem_to_gmem(chunk.at[pl.ds(start, size)], target, commit_group=False)

        warp_specialized.for_each_power_of_two_run(low, count, copy)

    return send
