"""Grouped matmul and the mixture of experts in plain XLA.

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

from kernels.dispatch import device
from kernels.grouped_matmul.groups import owned

Array = jax.Array

Tiles = tuple[tuple[int, int], ...]

# (rows of a tile, so few rows are cheaper in smaller ones), falling; measured for float32. XLA packs a matrix anew for
# every tile; rows that a tile has too many cost a mixture six to nine products, and it takes smaller ones.
MATMUL: Tiles = ((256, 128), (64, 0))
MATMUL_FEW: Tiles = ((64, 32), (16, 0))  # below 1024 rows
EXPERTS: Tiles = ((512, 384), (128, 96), (16, 0))


def _matmul_tiles(N: int) -> Tiles:
    return MATMUL if N >= 1024 else MATMUL_FEW


def _experts_tiles(N: int) -> Tiles:
    return tuple(tile for tile in EXPERTS if tile[0] <= N) or EXPERTS[-1:]


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


# --- grouped matmul ------------------------------------------------------------------------------------------------


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
    return owned(jax.lax.fori_loop(0, w.shape[0], group, y)[:N], group_sizes)


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


def _ragged(x: Array, w: Array, group_sizes: Array) -> Array:
    # What nobody owns is cleared before too, so that a NaN there cannot reach dw.
    x = owned(x, group_sizes)
    return owned(jax.lax.ragged_dot(x, w, group_sizes.astype(jnp.int32)), group_sizes)


def grouped_matmul(x: Array, w: Array, group_sizes: Array) -> Array:
    """See `kernels.grouped_matmul`; arguments are checked there."""
    return _by_platform(x, w, group_sizes, cpu=_matmul_cpu, default=_ragged)


def _by_platform(*args: Array, cpu: Callable[..., Array], default: Callable[..., Array]) -> Array:
    """For a CPU the other branch is not even traced: vmap cannot batch ragged_dot in every form."""
    if device().platform == "cpu":
        return cpu(*args)
    return jax.lax.platform_dependent(*args, cpu=cpu, default=default)


# --- mixture of experts --------------------------------------------------------------------------------------------


def _experts_loop(
    tiles: Tiles, x: Array, w_gate: Array, w_up: Array, w_down: Array, group_sizes: Array
) -> tuple[Array, ...]:
    """(y, x w_gate, x w_up) of rows sorted by expert, one pass: a tile's hidden rows are used while in cache.

    x is padded for the tiles; what comes back has its rows, those past the last group unspecified.
    """
    starts, ends = _groups(group_sizes)

    def group(e: Array, out: tuple[Array, ...]) -> tuple[Array, ...]:
        gate_e, up_e, down_e = w_gate[e], w_up[e], w_down[e]

        def tile(row: Array, size: int, out: tuple[Array, ...]) -> tuple[Array, ...]:
            x_t = _rows(x, row, size)
            g, u = _dot(x_t, gate_e, (1, 0)), _dot(x_t, up_e, (1, 0))
            h = (jax.nn.silu(g) * u).astype(x.dtype)
            return tuple(_put(a, b, row) for a, b in zip(out, (_dot(h, down_e, (1, 0)), g, u), strict=True))

        return _walk(tiles, starts[e], ends[e], tile, out)

    E, M, F = w_gate.shape
    out = tuple(jnp.empty((x.shape[0], width), x.dtype) for width in (M, F, F))
    return jax.lax.fori_loop(0, E, group, out)


def _experts_loop_bwd(
    tiles: Tiles,
    x: Array,
    gate: Array,
    up: Array,
    w_gate: Array,
    w_up: Array,
    w_down: Array,
    group_sizes: Array,
    dy: Array,
) -> tuple[Array, Array, Array, Array]:
    """(dx, dw_gate, dw_up, dw_down); gate = x w_gate and up = x w_up were kept: recomputing costs 2 matmuls of 9.

    x, gate, up, dy and dx are padded, as in `_experts_loop`.
    """
    starts, ends = _groups(group_sizes)
    dtype = x.dtype
    wide = jnp.promote_types(dtype, jnp.float32)

    def group(dx: Array, of: tuple) -> tuple[Array, tuple[Array, ...]]:
        start, end, gate_e, up_e, down_e = of

        def tile(row: Array, size: int, carry: tuple) -> tuple:
            dx, dw_gate, dw_up, dw_down = carry
            mine = (row + jnp.arange(size) < end)[:, None]
            x_t, g, u, dy_t = (jnp.where(mine, _rows(a, row, size), 0) for a in (x, gate, up, dy))
            dh = _dot(dy_t, down_e, (1, 1))
            g, u = g.astype(wide), u.astype(wide)
            s = jax.nn.sigmoid(g)
            h, du, dg = (g * s * u), dh * g * s, dh * u * s * (1 + g * (1 - s))
            h, du, dg = (a.astype(dtype) for a in (h, du, dg))
            dx = _put(dx, _dot(du, up_e, (1, 1)) + _dot(dg, gate_e, (1, 1)), row)
            return (
                dx,
                dw_gate + _dot(x_t, dg, (0, 0)),
                dw_up + _dot(x_t, du, (0, 0)),
                dw_down + _dot(h, dy_t, (0, 0)),
            )

        zeros = [jnp.zeros(w.shape, wide) for w in (gate_e, up_e, down_e)]
        dx, *dws = _walk(tiles, start, end, tile, (dx, *zeros))
        return dx, tuple(dw.astype(dtype) for dw in dws)

    dx, dws = jax.lax.scan(group, jnp.empty_like(x), (starts, ends, w_gate, w_up, w_down))
    return dx, *dws


@jax.custom_vjp
def _experts_cpu(x: Array, w_gate: Array, w_up: Array, w_down: Array, group_sizes: Array) -> Array:
    return _experts_cpu_fwd(x, w_gate, w_up, w_down, group_sizes)[0]


def _experts_cpu_fwd(x: Array, w_gate: Array, w_up: Array, w_down: Array, group_sizes: Array) -> tuple:
    tiles = _experts_tiles(N := x.shape[0])
    x = _pad(x, tiles)
    y, gate, up = _experts_loop(tiles, x, w_gate, w_up, w_down, group_sizes)
    return owned(y[:N], group_sizes), (x, gate, up, w_gate, w_up, w_down, group_sizes)


def _experts_cpu_bwd(saved: tuple, dy: Array) -> tuple:
    tiles = _experts_tiles(N := dy.shape[0])
    dx, *dws = _experts_loop_bwd(tiles, *saved, _pad(dy, tiles))
    return owned(dx[:N], saved[-1]), *dws, _no_grad(saved[-1])


_experts_cpu.defvjp(_experts_cpu_fwd, _experts_cpu_bwd)


def experts(x: Array, w_gate: Array, w_up: Array, w_down: Array, group_sizes: Array) -> Array:
    """The experts of rows [R, M] sorted by expert, on other devices than a CPU: [R, M]."""
    h = jax.nn.silu(_ragged(x, w_gate, group_sizes)) * _ragged(x, w_up, group_sizes)
    return _ragged(h, w_down, group_sizes)


@jax.custom_vjp
def _gather(x: Array, index: Array, inverse: Array) -> Array:
    """x[index] where each row of x is taken k times, and `inverse` [rows of x, k] says where to.

    So its gradient is a gather and a sum: deterministic, and faster than the scatter that XLA would make of it.
    """
    return x[index]


def _gather_fwd(x: Array, index: Array, inverse: Array) -> tuple[Array, tuple]:
    return x[index], (index, inverse)


def _gather_bwd(saved: tuple, dy: Array) -> tuple:
    index, inverse = saved
    dx = sum(dy[inverse[:, j]].astype(jnp.promote_types(dy.dtype, jnp.float32)) for j in range(inverse.shape[1]))
    return dx.astype(dy.dtype), _no_grad(index), _no_grad(inverse)


_gather.defvjp(_gather_fwd, _gather_bwd)


FEW_ROWS = 8  # N * k up to which each routed row is multiplied alone
BLOCK = 1 << 15  # numbers of a matrix copied at a time: the copy stays in cache


def _vector(x: Array, ws: tuple[Array, ...], e: Array) -> tuple[Array, ...]:
    """x [M] times w[e] for each w [E, M, F]: only the matrices of expert e are ever touched, block by block."""
    M, F = ws[0].shape[1:]
    rows = max(1, BLOCK // F)
    while M % rows:
        rows -= 1
    wide = jnp.promote_types(x.dtype, jnp.float32)

    def block(i: Array, ys: tuple[Array, ...]) -> tuple[Array, ...]:
        x_i = jax.lax.dynamic_slice(x, (i * rows,), (rows,))[None]
        blocks = (jax.lax.dynamic_slice(w, (e, i * rows, 0), (1, rows, F))[0] for w in ws)
        return tuple(y + _dot(x_i, w_i, (1, 0)) for y, w_i in zip(ys, blocks, strict=True))

    ys = jax.lax.fori_loop(0, M // rows, block, tuple(jnp.zeros((1, F), wide) for _ in ws))
    return tuple(y[0] for y in ys)


@jax.custom_vjp
def _few_cpu(x: Array, w_gate: Array, w_up: Array, w_down: Array, expert_ids: Array, expert_weights: Array) -> Array:
    """Decoding: a handful of rows, bound by reading the weights of the experts that they are routed to."""
    N, k = expert_ids.shape
    wide = jnp.promote_types(x.dtype, jnp.float32)

    def row(r: Array, y: Array) -> Array:
        n, e = r // k, expert_ids.reshape(-1)[r]
        g, u = _vector(x[n], (w_gate, w_up), e)
        (d,) = _vector((jax.nn.silu(g) * u).astype(x.dtype), (w_down,), e)
        return y.at[n].add(expert_weights.reshape(-1)[r].astype(wide) * d.astype(x.dtype).astype(wide))

    return jax.lax.fori_loop(0, N * k, row, jnp.zeros(x.shape, wide)).astype(x.dtype)


def _few_cpu_bwd(saved: tuple, dy: Array) -> tuple:
    x, w_gate, w_up, w_down, expert_ids, expert_weights = saved
    _, back = jax.vjp(lambda *a: _sorted(*a[:4], expert_ids, a[4]), x, w_gate, w_up, w_down, expert_weights)
    *grads, d_weights = back(dy)
    return *grads, _no_grad(expert_ids), d_weights


_few_cpu.defvjp(lambda *args: (_few_cpu(*args), args), _few_cpu_bwd)


def moe_mlp(x: Array, w_gate: Array, w_up: Array, w_down: Array, expert_ids: Array, expert_weights: Array) -> Array:
    """See `kernels.moe_mlp`; arguments are checked there."""
    args = (x, w_gate, w_up, w_down, expert_ids, expert_weights)
    if expert_ids.size <= FEW_ROWS:
        return _by_platform(*args, cpu=_few_cpu, default=_sorted)
    return _sorted(*args)


def _sorted(x: Array, w_gate: Array, w_up: Array, w_down: Array, expert_ids: Array, expert_weights: Array) -> Array:
    """Sort the N * k routed rows by expert, run the experts, put the rows back and combine."""
    N, k = expert_ids.shape
    E = w_gate.shape[0]
    flat = expert_ids.reshape(-1)
    order = jnp.argsort(flat, stable=True)  # sorted row -> n * k + j
    place = jnp.zeros_like(order).at[order].set(jnp.arange(N * k, dtype=order.dtype), unique_indices=True)
    group_sizes = jnp.sum(flat[:, None] == jnp.arange(E)[None], axis=0, dtype=jnp.int32)
    rows = _gather(x, order // k, place.reshape(N, k))
    y = _by_platform(rows, w_gate, w_up, w_down, group_sizes, cpu=_experts_cpu, default=experts)
    back = _gather(y, place, order[:, None]).reshape(N, k, -1)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.sum(back.astype(wide) * expert_weights.astype(wide)[..., None], axis=1).astype(x.dtype)
