"""Order of the output tiles of the Hopper grouped matmuls, and their distribution over persistent thread blocks.

A tile is a task of `group_metadata.py`, 128 rows of one group, times `block_n` columns. Tasks start at a group's first
row, rounded down to a multiple of `TMA_ROWS`. Thread blocks that run at the same time share the columns of
`PANEL_ROW_TILES` tasks, so that they read rows and weights from L2.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dantinox.kernels.ops.grouped_matmul.group_metadata import GroupMetadata, TileTask, make_group_metadata
from dantinox.kernels.ops.grouped_matmul.pallas_sm90.block_sizes import BLOCK_M, TMA_ROWS, WARPGROUP_ROWS

Array = jax.Array
Ref = Any
PANEL_ROW_TILES = 16  # row tiles whose columns are processed together


def snake_order(n: Array, row_tiles: Any, column_tiles: int) -> tuple[Array, Array]:
    """Return (row, column) of the n-th tile; every second panel runs from right to left."""
    # `plgpu.planar_snake` has this order; with it the compiler's loop over the contraction grows, from 50 to 57
    # instructions per step for tiles of 64 columns, from 57 to 59 in tgmm (H100; 168 registers and no spills in both).
    panel = lax.div(n, jnp.int32(PANEL_ROW_TILES * column_tiles))
    n = n - panel * (PANEL_ROW_TILES * column_tiles)
    height = jnp.minimum(PANEL_ROW_TILES, row_tiles - panel * PANEL_ROW_TILES)
    column = lax.div(n, height)
    row = panel * PANEL_ROW_TILES + n - column * height
    return row, jnp.where(panel % 2 == 1, column_tiles - 1 - column, column)


def for_each_persistent_tile(num_tiles: Any, run_tile: Callable[[Array, Array], Array]) -> Array:
    """Run step = run_tile(n, step) for the tiles n of this thread block; `step` counts the pipeline steps, from 0."""
    # `plgpu.nd_loop` visits the same tiles; with it tgmm's loop over the rows has 59 instructions per step, not 57.
    blocks = lax.axis_size("block")
    num_iterations = lax.div(num_tiles - lax.axis_index("block") + (blocks - 1), jnp.int32(blocks))

    def iteration(n: Array, step: Array) -> Array:
        return run_tile(lax.axis_index("block") + n * blocks, step)

    return lax.fori_loop(0, num_iterations, iteration, jnp.int32(0))


class WarpgroupRows(NamedTuple):
    """The rows of a tile that one consumer stores: offset <= n < offset + count, from row `first` of the array on."""

    first: Array
    offset: Array
    count: Array


class GmmTile(NamedTuple):
    """A tile of the output.

    Attributes:
        task: its rows and their group.
        task_index: the index of that in the task table.
        column: its first column.
        first_step, num_steps: its pipeline steps; tiles of unassigned rows have none.
    """

    task: TileTask
    task_index: Array
    column: Array
    first_step: Array
    num_steps: Array

    def warpgroup_rows(self, warpgroup: Array) -> WarpgroupRows:
        """Return the rows of this consumer that belong to the task."""
        first = self.task.row + warpgroup * WARPGROUP_ROWS
        offset = jnp.maximum(self.task.row_start - first, 0)
        return WarpgroupRows(
            first, offset, jnp.maximum(jnp.minimum(self.task.row_end - first, WARPGROUP_ROWS) - offset, 0)
        )


def tma_group_metadata(group_sizes: Array, N: int) -> GroupMetadata:
    """Return the tasks of N rows in tiles of `BLOCK_M` rows, aligned for TMA."""
    return make_group_metadata(group_sizes, N, BLOCK_M, align=TMA_ROWS)


class TaskTable(NamedTuple):
    """The tasks for a kernel.

    Attributes:
        fields: [tasks, 4] int32, the fields of a `TileTask` each.
        count: [1] int32, the number of tasks in use.
    """

    fields: Any
    count: Any


def pack_task_table(metadata: GroupMetadata) -> TaskTable:
    """Pack the metadata into one table for a kernel."""
    return TaskTable(jnp.stack(metadata[1:], axis=1), metadata.count[None])


def for_each_gmm_tile(
    task_fields: Ref,
    num_tasks: Array,
    E: int,
    column_tiles: int,
    block_n: int,
    num_steps: Callable[[Array], Any],
    run_tile: Callable[[GmmTile], None],
) -> Array:
    """Run run_tile(tile) for the tiles of this thread block; return the number of pipeline steps.

    Args:
        task_fields: see `TaskTable`.
        num_tasks: number of tasks.
        E: number of groups; tasks of group E are unassigned rows.
        column_tiles: tiles per task.
        block_n: columns per tile.
        num_steps: pipeline steps of an assigned tile, by its first column.
        run_tile: called once per tile.
    """

    def run_nth_tile(n: Array, step: Array) -> Array:
        task_index, column_tile = snake_order(n, num_tasks, column_tiles)
        task = TileTask(*(task_fields[task_index, field] for field in range(4)))
        column = column_tile * block_n
        tile = GmmTile(task, task_index, column, step, jnp.where(task.group < E, num_steps(column), 0))
        run_tile(tile)
        return step + tile.num_steps

    return for_each_persistent_tile(num_tasks * column_tiles, run_nth_tile)
