"""The gate and up projections of the experts on Hopper, and h, in one pass over x.

Math      gate = x w_gate_e,  up = x w_up_e,  h = silu(gate) up    for the rows of expert e
Tiling    as `grouped_matmul/pallas_sm90/gmm.py`. A stage has the rows of x and 128 columns of both weights:

              x         w_gate      w_up
              128 x 64  64 x 128    64 x 128
State     64 x 128 accumulators of gate and 64 x 128 of up per warpgroup, 128 of the 240 registers per thread. The
          epilogue takes 64 columns at a time.
Traffic   reads as much per FLOP as a product of 256 columns, and x once instead of twice. Without gradients only h is
          written, 2 bytes per feature of a row in bfloat16; gate and up written, read again and turned into h would be
          10. For gradients it writes gate and up too, 4 bytes, and `down_proj_bwd.py` reads them, 4 bytes: 8 bytes
          against 4 M FLOPs to recompute them, and against tiles with three accumulators instead of one, 64 x 64 of
          each, which read 1.6 times as much from L2 per FLOP. At 800 TFLOP/s and 3 TB/s keeping them is faster from
          M = 530 on, even without counting those reads.
Limits    as `grouped_matmul/pallas_sm90/gmm.py`, M and F for K and J.
Source    Shazeer, GLU Variants (arXiv:2002.05202), for the formula; else as `grouped_matmul/pallas_sm90/gmm.py`.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dantinox.kernels.ops.grouped_matmul.pallas_sm90 import block_sizes, gmm, tile_scheduler, warp_specialized
from dantinox.kernels.ops.grouped_matmul.pallas_sm90.block_sizes import BLOCK_K, BLOCK_M, TMA_ROWS, WARPGROUP_ROWS
from dantinox.kernels.ops.grouped_matmul.pallas_sm90.tile_scheduler import GmmTile, TaskTable, WarpgroupRows
from dantinox.kernels.ops.grouped_matmul.pallas_sm90.warp_specialized import (
    CHUNK_COLUMNS,
    Sm90GmmConfig,
    SmemPipeline,
)
from dantinox.kernels.ops.moe.swiglu import swiglu

Array = jax.Array
NUM_UP_WEIGHTS = 2
TILE_WIDTHS = (256, 128)  # of both weights together


class UpProjInputs(NamedTuple):
    """Inputs of the kernel, in global memory."""

    x: Any
    w_gate: Any
    w_up: Any
    task_table: TaskTable


class UpProjOutputs(NamedTuple):
    """Outputs of the kernel, in global memory; without gradients only h."""

    h: Any
    gate: Any = None
    up: Any = None


def up_proj(
    x: Array,
    w_gate: Array,
    w_up: Array,
    group_sizes: Array,
    config: Sm90GmmConfig,
    *,
    save_residuals: bool,
    name: str = "experts_up",
) -> UpProjOutputs:
    """Return h and, with `save_residuals`, gate and up: [N, F] in x's dtype, zeros in unassigned rows.

    Args:
        x: [N, M], rows sorted by expert.
        w_gate: [E, M, F]; M and F multiples of 16.
        w_up: [E, M, F].
        group_sizes: [E] int32.
        config: see `Sm90GmmConfig`.
        save_residuals: whether the backward pass needs gate and up.
        name: name of the kernel.
    """
    (N, M), (E, _, F) = x.shape, w_gate.shape
    widths = config.allowed_widths(*TILE_WIDTHS)
    sizes = block_sizes.gmm_block_sizes(N, E, M, F, config.num_sms, num_weights=NUM_UP_WEIGHTS, widths=widths)
    inputs = UpProjInputs(
        gmm.pad_rows(x),
        w_gate,
        w_up,
        tile_scheduler.pack_task_table(tile_scheduler.tma_group_metadata(group_sizes, N)),
    )
    out = jax.ShapeDtypeStruct((N, F), x.dtype)

    def make_roles(
        gmem: UpProjInputs, out: UpProjOutputs, smem: gmm.GmmScratch, pipeline: SmemPipeline, warpgroup: Array
    ) -> UpProjKernel:
        num_tasks = gmem.task_table.count[0]
        return UpProjKernel(gmem, out, smem, pipeline, warpgroup, num_tasks, E, M, F, sizes.block_n)

    return warp_specialized.launch_warp_specialized(
        make_roles,
        inputs,
        UpProjOutputs(out, out, out) if save_residuals else UpProjOutputs(out),
        gmm.gmm_scratch(sizes, x.dtype, (M, F), num_weights=NUM_UP_WEIGHTS),
        config,
        stages=sizes.stages,
        name=name,
    )


@dataclass(frozen=True, eq=False)
class UpProjKernel:
    """The projections on one thread block; see `WarpgroupRoles`."""

    gmem: UpProjInputs
    out: UpProjOutputs
    smem: gmm.GmmScratch
    pipeline: SmemPipeline
    warpgroup: Array
    num_tasks: Array
    E: int
    M: int
    F: int
    block_n: int

    def for_each_tile(self, run_tile: Callable[[GmmTile], None]) -> Array:
        """Run run_tile(tile) for the tiles of this thread block; return the number of pipeline steps."""

        def num_steps(_: Array) -> int:
            return pl.cdiv(self.M, BLOCK_K)

        fields, column_tiles = self.gmem.task_table.fields, pl.cdiv(self.F, self.block_n)
        return tile_scheduler.for_each_gmm_tile(
            fields, self.num_tasks, self.E, column_tiles, self.block_n, num_steps, run_tile
        )

    def load(self, tile: GmmTile) -> None:
        """Load the rows of x and the columns of both weights of a tile, 64 of the contraction per stage."""
        gmem, smem = self.gmem, self.smem
        rows = pl.ds(pl.multiple_of(tile.task.row, TMA_ROWS), BLOCK_M)
        features = pl.ds(tile.column, self.block_n)

        @pl.loop(0, tile.num_steps)
        def load_stage(k: Array) -> None:
            contracted = pl.ds(k * BLOCK_K, BLOCK_K)

            def copy(slot: Array) -> None:
                full = self.pipeline.full.at[slot]
                plgpu.copy_gmem_to_smem(gmem.x.at[rows, contracted], smem.x_smem.at[slot], full)
                for i, w in enumerate((gmem.w_gate, gmem.w_up)):
                    weight = w.at[tile.task.group, contracted, features]
                    plgpu.copy_gmem_to_smem(weight, smem.w_smem.at[slot, i], full)

            self.pipeline.produce(tile.first_step + k, copy)

    def compute(self, tile: GmmTile) -> None:
        """Compute and store a tile, or release its stages if it has no rows of this consumer."""
        rows = tile.warpgroup_rows(self.warpgroup)
        pl.when(rows.count > 0)(functools.partial(self.multiply_and_store, tile, rows))

        @pl.when(rows.count == 0)
        def skip_tile() -> None:
            self.pipeline.skip(tile.first_step, tile.num_steps)

    def multiply_and_store(self, tile: GmmTile, rows: WarpgroupRows) -> None:
        """Compute the rows of this consumer and store them."""

        def operands(_: Any, slot: Array) -> list[tuple[Any, Any]]:
            x = self.smem.x_smem.at[slot, pl.ds(self.warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)]
            return [(x, self.smem.w_smem.at[slot, i]) for i in range(NUM_UP_WEIGHTS)]

        accs = warp_specialized.wgmma_reduce(
            self.pipeline, tile.first_step, tile.num_steps, operands, self.block_n, self.block_n
        )
        buffers = self.smem.store_smem.at[self.warpgroup]
        outs = [out for out in self.out if out is not None]

        def store_chunk(n: int) -> None:
            gate, up = (acc[:, n : n + CHUNK_COLUMNS] for acc in accs)
            # Only the requested outputs.
            for i, (value, out) in enumerate(zip((swiglu(gate, up), gate, up), outs, strict=False)):
                start_copy = functools.partial(warp_specialized.copy_rows_by_powers_of_two, rows, out, tile.column + n)
                chunk = n // CHUNK_COLUMNS * len(outs) + i
                warp_specialized.store_chunk_async(buffers, chunk, value, start_copy)

        remaining = self.block_n if self.F % self.block_n == 0 else self.F - tile.column
        warp_specialized.for_each_chunk(self.block_n, remaining, store_chunk)
