"""Transposed grouped matmul on Hopper, the gradient of the matrices: a sum over the rows of each group.

Math      dw_e = sum of x_n^T dy_n over the rows n of group e; zero for empty groups
Tiling    one persistent thread block per SM takes tile after tile of 128 x 256 of one group's matrix, all of a group
          before those of the next, so its rows of x and dy are read from L2. A stage has 64 rows of a group, from its
          first on, rounded down to a multiple of 8.

              rows ->          step 0     1      2      3
              dw of group 0    ██         ██     █░                   █ rows of the group
              dw of group 1                      ░█     ██     █░     ░ rows of others in a first or last step:
              dw of group 2    no step: zeros                           zeroed in SMEM, in x and in dy

          The two consumer warpgroups each zero half of dy, which both read, and their own 64 columns of x.
State     64 x 256 accumulators per warpgroup in float32 registers.
Traffic   a tile reads 128 columns of x and 256 of dy, 85 FLOPs per byte, from L2; writes dw once. 2 N M F FLOPs. The
          tensor core transposes x as it reads it; memory never holds the transpose.
Limits    as the forward kernel, with M and F for K and J. Unassigned rows do not change the result.
Source    as the forward kernel.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dantinox.kernels.mosaic_gpu import swizzled_smem, widest_swizzle
from dantinox.kernels.ops.grouped_matmul.pallas_sm90 import block_sizes, tile_scheduler, warp_specialized
from dantinox.kernels.ops.grouped_matmul.pallas_sm90.block_sizes import BLOCK_K, BLOCK_M, TMA_ROWS, WARPGROUP_ROWS
from dantinox.kernels.ops.grouped_matmul.pallas_sm90.gmm import pad_rows
from dantinox.kernels.ops.grouped_matmul.pallas_sm90.warp_specialized import (
    CHUNK_COLUMNS,
    COMPUTE_WARPGROUPS,
    Ref,
    Sm90GmmConfig,
    SmemPipeline,
)

Array = jax.Array
TILE_WIDTHS = (256, 128)


class TgmmInputs(NamedTuple):
    """Inputs of the kernel, in global memory."""

    x: Any
    dy: Any
    group_bounds: Any  # [E, 2]: the first row of each group and the row after its last


class TgmmOutputs(NamedTuple):
    """Output of the kernel, in global memory."""

    dw: Any


class TgmmScratch(NamedTuple):
    """Shared memory and barriers of a thread block, in order of allocation."""

    rows_zeroed: Ref  # both consumers have zeroed the rows of other groups
    dy_smem: Ref  # per stage
    empty: Ref
    full: Ref
    store_smem: Ref  # per consumer
    x_smem: Ref  # per stage and consumer


class TgmmTile(NamedTuple):
    """A tile of a group's gradient.

    Attributes:
        group: the group.
        dw_row, dw_column: its first row and column.
        row_start, row_end: the group's rows of x and dy.
        first_step, num_steps: its pipeline steps; tiles of empty groups have none.
    """

    group: Array
    dw_row: Array
    dw_column: Array
    row_start: Array
    row_end: Array
    first_step: Array
    num_steps: Array

    @property
    def first_loaded_row(self) -> Array:
        """First row of the first step: TMA copies start at multiples of `TMA_ROWS`."""
        return self.row_start & -TMA_ROWS


def tgmm(x: Array, dy: Array, group_sizes: Array, config: Sm90GmmConfig, *, name: str = "grouped_matmul_dw") -> Array:
    """Sum x_n^T dy_n over the rows n of each group.

    Args:
        x: [N, M], rows sorted by group; M a multiple of 16.
        dy: [N, F]; F a multiple of 16.
        group_sizes: [E] int32.
        config: see `Sm90GmmConfig`.
        name: name of the kernel.

    Returns:
        [E, M, F] in x's dtype.
    """
    (N, M), F, E, dtype = x.shape, dy.shape[1], group_sizes.shape[0], x.dtype
    sizes = block_sizes.tgmm_block_sizes(N, E, M, F, config.num_sms, widths=config.allowed_widths(*TILE_WIDTHS))
    ends = jnp.cumsum(group_sizes.astype(jnp.int32))
    group_bounds = jnp.stack([ends - group_sizes, ends], axis=1)

    def make_roles(
        gmem: TgmmInputs, out: TgmmOutputs, smem: TgmmScratch, pipeline: SmemPipeline, warpgroup: Array
    ) -> TgmmKernel:
        return TgmmKernel(gmem, out, smem, pipeline, warpgroup, E, M, F, sizes.block_n)

    swizzle = widest_swizzle(dtype, M, F)
    scratch = TgmmScratch(
        rows_zeroed=plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS),
        dy_smem=swizzled_smem((sizes.stages, BLOCK_K, sizes.block_n), dtype, swizzle),
        empty=warp_specialized.empty_barriers(sizes.stages),
        full=warp_specialized.full_barriers(sizes.stages, copies=COMPUTE_WARPGROUPS + 1),
        store_smem=warp_specialized.store_smem(dtype, swizzle),
        x_smem=swizzled_smem((sizes.stages, COMPUTE_WARPGROUPS, BLOCK_K, WARPGROUP_ROWS), dtype, swizzle),
    )
    outputs = warp_specialized.launch_warp_specialized(
        make_roles,
        TgmmInputs(pad_rows(x), pad_rows(dy), group_bounds),
        TgmmOutputs(dw=jax.ShapeDtypeStruct((E, M, F), dtype)),
        scratch,
        config,
        stages=sizes.stages,
        name=name,
    )
    return outputs.dw


@dataclass(frozen=True, eq=False)
class TgmmKernel:
    """The sums on one thread block; see `WarpgroupRoles`."""

    gmem: TgmmInputs
    out: TgmmOutputs
    smem: TgmmScratch
    pipeline: SmemPipeline
    warpgroup: Array
    E: int
    M: int
    F: int
    block_n: int

    def for_each_tile(self, run_tile: Callable[[TgmmTile], None]) -> Array:
        """Run run_tile(tile) for the tiles of this thread block; return the number of pipeline steps."""
        row_tiles, column_tiles = pl.cdiv(self.M, BLOCK_M), pl.cdiv(self.F, self.block_n)
        tiles_per_group = row_tiles * column_tiles

        def run_nth_tile(n: Array, step: Array) -> Array:
            group = lax.div(n, jnp.int32(tiles_per_group))
            row_tile, column_tile = tile_scheduler.snake_order(n - group * tiles_per_group, row_tiles, column_tiles)
            start, end = self.gmem.group_bounds[group, 0], self.gmem.group_bounds[group, 1]
            first_row = start & -TMA_ROWS
            num_steps = jnp.where(end > start, lax.div(end - first_row + (BLOCK_K - 1), jnp.int32(BLOCK_K)), 0)
            dw_row, dw_column = row_tile * BLOCK_M, column_tile * self.block_n
            run_tile(TgmmTile(group, dw_row, dw_column, start, end, step, num_steps))
            return step + num_steps

        return tile_scheduler.for_each_persistent_tile(self.E * tiles_per_group, run_nth_tile)

    def load(self, tile: TgmmTile) -> None:
        """Load the rows of x and dy of a tile's group, 64 per stage."""

        @pl.loop(0, tile.num_steps)
        def load_stage(k: Array) -> None:
            rows = pl.ds(pl.multiple_of(tile.first_loaded_row + k * BLOCK_K, TMA_ROWS), BLOCK_K)

            def copy(slot: Array) -> None:
                full = self.pipeline.full.at[slot]
                for wg in range(COMPUTE_WARPGROUPS):
                    columns = pl.ds(tile.dw_row + wg * WARPGROUP_ROWS, WARPGROUP_ROWS)
                    plgpu.copy_gmem_to_smem(self.gmem.x.at[rows, columns], self.smem.x_smem.at[slot, wg], full)
                dy = self.gmem.dy.at[rows, pl.ds(tile.dw_column, self.block_n)]
                plgpu.copy_gmem_to_smem(dy, self.smem.dy_smem.at[slot], full)

            self.pipeline.produce(tile.first_step + k, copy)

    def compute(self, tile: TgmmTile) -> None:
        """Store this consumer's 64 rows of a group's gradient."""

        def operands(k: Array, slot: Array) -> list[tuple[Any, Any]]:
            start = tile.row_start - tile.first_loaded_row - k * BLOCK_K
            end = tile.row_end - tile.first_loaded_row - k * BLOCK_K
            zero_others = functools.partial(self.zero_other_groups, slot, start, end)
            pl.when((start > 0) | (end < BLOCK_K))(zero_others)
            return [(self.smem.x_smem.at[slot, self.warpgroup].transpose((1, 0)), self.smem.dy_smem.at[slot])]

        (acc,) = warp_specialized.wgmma_reduce(self.pipeline, tile.first_step, tile.num_steps, operands, self.block_n)
        rows = pl.ds(tile.dw_row + self.warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)

        def store_chunk(n: int) -> None:
            def start_copy(first: int, buffer: Ref) -> None:
                columns = pl.ds(tile.dw_column + n + first, buffer.shape[-1])
                plgpu.copy_smem_to_gmem(buffer, self.out.dw.at[tile.group, rows, columns], commit_group=False)

            buffers, chunk = self.smem.store_smem.at[self.warpgroup], acc[:, n : n + CHUNK_COLUMNS]
            warp_specialized.store_chunk_async(buffers, n // CHUNK_COLUMNS, chunk, start_copy)

        def store_tile() -> None:
            remaining = self.block_n if self.F % self.block_n == 0 else self.F - tile.dw_column
            warp_specialized.for_each_chunk(self.block_n, remaining, store_chunk)

        if self.M % BLOCK_M == 0:
            store_tile()
        else:
            pl.when(tile.dw_row + self.warpgroup * WARPGROUP_ROWS < self.M)(store_tile)

    def zero_other_groups(self, slot: Array, start: Array, end: Array) -> None:
        """Zero the rows of a stage outside [start, end): this consumer's columns of x and its half of dy."""
        half = self.block_n // COMPUTE_WARPGROUPS
        dy_half = [
            self.smem.dy_smem.at[slot, :, pl.ds(self.warpgroup * half + n, CHUNK_COLUMNS)]
            for n in range(0, half, CHUNK_COLUMNS)
        ]
        for chunk in (self.smem.x_smem.at[slot, self.warpgroup], *dy_half):
            n = plgpu.broadcasted_iota(jnp.int32, chunk.shape, 0, layout=plgpu.Layout.WGMMA)
            value = plgpu.load(chunk, layout=plgpu.Layout.WGMMA)
            chunk[...] = jnp.where((n >= start) & (n < end), value, jnp.zeros_like(value))
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.smem.rows_zeroed)
        plgpu.barrier_wait(self.smem.rows_zeroed)
