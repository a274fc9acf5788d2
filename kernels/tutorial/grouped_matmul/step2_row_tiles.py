"""Step 2, tiles of rows: a tile is multiplied only with the groups that have rows in it.

Math      as step 1, for each tile of rows and each group that has rows in it
Tiling    grid (tiles of N, E), all groups of a tile in sequence:

              groups ->    w[0]   w[1]   w[2]   w[3]
              row_tile      ▞      ░      ░      ░
              row_tile      ▞      ▞      ░      ░      ▞ computed, then masked
              row_tile      ░      ▞      ▞      ▞      ░ a step of the grid that loads weights and skips the product

State     y, in its output block, over the groups of a tile.
Traffic   x and y once, the weights of every group once per tile: E M F N / row_tile elements. 2 M F FLOPs per row and
          group in a tile; a tile of rows of one group is computed once. The chip holds tiles of x and y, and the
          weights of two groups.
Limits    float32, bfloat16; float16 only interpreted. Any N, E, and M, F whose weights fit. NotImplementedError: w_up.
          ValueError: other shapes and dtypes; tiles that are not multiples of 16.
Source    Gale et al., MegaBlocks (arXiv:2211.15841): a product with block-diagonal x, whose zero blocks are skipped.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dantinox.kernels.tutorial.grouped_matmul.common import call_options, check, dot, group_offsets, row_index

Array = jax.Array


def grouped_matmul(x: Array, w: Array, group_sizes: Array, *, row_tile: int = 128, **unsupported: None) -> Array:
    """[N, F], as `dantinox.kernels.grouped_matmul`: x [N, M], w [E, M, F], group_sizes [E]."""
    group_sizes = check(x, w, group_sizes, row_tile, **unsupported)
    N, (E, M, F) = x.shape[0], w.shape
    if 0 in (x.size, w.size):
        return jnp.zeros((N, F), x.dtype)
    # The last tile may reach past N: its extra rows hold arbitrary values, affect no other row and are not written.
    kernel = pl.pallas_call(
        _kernel,
        out_shape=jax.ShapeDtypeStruct((N, F), x.dtype),
        grid=(pl.cdiv(N, row_tile), E),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),  # scalars: the offsets are read as numbers, not as vectors
            pl.BlockSpec((row_tile, M), lambda i, e: (i, 0)),
            pl.BlockSpec((None, M, F), lambda i, e: (e, 0, 0)),
        ],
        out_specs=pl.BlockSpec((row_tile, F), lambda i, e: (i, 0)),
        **call_options(),
        name="row_tiles",
    )
    return kernel(group_offsets(group_sizes), x, w)


def _kernel(offsets_ref: Any, x_ref: Any, w_ref: Any, y_ref: Any) -> None:
    row_tile = y_ref.shape[0]
    first, e = pl.program_id(0) * row_tile, pl.program_id(1)
    start, end = offsets_ref[e], offsets_ref[e + 1]

    @pl.when(e == 0)
    def init_output() -> None:
        y_ref[...] = jnp.zeros(y_ref.shape, y_ref.dtype)  # unassigned rows keep it

    @pl.when((start < end) & (start < first + row_tile) & (first < end))
    def multiply() -> None:
        n = row_index(first, row_tile)
        in_group = (start <= n) & (n < end)
        # A selection, not a product with the mask: 0 * NaN would be NaN.
        y_ref[...] = jnp.where(in_group, dot(x_ref[...], w_ref[...]).astype(y_ref.dtype), y_ref[...])
