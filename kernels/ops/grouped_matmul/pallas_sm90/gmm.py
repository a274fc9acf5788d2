"""Grouped matmul on Hopper: every row times the matrix of its group, by two consumer warpgroups and a producer.

Math      y_n = p_n sum over i of x^i_n w^i_e for the rows n of group e, or x^i_n w^i_e^T without transposing in memory;
          0 for unassigned rows. Only a MoE's dx has more than one pair x, w; only its down projection has router
          weights p.
Tiling    one persistent thread block per SM takes tile after tile. A tile is a task (`group_metadata.py`: 128 rows
          from the group's first on, rounded down to a multiple of 8) times 256 columns, or fewer if `block_sizes.py`
          estimates that less is wasted. Blocks that run at the same time share the columns of a panel of tasks
          (`tile_scheduler.py`), so that they read rows and matrices from L2.

              columns ->         0   1   2   3
              task 0, group 0    1   3   5   7       the order in panels of two tasks; the next panel
              task 1, group 0    2   4   6   8       runs from right to left
              task 2, group 1   15  13  11   9
              task 3, unassigned ░░  ░░  ░░  ░░      zeros are written, nothing is loaded or multiplied

          The producer loads 64 of the contraction per stage by TMA, those of the next tile while the consumers store
          this one (`warp_specialized.py`). Each consumer multiplies 64 of the rows and stores those of the task: all
          at once, or in runs of 32, 16, 8, 4, 2, 1, because TMA needs static sizes. A consumer without rows of the
          task multiplies nothing, so rows come in 64s and small groups need half the wgmmas.
State     64 x 256 accumulators per warpgroup in float32 registers, 128 of the 240 registers per thread.
Traffic   a tile reads 128 rows of x and 256 columns of w, 85 FLOPs per byte, from L2; a panel reads its rows and its
          groups' matrices once from memory. Writes y once; p takes two registers per thread and 4 bytes per row read.
          Weighting the rows outside would read and write y again: 4 bytes per feature. 2 N K J FLOPs.
Limits    bfloat16, float16; K and J multiples of 16; `vjp.unsupported_inputs` names the rest. Values of other groups'
          rows and of unassigned rows, NaN included, only enter accumulator rows that are not stored.
Source    Gale et al., MegaBlocks (arXiv:2211.15841), for the tiles; NVIDIA's CUTLASS for the warp specialization.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dantinox.kernels.mosaic_gpu import swizzled_smem, widest_swizzle
from dantinox.kernels.ops.grouped_matmul.pallas_sm90 import block_sizes, tile_scheduler, warp_specialized
from dantinox.kernels.ops.grouped_matmul.pallas_sm90.block_sizes import (
    BLOCK_K,
    BLOCK_M,
    TMA_ROWS,
    WARPGROUP_ROWS,
    Sm90GmmBlockSizes,
)
from dantinox.kernels.ops.grouped_matmul.pallas_sm90.tile_scheduler import GmmTile, TaskTable, WarpgroupRows
from dantinox.kernels.ops.grouped_matmul.pallas_sm90.warp_specialized import (
    CHUNK_COLUMNS,
    ROW_LAYOUT,
    Ref,
    Sm90GmmConfig,
    SmemPipeline,
    copy_rows_by_powers_of_two,
)

Array = jax.Array
TILE_WIDTHS = (256, 192, 128, 64)


class GmmInputs(NamedTuple):
    """Inputs of the kernel, in global memory."""

    xs: Sequence[Any]
    ws: Sequence[Any]
    row_scale: Any  # or None
    task_table: TaskTable


class GmmOutputs(NamedTuple):
    """Output of the kernel, in global memory."""

    y: Any


class GmmScratch(NamedTuple):
    """Shared memory and barriers of a thread block, in order of allocation."""

    empty: Ref
    full: Ref
    row_sums_smem: Ref  # per consumer; or None
    store_smem: Ref
    w_smem: Ref  # per stage
    x_smem: Ref  # per stage


def gmm(
    xs: Sequence[Array],
    ws: Sequence[Array],
    group_sizes: Array,
    config: Sm90GmmConfig,
    *,
    row_scale: Array | None = None,
    transposed: bool = False,
    name: str = "grouped_matmul",
) -> Array:
    """Multiply each row by the matrix of its group.

    Args:
        xs: arrays [N, K], rows sorted by group; their products are summed.
        ws: one [E, K, J] per array, or [E, J, K] if `transposed`; K and J multiples of 16.
        group_sizes: [E] int32.
        config: see `Sm90GmmConfig`.
        row_scale: [N] float32, multiplies the rows of the result.
        transposed: whether each w is transposed.
        name: name of the kernel.

    Returns:
        [N, J] in x's dtype, zeros in unassigned rows.
    """
    (N, K), E, J, dtype = xs[0].shape, ws[0].shape[0], ws[0].shape[1 if transposed else 2], xs[0].dtype
    widths = config.allowed_widths(*TILE_WIDTHS)
    sizes = block_sizes.gmm_block_sizes(N, E, K * len(xs), J, config.num_sms, widths=widths)
    inputs = GmmInputs(
        xs=[pad_rows(x) for x in xs],
        ws=[*ws],
        row_scale=None if row_scale is None else jnp.pad(row_scale, (0, -N % TMA_ROWS + BLOCK_M)),
        task_table=tile_scheduler.pack_task_table(tile_scheduler.tma_group_metadata(group_sizes, N)),
    )

    def make_roles(
        gmem: GmmInputs, out: GmmOutputs, smem: GmmScratch, pipeline: SmemPipeline, warpgroup: Array
    ) -> GmmKernel:
        num_tasks = gmem.task_table.count[0]
        return GmmKernel(gmem, out, smem, pipeline, warpgroup, num_tasks, E, K, J, sizes, transposed)

    outputs = warp_specialized.launch_warp_specialized(
        make_roles,
        inputs,
        GmmOutputs(y=jax.ShapeDtypeStruct((N, J), dtype)),
        gmm_scratch(sizes, dtype, (K, J), transposed=transposed),
        config,
        stages=sizes.stages,
        name=name,
    )
    return outputs.y


def gmm_scratch(
    sizes: Sm90GmmBlockSizes,
    dtype: Any,
    features: tuple[int, int],
    *,
    transposed: bool = False,
    num_weights: int | None = None,
) -> GmmScratch:
    """Return the scratch memory of a kernel whose stages hold rows of x and columns of a weight.

    Args:
        sizes: the block sizes.
        dtype: of the operands and the results.
        features: row lengths of the arrays in global memory.
        transposed: whether the weights are transposed.
        num_weights: weights per stage, stacked; None for one that is not stacked.
    """
    w_shape = (sizes.block_n, BLOCK_K) if transposed else (BLOCK_K, sizes.block_n)
    stacked = () if num_weights is None else (num_weights,)
    swizzle = widest_swizzle(dtype, *features)  # one for all: both operands of a wgmma have the same
    return GmmScratch(
        empty=warp_specialized.empty_barriers(sizes.stages),
        full=warp_specialized.full_barriers(sizes.stages, copies=1 + (num_weights or 1)),
        row_sums_smem=None,
        store_smem=warp_specialized.store_smem(dtype, swizzle),
        w_smem=swizzled_smem((sizes.stages, *stacked, *w_shape), dtype, swizzle),
        x_smem=swizzled_smem((sizes.stages, BLOCK_M, BLOCK_K), dtype, swizzle),
    )


@dataclass(frozen=True, eq=False)
class GmmKernel:
    """The product on one thread block; see `WarpgroupRoles`."""

    gmem: GmmInputs
    out: GmmOutputs
    smem: GmmScratch
    pipeline: SmemPipeline
    warpgroup: Array
    num_tasks: Array
    E: int
    K: int
    J: int
    sizes: Sm90GmmBlockSizes
    transposed: bool

    @property
    def k_steps(self) -> int:
        """Pipeline steps per product."""
        return pl.cdiv(self.K, BLOCK_K)

    def for_each_tile(self, run_tile: Callable[[GmmTile], None]) -> Array:
        """Run run_tile(tile) for the tiles of this thread block; return the number of pipeline steps."""

        def num_steps(_: Array) -> int:
            return len(self.gmem.xs) * self.k_steps

        block_n = self.sizes.block_n
        return tile_scheduler.for_each_gmm_tile(
            self.gmem.task_table.fields, self.num_tasks, self.E, pl.cdiv(self.J, block_n), block_n, num_steps, run_tile
        )

    def load(self, tile: GmmTile) -> None:
        """Load the rows of each x and the columns of each w of a tile, 64 of the contraction per stage."""
        for i, (x, w) in enumerate(zip(self.gmem.xs, self.gmem.ws, strict=True)):
            first_step = tile.first_step + i * self.k_steps
            load_product_operands(
                self.pipeline,
                tile,
                first_step,
                self.k_steps,
                x,
                w,
                self.smem,
                block_n=self.sizes.block_n,
                transposed=self.transposed,
            )

    def compute(self, tile: GmmTile) -> None:
        """Compute and store a tile, or release its stages if it has no rows of this consumer."""
        rows = tile.warpgroup_rows(self.warpgroup)
        pl.when(rows.count > 0)(functools.partial(self.multiply_and_store, tile, rows))

        @pl.when(rows.count == 0)
        def skip_tile() -> None:
            self.pipeline.skip(tile.first_step, tile.num_steps)

    def multiply_and_store(self, tile: GmmTile, rows: WarpgroupRows) -> None:
        """Compute the rows of this consumer and store them."""
        block_n, row_scale = self.sizes.block_n, None
        if self.gmem.row_scale is not None:
            row_scale = load_row_values(self.gmem.row_scale, rows)

        def operands(_: Any, slot: Array) -> list[tuple[Any, Any]]:
            return [wgmma_operands(self.smem, slot, self.warpgroup, transposed=self.transposed)]

        (acc,) = warp_specialized.wgmma_reduce(self.pipeline, tile.first_step, tile.num_steps, operands, block_n)

        def store_chunk(n: int) -> None:
            chunk = acc[:, n : n + CHUNK_COLUMNS]
            if row_scale is not None:
                chunk *= lax.broadcast_in_dim(row_scale, chunk.shape, [0])
            start_copy = functools.partial(copy_rows_by_powers_of_two, rows, self.out.y, tile.column + n)
            buffers = self.smem.store_smem.at[self.warpgroup]
            warp_specialized.store_chunk_async(buffers, n // CHUNK_COLUMNS, chunk, start_copy)

        remaining = block_n if self.J % block_n == 0 else self.J - tile.column
        warp_specialized.for_each_chunk(block_n, remaining, store_chunk)


def pad_rows(x: Array) -> Array:
    """Pad the rows of x to a multiple of `TMA_ROWS`."""
    return jnp.pad(x, ((0, -x.shape[0] % TMA_ROWS), (0, 0)))


def load_row_values(values: Ref, rows: WarpgroupRows) -> Array:
    """Load one float32 value per row of a consumer."""
    return plgpu.load(values.at[pl.ds(rows.first, WARPGROUP_ROWS)], layout=ROW_LAYOUT, optimized=False)


def load_product_operands(
    pipeline: SmemPipeline,
    tile: GmmTile,
    first_step: Array,
    num_steps: int,
    x: Ref,
    w: Ref,
    smem: GmmScratch,
    *,
    block_n: int,
    transposed: bool,
) -> None:
    """Load rows of x and columns of the group's matrix in `num_steps` steps; unassigned rows have none."""
    rows, columns = pl.ds(pl.multiple_of(tile.task.row, TMA_ROWS), BLOCK_M), pl.ds(tile.column, block_n)

    @pl.loop(0, jnp.where(tile.num_steps > 0, num_steps, 0))
    def load_stage(k: Array) -> None:
        contracted = pl.ds(k * BLOCK_K, BLOCK_K)

        def copy(slot: Array) -> None:
            group = tile.task.group
            matrix = w.at[group, columns, contracted] if transposed else w.at[group, contracted, columns]
            plgpu.copy_gmem_to_smem(x.at[rows, contracted], smem.x_smem.at[slot], pipeline.full.at[slot])
            plgpu.copy_gmem_to_smem(matrix, smem.w_smem.at[slot], pipeline.full.at[slot])

        pipeline.produce(first_step + k, copy)


def wgmma_operands(smem: GmmScratch, slot: Array, warpgroup: Array, *, transposed: bool) -> tuple[Any, Any]:
    """Return the wgmma operands of a consumer in a stage."""
    matrix = smem.w_smem.at[slot]
    rows = smem.x_smem.at[slot, pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)]
    return rows, matrix.transpose((1, 0)) if transposed else matrix
