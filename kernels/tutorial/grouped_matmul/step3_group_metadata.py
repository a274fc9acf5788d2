"""Step 3, group metadata: a table on the device names the group of each tile, and groups are padded to full tiles.

Math      as step 1, on rows moved so that each group starts at a multiple of row_tile:  y'[i] = x'[i] w[group[i]]
Tiling    grid (tiles of the groups with rows,), as many as the group sizes need. XLA moves the rows before and after:

              rows          ├── 0 ──┼1┼─── 3 ───┤ unassigned
              padded        [ 0  ][ 0· ][ 1· ][ 3  ][ 3· ]   · copies of other rows: computed, never read
              tile i           0     1     2     3     4
              group[i]         0     0     1     3     3     groups of no rows have no tile

State     none: a step processes one tile, for one group.
Traffic   the weights of each group with rows once, because its tiles follow each other. x and y three times: moving
          rows reads and writes them. Up to row_tile - 1 copied rows per group. 2 M F FLOPs per padded row.
Limits    float32, bfloat16; float16 only interpreted. Any N, E, and M, F whose weights fit. NotImplementedError: w_up.
          ValueError: other shapes and dtypes; tiles that are not multiples of 16.
Source    Pallas: scalar prefetch, grids of dynamic size; vLLM's fused experts pad each expert to full tiles.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dantinox.kernels.tutorial.grouped_matmul.common import call_options, check, dot, find_group, group_offsets

Array = jax.Array


class PaddedLayout(NamedTuple):
    """Where rows are once each group starts at a tile.

    Attributes:
        count: tiles that have rows.
        group: of each tile, of as many tiles as any group sizes may need.
        source: the row [N] that each padded row is a copy of.
        place: the padded row of each row [N].
    """

    count: Array
    group: Array
    source: Array
    place: Array


def grouped_matmul(x: Array, w: Array, group_sizes: Array, *, row_tile: int = 128, **unsupported: None) -> Array:
    """[N, F], as `dantinox.kernels.grouped_matmul`: x [N, M], w [E, M, F], group_sizes [E]."""
    group_sizes = check(x, w, group_sizes, row_tile, **unsupported)
    N, (_, M, F) = x.shape[0], w.shape
    if 0 in (x.size, w.size):
        return jnp.zeros((N, F), x.dtype)
    layout = pad_groups(group_sizes, N, row_tile)
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(jnp.maximum(layout.count, 1),),
        in_specs=[
            pl.BlockSpec((row_tile, M), lambda i, group: (i, 0)),
            pl.BlockSpec((None, M, F), lambda i, group: (group[i], 0, 0)),
        ],
        out_specs=pl.BlockSpec((row_tile, F), lambda i, group: (i, 0)),
    )
    kernel = pl.pallas_call(
        _kernel,
        out_shape=jax.ShapeDtypeStruct((layout.source.size, F), x.dtype),
        grid_spec=grid_spec,
        **call_options(),
        name="group_metadata",
    )
    y = kernel(layout.group, x[layout.source], w)[layout.place]
    return jnp.where(jnp.arange(N)[:, None] < jnp.sum(group_sizes), y, 0)


def pad_groups(group_sizes: Array, N: int, row_tile: int) -> PaddedLayout:
    """Lay out the rows in full tiles. All shapes follow from N, E and row_tile; only values depend on the sizes."""
    E, offsets = group_sizes.shape[0], group_offsets(group_sizes)
    tiles = pl.cdiv(group_sizes, row_tile)
    tile_ends = jnp.cumsum(tiles)
    i = jnp.arange((N + E * (row_tile - 1)) // row_tile)
    group = jnp.minimum(find_group(tile_ends, i), E - 1)
    shift = (tile_ends - tiles) * row_tile - offsets[:-1]  # from a row to its padded row
    source = jnp.arange(i.size * row_tile) - jnp.repeat(shift[group], row_tile)
    n = jnp.arange(N)
    place = n + shift[jnp.minimum(find_group(offsets[1:], n), E - 1)]
    return PaddedLayout(tile_ends[-1], group, jnp.clip(source, 0, N - 1), jnp.clip(place, 0, source.size - 1))


def _kernel(group_ref: Any, x_ref: Any, w_ref: Any, y_ref: Any) -> None:
    y_ref[...] = dot(x_ref[...], w_ref[...]).astype(y_ref.dtype)
