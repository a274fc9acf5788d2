"""Which rows of which group each step of a grouped matmul works on, computed on the device from the sizes.

A step visits one tile of rows for one group. Tiles lie where blocks can be read, at multiples of their size, and a tile
that spans groups is visited once for each:

    rows       ├──── group 0 ────┼─ group 1 ─┼── group 2 ──┤ nobody's
    tiles      [ 0  ][ 0  ][ 01 ][ 1  ][ 12 ][ 2  ][ 2·    ]        0, 0, 0, 1, 1, 1, 2, 2, 2, ·

The visits of a group follow each other, so that its matrix is read once, and those of a tile do too, so that its output
stays on the chip. There are at most tiles + E - 1, or one more if some rows are nobody's. The tables have that many
entries, the grid as many steps as there are visits.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class GroupMetadata(NamedTuple):
    """The visits in order. All but `count` are tables, prefetched into scalar memory.

    Attributes:
        count: how many there are.
        group: whose rows; E where they are nobody's.
        row: the first row of the tile.
        low, high: the rows low <= n < high of the tile are the group's, and this visit's.
    """

    count: Array
    group: Array
    row: Array
    row_start: Array
    row_end: Array

    def forward_tables(self, rows: int, chunk: int, E: int) -> tuple[Array, Array, Array, Array, Array]:
        """The tables of tiles at multiples of `rows`: (matrix, tile, low, high, whole).

        What a step has to compute of them delays all that it does. Rows of nobody end before they begin. Whole is 1
        where a visit begins with its tile, or before it, and has rows of its last chunk.
        """
        row_end = jnp.where(self.group < E, self.row_end, 0)
        whole = (self.row_start <= self.row) & (self.row + (rows - chunk) < row_end)
        return jnp.minimum(self.group, E - 1), self.row // rows, self.row_start, row_end, whole.astype(jnp.int32)

    def reduction_tables(self, rows: int) -> tuple[Array, Array, Array, Array, Array]:
        """The tables of sums over rows: (group, tile, low, high, fresh); fresh is 1 where a group begins."""
        fresh = jnp.append(True, self.group[1:] != self.group[:-1])
        return self.group, self.row // rows, self.row_start, self.row_end, fresh.astype(jnp.int32)


class TileTask(NamedTuple):
    """One visit, seen from inside a kernel."""

    group: Array
    row: Array
    row_start: Array
    row_end: Array

    @classmethod
    def read(cls, tables: Any, v: Array, rows: int) -> "TileTask":
        """Visit `v` of the tables `Visits.blocks` or `Visits.sums`, in scalar memory."""
        group, tile, row_start, row_end = (table[v] for table in tables[:4])
        return cls(group, tile * rows, row_start, row_end)

    def row_mask(self, shape: tuple[int, int], axis: int, first: int = 0) -> Array:
        """Which rows of the tile, from the `first` on, are this visit's; rows run along the axis."""
        n = self.row + first + jax.lax.broadcasted_iota(jnp.int32, shape, axis)
        return (self.row_start <= n) & (n < self.row_end)


def make_group_metadata(
    group_sizes: Array, N: int, rows: int, *, align: int | None = None, visit_empty_groups: bool = False
) -> GroupMetadata:
    """The visits of N rows in tiles of `rows`, at multiples of their size.

    Args:
        unit: a group's first tile lies at a multiple of that instead, and may reach past N: fewer tiles span groups.
        sums: rows are summed, one sum a group: a group without rows is visited too, and what is nobody's is not.
    """
    E = group_sizes.shape[0]
    sizes = group_sizes.astype(jnp.int32)
    ends = jnp.cumsum(sizes)
    sizes = jnp.append(sizes, N - ends[-1])
    ends = jnp.append(ends, N)
    starts = ends - sizes
    align = rows if align is None else align
    first = starts // align * align
    tiles = jnp.where(sizes > 0, -(-(ends - first) // rows), 0)
    if visit_empty_groups:
        tiles = jnp.maximum(tiles, 1).at[E].set(0)
    through = jnp.cumsum(tiles)  # visits up to the end of each group
    v = jnp.arange(-(-N // rows) + E, dtype=jnp.int32)
    group = jnp.minimum(jnp.sum(through <= v[:, None], axis=1, dtype=jnp.int32), E)
    row = first[group] + (v - (through - tiles)[group]) * rows
    # A tile that would reach past the end lies as far back as it must; a group that ends before has no row in it.
    row = jnp.minimum(row, (-(-N // align) - 1) * align)
    return GroupMetadata(through[-1], group, row, starts[group], ends[group])


def zero_unassigned_rows(y: Array, group_sizes: Array) -> Array:
    """y [N, ...] with zeros in rows that are nobody's, whatever is there."""
    return jnp.where(broadcast_row_mask(jnp.arange(y.shape[0]) < jnp.sum(group_sizes), y), y, 0)


def broadcast_row_mask(row_mask: Array, value: Array) -> Array:
    """A mask of rows against values that have more axes."""
    return row_mask.reshape(-1, *[1] * (value.ndim - 1))
