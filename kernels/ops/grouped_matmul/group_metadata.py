"""The rows and the group of each grid step of a grouped matmul, computed on the device from the group sizes.

A step runs one task: one tile of rows for one group. Tiles start at multiples of their size, where blocks can be read,
and a tile that spans several groups has one task per group:

    rows       ├──── group 0 ────┼─ group 1 ─┼── group 2 ──┤ unassigned
    tiles      [ 0  ][ 0  ][ 01 ][ 1  ][ 12 ][ 2  ][ 2·    ]        tasks of groups 0, 0, 0, 1, 1, 1, 2, 2, 2, ·

The tasks of one group are consecutive, so its matrix is read once; the tasks of one tile are consecutive too, so its
output stays on the chip. There are at most tiles + E - 1 tasks, or one more if some rows are unassigned. The tables
have that many entries; the grid has as many steps as there are tasks.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class ForwardTables(NamedTuple):
    """The scalar-prefetched tables of a grouped matmul, one entry per task.

    Attributes:
        group: index of the matrix; for unassigned rows, that of the last group.
        tile: index of the tile of rows.
        row_start, row_end: the group's rows; for unassigned rows the range ends before it starts.
        covers_tile: 1 where the group's rows start at or before the tile and reach into its last chunk.
    """

    group: Array
    tile: Array
    row_start: Array
    row_end: Array
    covers_tile: Array


class ReductionTables(NamedTuple):
    """The scalar-prefetched tables of a sum over rows, one entry per task.

    Attributes:
        group: index of the sum that the rows contribute to.
        tile: index of the tile of rows.
        row_start, row_end: the group's rows.
        is_group_start: 1 at the first task of a group.
    """

    group: Array
    tile: Array
    row_start: Array
    row_end: Array
    is_group_start: Array


class GroupMetadata(NamedTuple):
    """The tasks in order; all fields but `count` are tables.

    Attributes:
        count: number of tasks.
        group: index of the group; E for unassigned rows.
        row: the first row of the tile.
        row_start, row_end: the task has the rows row_start <= n < row_end of the tile.
    """

    count: Array
    group: Array
    row: Array
    row_start: Array
    row_end: Array

    def forward_tables(self, block_m: int, block_m_sub: int, E: int) -> ForwardTables:
        """Return the tables of tiles at multiples of `block_m`, in chunks of `block_m_sub` rows.

        A kernel step would compute them on its critical path, so they are prepared here.
        """
        row_end = jnp.where(self.group < E, self.row_end, 0)
        covers_tile = (self.row_start <= self.row) & (self.row + (block_m - block_m_sub) < row_end)
        return ForwardTables(
            jnp.minimum(self.group, E - 1),
            self.row // block_m,
            self.row_start,
            row_end,
            covers_tile.astype(jnp.int32),
        )

    def reduction_tables(self, block_m: int) -> ReductionTables:
        """Return the tables of sums over rows."""
        is_group_start = jnp.append(jnp.array(True), self.group[1:] != self.group[:-1])
        return ReductionTables(
            self.group, self.row // block_m, self.row_start, self.row_end, is_group_start.astype(jnp.int32)
        )


class TileTask(NamedTuple):
    """One task, as a kernel sees it; see `GroupMetadata` for the fields."""

    group: Array
    row: Array
    row_start: Array
    row_end: Array

    @classmethod
    def load(cls, tables: Any, index: Array, block_m: int) -> "TileTask":
        """Load a task from `ForwardTables` or `ReductionTables` in scalar memory."""
        group, tile, row_start, row_end = (table[index] for table in tables[:4])
        return cls(group, tile * block_m, row_start, row_end)

    def row_mask(self, shape: tuple[int, int], axis: int, first: int = 0) -> Array:
        """Return a mask of the rows of this task in the tile, from row `first` on; rows run along `axis`."""
        n = self.row + first + jax.lax.broadcasted_iota(jnp.int32, shape, axis)
        return (self.row_start <= n) & (n < self.row_end)


def make_group_metadata(
    group_sizes: Array, N: int, block_m: int, *, align: int | None = None, visit_empty_groups: bool = False
) -> GroupMetadata:
    """Compute the tasks of N rows in tiles of `block_m` rows, at multiples of their size.

    Args:
        group_sizes: [E] int32.
        N: number of rows, assigned or not.
        block_m: rows per tile.
        align: start a group's first tile at a multiple of this instead; tiles may then reach past N, and fewer of
            them span groups.
        visit_empty_groups: for sums over rows, one per group: make a task for groups without rows too, and none for
            unassigned rows.
    """
    E = group_sizes.shape[0]
    sizes = group_sizes.astype(jnp.int32)
    ends = jnp.cumsum(sizes)
    sizes = jnp.append(sizes, N - ends[-1])
    ends = jnp.append(ends, N)
    starts = ends - sizes
    align = block_m if align is None else align
    first_row = starts // align * align
    tiles = jnp.where(sizes > 0, -(-(ends - first_row) // block_m), 0)
    if visit_empty_groups:
        tiles = jnp.maximum(tiles, 1).at[E].set(0)
    task_ends = jnp.cumsum(tiles)  # number of tasks up to the end of each group
    task = jnp.arange(-(-N // block_m) + E, dtype=jnp.int32)
    group = jnp.minimum(jnp.sum(task_ends[None] <= task[:, None], axis=1, dtype=jnp.int32), E)
    row = first_row[group] + (task - (task_ends - tiles)[group]) * block_m
    # A tile that would reach past the end starts earlier instead; a group that ends before it has no row in it.
    row = jnp.minimum(row, (-(-N // align) - 1) * align)
    return GroupMetadata(task_ends[-1], group, row, starts[group], ends[group])


def zero_unassigned_rows(y: Array, group_sizes: Array) -> Array:
    """Zero the unassigned rows of y [N, ...], even where they are NaN."""
    return jnp.where(broadcast_row_mask(jnp.arange(y.shape[0]) < jnp.sum(group_sizes), y), y, 0)


def broadcast_row_mask(row_mask: Array, value: Array) -> Array:
    """Return a mask of rows with as many axes as the value."""
    return row_mask.reshape(-1, *[1] * (value.ndim - 1))
