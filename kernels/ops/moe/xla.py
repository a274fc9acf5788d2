"""The mixture of experts in plain XLA.

On a CPU the rows of an expert are walked in tiles, as in `grouped_matmul/xla.py`, and one pass does all of an expert's
products: a tile's hidden rows are used while they are in cache. A handful of rows is multiplied one by one. On other
devices the products are those of `lax.ragged_dot`.
"""

import jax
import jax.numpy as jnp

from dantinox.kernels.ops.grouped_matmul.group_metadata import zero_unassigned_rows
from dantinox.kernels.ops.grouped_matmul.xla import (
    Tiles,
    _by_platform,
    _dot,
    _groups,
    _no_grad,
    _pad,
    _put,
    _rows,
    _walk,
)
from dantinox.kernels.ops.moe.ragged_dot import experts

Array = jax.Array
EXPERTS: Tiles = ((512, 384), (128, 96), (16, 0))


def _experts_tiles(N: int) -> Tiles:
    return tuple(tile for tile in EXPERTS if tile[0] <= N) or EXPERTS[-1:]


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
    return zero_unassigned_rows(y[:N], group_sizes), (x, gate, up, w_gate, w_up, w_down, group_sizes)


def _experts_cpu_bwd(saved: tuple, dy: Array) -> tuple:
    tiles = _experts_tiles(N := dy.shape[0])
    dx, *dws = _experts_loop_bwd(tiles, *saved, _pad(dy, tiles))
    return zero_unassigned_rows(dx[:N], saved[-1]), *dws, _no_grad(saved[-1])


_experts_cpu.defvjp(_experts_cpu_fwd, _experts_cpu_bwd)


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
    """See `dantinox.kernels.moe_mlp`; arguments are checked there."""
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
