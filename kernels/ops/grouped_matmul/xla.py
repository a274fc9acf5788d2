"""Grouped matmul in plain XLA.

On CPU `lax.ragged_dot` multiplies every row with every group's matrix, so its cost grows with E. Here each group is
walked in row tiles by a loop whose trip count follows the rows that are there:

    rows    ├── group 0 ──┼ group 1 ┼───── group 2 ─────┤ nobody's
    tiles   [ 0 ][ 0 ][ 0 ]                                 the last tile of a group runs into the next group;
                     [ 1 ][ 1 ]                             groups are walked in order, so the rows it spoils
                               [ 2 ][ 2 ][ 2 ][ 2 ]         are written once more by their owner

The end of a group is walked in small tiles, so little is wasted. Only dw needs a mask: there the
rows are summed. On other devices `lax.ragged_dot` is used.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dantinox.kernels.dispatch import current_device
from dantinox.kernels.ops.grouped_matmul.group_metadata import zero_unassigned_rows
from dantinox.kernels.ops.grouped_matmul.ragged_dot import ragged

Array = jax.Array
Tiles = tuple[tuple[int, int], ...]
# (rows of a tile, so few rows are cheaper in smaller ones), falling; measured for float32. XLA packs a matrix anew for
# every tile; rows that a tile has too many cost a mixture six to nine products, and it takes smaller ones.
MATMUL: Tiles = ((256, 128), (64, 0))
MATMUL_FEW: Tiles = ((64, 32), (16, 0))  # below 1024 rows


def _matmul_tiles(N: int) -> Tiles:
    return MATMUL if N >= 1024 else MATMUL_FEW


def _dot(a: Array, b: Array, axes: tuple[int, int]) -> Array:
    """Contract axis axes[0] of a with axes[1] of b, accumulating in float32 or wider."""
    wide = jnp.promote_types(a.dtype, jnp.float32)
    return jax.lax.dot_general(a, b, (((axes[0],), (axes[1],)), ((), ())), preferred_element_type=wide)


def _rows(x: Array, row: Array, tile: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, row, tile)


def _put(x: Array, update: Array, row: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, update.astype(x.dtype), row, 0)


def _pad(x: Array, tiles: Tiles) -> Array:
    """Room for the last tile to run over the end."""
    return jnp.pad(x, ((0, tiles[0][0]), (0, 0)))


def _walk(tiles: Tiles, start: Array, end: Array, body: Callable[[Array, int, Any], Any], carry: Any) -> Any:
    """carry = body(row, tile, carry) over the row tiles of one group, ascending.

    A loop a tile size, not a switch between sizes: XLA on CPU runs elementwise work inside a conditional on one thread.
    """
    state = (start, carry)
    for tile, leave in tiles:

        def more(state: tuple[Array, Any], leave: int = leave) -> Array:
            return end - state[0] > leave

        def step(state: tuple[Array, Any], tile: int = tile) -> tuple[Array, Any]:
            row, carry = state
            return row + tile, body(row, tile, carry)

        state = jax.lax.while_loop(more, step, state)
    return state[1]


def _groups(group_sizes: Array) -> tuple[Array, Array]:
    ends = jnp.cumsum(group_sizes.astype(jnp.int32))
    return ends - group_sizes, ends


def _matmul_loop(x: Array, w: Array, group_sizes: Array, transpose: bool) -> Array:
    """y[n] = x[n] @ w[e], or x[n] @ w[e].T."""
    starts, ends = _groups(group_sizes)
    tiles = _matmul_tiles(N := x.shape[0])
    x = _pad(x, tiles)

    def group(e: Array, y: Array) -> Array:
        w_e = w[e]

        def tile(row: Array, size: int, y: Array) -> Array:
            return _put(y, _dot(_rows(x, row, size), w_e, (1, 1 if transpose else 0)), row)

        return _walk(tiles, starts[e], ends[e], tile, y)

    y = jnp.empty((x.shape[0], w.shape[1 if transpose else 2]), x.dtype)  # every owned row is written below
    return zero_unassigned_rows(jax.lax.fori_loop(0, w.shape[0], group, y)[:N], group_sizes)


def _weight_grad_loop(x: Array, dy: Array, group_sizes: Array, dtype: jnp.dtype) -> Array:
    """dw[e] = sum over the rows n of group e of x[n]^T dy[n]: [E, M, F]."""
    starts, ends = _groups(group_sizes)
    tiles = _matmul_tiles(x.shape[0])
    x, dy = _pad(x, tiles), _pad(dy, tiles)
    wide = jnp.promote_types(dtype, jnp.float32)

    def group(_: None, bounds: tuple[Array, Array]) -> tuple[None, Array]:
        start, end = bounds

        def tile(row: Array, size: int, dw: Array) -> Array:
            mine = (row + jnp.arange(size) < end)[:, None]
            x_t, dy_t = (jnp.where(mine, _rows(a, row, size), 0) for a in (x, dy))
            return dw + _dot(x_t, dy_t, (0, 0))

        dw = _walk(tiles, start, end, tile, jnp.zeros((x.shape[1], dy.shape[1]), wide))
        return None, dw.astype(dtype)

    return jax.lax.scan(group, None, (starts, ends))[1]


@jax.custom_vjp
def _matmul_cpu(x: Array, w: Array, group_sizes: Array) -> Array:
    return _matmul_loop(x, w, group_sizes, transpose=False)


def _matmul_cpu_fwd(x: Array, w: Array, group_sizes: Array) -> tuple[Array, tuple]:
    return _matmul_cpu(x, w, group_sizes), (x, w, group_sizes)


def _matmul_cpu_bwd(saved: tuple, dy: Array) -> tuple:
    x, w, group_sizes = saved
    dx = _matmul_loop(dy, w, group_sizes, transpose=True)
    return dx, _weight_grad_loop(x, dy, group_sizes, w.dtype), _no_grad(group_sizes)


_matmul_cpu.defvjp(_matmul_cpu_fwd, _matmul_cpu_bwd)


def _no_grad(ids: Array) -> np.ndarray:
    return np.zeros(ids.shape, jax.dtypes.float0)


def grouped_matmul(x: Array, w: Array, group_sizes: Array) -> Array:
    """See `dantinox.kernels.grouped_matmul`; arguments are checked there."""
    return _by_platform(x, w, group_sizes, cpu=_matmul_cpu, default=ragged)


def _by_platform(*args: Array, cpu: Callable[..., Array], default: Callable[..., Array]) -> Array:
    """For a CPU the other branch is not even traced: vmap cannot batch ragged_dot in every form."""
    if current_device().platform == "cpu":
        return cpu(*args)
    return jax.lax.platform_dependent(*args, cpu=cpu, default=default)
