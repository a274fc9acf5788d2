"""Grouped matmul in plain XLA.

On a CPU `lax.ragged_dot` multiplies every row with every group's matrix, so its cost grows with E. This module loops
over each group's rows in tiles instead; the trip count follows the number of rows:

    rows    ├── group 0 ──┼ group 1 ┼───── group 2 ─────┤ unassigned
    tiles   [ 0 ][ 0 ][ 0 ]                                 the last tile of a group runs into the next group;
                     [ 1 ][ 1 ]                             groups are processed in order, so the rows it
                               [ 2 ][ 2 ][ 2 ][ 2 ]         overwrites are written again by their own group

Smaller tiles process the end of a group, so little work is wasted. Only dw needs a mask, because it sums over rows.
Other devices use `lax.ragged_dot`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dantinox.kernels.dispatch import current_device
from dantinox.kernels.einsum import accumulation_dtype
from dantinox.kernels.ops.grouped_matmul.group_metadata import zero_unassigned_rows
from dantinox.kernels.ops.grouped_matmul.ragged_dot import zeroed_ragged_dot
from dantinox.kernels.vma import match_vma

Array = jax.Array
RowTiles = tuple[tuple[int, int], ...]
# (rows per tile, rows left over for smaller tiles), decreasing; measured in float32. XLA packs a matrix again for every
# tile. Rows beyond the end cost the mixture of experts six to nine products each, so it uses smaller tiles.
ROW_TILES: RowTiles = ((256, 128), (64, 0))
ROW_TILES_SMALL: RowTiles = ((64, 32), (16, 0))  # below 1024 rows


def _choose_row_tiles(N: int) -> RowTiles:
    is_small = isinstance(N, int) and N < 1024  # the size of an exported program's argument may be a symbol
    return ROW_TILES_SMALL if is_small else ROW_TILES


def dot_accumulate(a: Array, b: Array, axes: tuple[int, int]) -> Array:
    """Contract axis axes[0] of a with axis axes[1] of b, accumulating in float32 or wider."""
    dims = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=accumulation_dtype(a.dtype))


def slice_rows(x: Array, row: Array, size: int) -> Array:
    """Return `size` rows of x, from `row` on."""
    return jax.lax.dynamic_slice_in_dim(x, row, size)


def update_rows(x: Array, update: Array, row: Array) -> Array:
    """Return x with the update written over its rows from `row` on."""
    return jax.lax.dynamic_update_slice_in_dim(x, update.astype(x.dtype), row, 0)


def pad_for_last_tile(x: Array, row_tiles: RowTiles) -> Array:
    """Add rows so that the last tile may run past the end."""
    return jnp.pad(x, ((0, row_tiles[0][0]), (0, 0)))


def loop_row_tiles(
    row_tiles: RowTiles, start: Array, end: Array, body: Callable[[Array, int, Any], Any], carry: Any
) -> Any:
    """Run carry = body(row, size, carry) over the row tiles of one group, ascending.

    There is one loop per tile size, not a switch between sizes: XLA on a CPU runs elementwise work inside a
    conditional on one thread.
    """
    state = (start, carry)
    for size, leftover in row_tiles:

        def has_more(state: tuple[Array, Any], leftover: int = leftover) -> Array:
            return end - state[0] > leftover

        def next_tile(state: tuple[Array, Any], size: int = size) -> tuple[Array, Any]:
            row, carry = state
            return row + size, body(row, size, carry)

        state = jax.lax.while_loop(has_more, next_tile, state)
    return state[1]


def group_bounds(group_sizes: Array) -> tuple[Array, Array]:
    """Return the first row of each group and the row after its last."""
    ends = jnp.cumsum(group_sizes.astype(jnp.int32))
    return ends - group_sizes, ends


def _loop_gmm(x: Array, w: Array, group_sizes: Array, transposed: bool) -> Array:
    """Compute y[n] = x[n] @ w[e], or x[n] @ w[e].T."""
    starts, ends = group_bounds(group_sizes)
    row_tiles = _choose_row_tiles(N := x.shape[0])
    x = pad_for_last_tile(x, row_tiles)

    def multiply_group(e: Array, y: Array) -> Array:
        w_e = w[e]

        def multiply_tile(row: Array, size: int, y: Array) -> Array:
            return update_rows(y, dot_accumulate(slice_rows(x, row, size), w_e, (1, 1 if transposed else 0)), row)

        return loop_row_tiles(row_tiles, starts[e], ends[e], multiply_tile, y)

    y = jnp.empty((x.shape[0], w.shape[1 if transposed else 2]), x.dtype)  # every assigned row is written below
    y = match_vma(y, x, w, group_sizes)
    return zero_unassigned_rows(jax.lax.fori_loop(0, w.shape[0], multiply_group, y)[:N], group_sizes)


def _loop_tgmm(x: Array, dy: Array, group_sizes: Array) -> Array:
    """Sum x[n]^T dy[n] over the rows n of each group: [E, M, F] in x's dtype."""
    starts, ends = group_bounds(group_sizes)
    row_tiles = _choose_row_tiles(x.shape[0])
    x, dy = pad_for_last_tile(x, row_tiles), pad_for_last_tile(dy, row_tiles)
    zeros = jnp.zeros((x.shape[1], dy.shape[1]), accumulation_dtype(x.dtype))
    zeros = match_vma(zeros, x, dy, group_sizes)

    def reduce_group(_: None, bounds: tuple[Array, Array]) -> tuple[None, Array]:
        start, end = bounds

        def add_tile(row: Array, size: int, dw: Array) -> Array:
            row_mask = (row + jnp.arange(size) < end)[:, None]
            x_t, dy_t = (jnp.where(row_mask, slice_rows(a, row, size), 0) for a in (x, dy))
            return dw + dot_accumulate(x_t, dy_t, (0, 0))

        return None, loop_row_tiles(row_tiles, start, end, add_tile, zeros).astype(x.dtype)

    return jax.lax.scan(reduce_group, None, (starts, ends))[1]


# The gradient of either product is made of both, so there are derivatives of every order.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def loop_gmm(x: Array, w: Array, group_sizes: Array, transposed: bool = False) -> Array:
    """Compute y[n] = x[n] @ w[e], or x[n] @ w[e].T, in loops for a CPU."""
    return _loop_gmm(x, w, group_sizes, transposed)


def _loop_gmm_fwd(x: Array, w: Array, group_sizes: Array, transposed: bool) -> tuple[Array, tuple]:
    return loop_gmm(x, w, group_sizes, transposed), (x, w, group_sizes)


def _loop_gmm_bwd(transposed: bool, residuals: tuple, dy: Array) -> tuple:
    x, w, group_sizes = residuals
    dx = loop_gmm(dy, w, group_sizes, not transposed)
    dw = loop_tgmm(dy, x, group_sizes) if transposed else loop_tgmm(x, dy, group_sizes)
    return dx, dw, None


loop_gmm.defvjp(_loop_gmm_fwd, _loop_gmm_bwd)


@jax.custom_vjp
def loop_tgmm(x: Array, dy: Array, group_sizes: Array) -> Array:
    """Sum x[n]^T dy[n] over the rows n of each group, in loops for a CPU: [E, M, F]."""
    return _loop_tgmm(x, dy, group_sizes)


def _loop_tgmm_fwd(x: Array, dy: Array, group_sizes: Array) -> tuple[Array, tuple]:
    return loop_tgmm(x, dy, group_sizes), (x, dy, group_sizes)


def _loop_tgmm_bwd(residuals: tuple, ddw: Array) -> tuple:
    x, dy, group_sizes = residuals
    return loop_gmm(dy, ddw, group_sizes, True), loop_gmm(x, ddw, group_sizes), None


loop_tgmm.defvjp(_loop_tgmm_fwd, _loop_tgmm_bwd)


def grouped_matmul(x: Array, w: Array, group_sizes: Array) -> Array:
    """See `dantinox.kernels.grouped_matmul`, which checks the arguments."""
    return call_for_platform(x, w, group_sizes, cpu=loop_gmm, default=zeroed_ragged_dot)


def call_for_platform(*args: Array, cpu: Callable[..., Array], default: Callable[..., Array]) -> Array:
    """Call `cpu` on a CPU, `default` elsewhere.

    On a CPU the other branch is not traced: vmap cannot batch ragged_dot in every form.
    """
    if current_device().platform == "cpu":
        return cpu(*args)
    return jax.lax.platform_dependent(*args, cpu=cpu, default=default)
