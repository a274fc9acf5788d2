"""The mixture of experts in plain XLA.

On a CPU it loops over the rows of an expert in tiles, as `grouped_matmul/xla.py` does, and one pass computes all of an
expert's products, so that a tile's hidden rows are used while they are in cache. A few rows are multiplied one by
one. Other devices use `lax.ragged_dot`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dantinox.kernels.ops.grouped_matmul.common import float0_zeros
from dantinox.kernels.ops.grouped_matmul.group_metadata import zero_unassigned_rows
from dantinox.kernels.ops.grouped_matmul.xla import (
    RowTiles,
    accumulation_dtype,
    call_for_platform,
    dot_accumulate,
    group_bounds,
    loop_row_tiles,
    pad_for_last_tile,
    slice_rows,
    update_rows,
)
from dantinox.kernels.ops.moe.ragged_dot import ragged_dot_experts
from dantinox.kernels.ops.moe.routing import sort_by_expert

Array = jax.Array
EXPERTS_ROW_TILES: RowTiles = ((512, 384), (128, 96), (16, 0))


def _choose_row_tiles(N: int) -> RowTiles:
    return tuple(tile for tile in EXPERTS_ROW_TILES if tile[0] <= N) or EXPERTS_ROW_TILES[-1:]


def _loop_experts(
    row_tiles: RowTiles, x: Array, w_gate: Array, w_up: Array, w_down: Array, group_sizes: Array
) -> tuple[Array, ...]:
    """Return (y, gate, up) of rows sorted by expert, in one pass.

    x and the results are padded for the tiles; rows of the results past the last group are unspecified.
    """
    starts, ends = group_bounds(group_sizes)

    def run_expert(e: Array, outs: tuple[Array, ...]) -> tuple[Array, ...]:
        w_gate_e, w_up_e, w_down_e = w_gate[e], w_up[e], w_down[e]

        def run_tile(row: Array, size: int, outs: tuple[Array, ...]) -> tuple[Array, ...]:
            x_t = slice_rows(x, row, size)
            gate, up = dot_accumulate(x_t, w_gate_e, (1, 0)), dot_accumulate(x_t, w_up_e, (1, 0))
            h = (jax.nn.silu(gate) * up).astype(x.dtype)
            values = dot_accumulate(h, w_down_e, (1, 0)), gate, up
            return tuple(update_rows(out, value, row) for out, value in zip(outs, values, strict=True))

        return loop_row_tiles(row_tiles, starts[e], ends[e], run_tile, outs)

    E, M, F = w_gate.shape
    outs = tuple(jnp.empty((x.shape[0], width), x.dtype) for width in (M, F, F))
    return jax.lax.fori_loop(0, E, run_expert, outs)


class _Residuals(NamedTuple):
    """x, gate and up are padded for the tiles; recomputing gate and up would cost 2 matmuls of 9."""

    x: Array
    gate: Array
    up: Array
    w_gate: Array
    w_up: Array
    w_down: Array
    group_sizes: Array


def _loop_experts_bwd(row_tiles: RowTiles, residuals: _Residuals, dy: Array) -> tuple[Array, tuple[Array, ...]]:
    """Return dx and (dw_gate, dw_up, dw_down); dy and dx are padded."""
    x, gate, up, w_gate, w_up, w_down, group_sizes = residuals
    starts, ends = group_bounds(group_sizes)
    dtype = x.dtype
    acc_dtype = accumulation_dtype(dtype)

    def run_expert(dx: Array, expert: tuple) -> tuple[Array, tuple[Array, ...]]:
        start, end, w_gate_e, w_up_e, w_down_e = expert

        def run_tile(row: Array, size: int, carry: tuple) -> tuple:
            dx, dw_gate, dw_up, dw_down = carry
            row_mask = (row + jnp.arange(size) < end)[:, None]
            x_t, gate_t, up_t, dy_t = (jnp.where(row_mask, slice_rows(a, row, size), 0) for a in (x, gate, up, dy))
            dh = dot_accumulate(dy_t, w_down_e, (1, 1))
            gate_t, up_t = gate_t.astype(acc_dtype), up_t.astype(acc_dtype)
            sigmoid_gate = jax.nn.sigmoid(gate_t)
            h, dup = gate_t * sigmoid_gate * up_t, dh * gate_t * sigmoid_gate
            dgate = dh * up_t * sigmoid_gate * (1 + gate_t * (1 - sigmoid_gate))
            h, dup, dgate = (a.astype(dtype) for a in (h, dup, dgate))
            dx_t = dot_accumulate(dup, w_up_e, (1, 1)) + dot_accumulate(dgate, w_gate_e, (1, 1))
            dx = update_rows(dx, dx_t, row)
            return (
                dx,
                dw_gate + dot_accumulate(x_t, dgate, (0, 0)),
                dw_up + dot_accumulate(x_t, dup, (0, 0)),
                dw_down + dot_accumulate(h, dy_t, (0, 0)),
            )

        zeros = [jnp.zeros(w.shape, acc_dtype) for w in (w_gate_e, w_up_e, w_down_e)]
        dx, *dws = loop_row_tiles(row_tiles, start, end, run_tile, (dx, *zeros))
        return dx, tuple(dw.astype(dtype) for dw in dws)

    return jax.lax.scan(run_expert, jnp.empty_like(x), (starts, ends, w_gate, w_up, w_down))


@jax.custom_vjp
def _experts_cpu(x: Array, w_gate: Array, w_up: Array, w_down: Array, group_sizes: Array) -> Array:
    return _experts_cpu_fwd(x, w_gate, w_up, w_down, group_sizes)[0]


def _experts_cpu_fwd(
    x: Array, w_gate: Array, w_up: Array, w_down: Array, group_sizes: Array
) -> tuple[Array, _Residuals]:
    row_tiles = _choose_row_tiles(N := x.shape[0])
    x = pad_for_last_tile(x, row_tiles)
    y, gate, up = _loop_experts(row_tiles, x, w_gate, w_up, w_down, group_sizes)
    residuals = _Residuals(x, gate, up, w_gate, w_up, w_down, group_sizes)
    return zero_unassigned_rows(y[:N], group_sizes), residuals


def _experts_cpu_bwd(residuals: _Residuals, dy: Array) -> tuple:
    row_tiles = _choose_row_tiles(N := dy.shape[0])
    dx, dws = _loop_experts_bwd(row_tiles, residuals, pad_for_last_tile(dy, row_tiles))
    group_sizes = residuals.group_sizes
    return zero_unassigned_rows(dx[:N], group_sizes), *dws, float0_zeros(group_sizes)


_experts_cpu.defvjp(_experts_cpu_fwd, _experts_cpu_bwd)


@jax.custom_vjp
def _gather_rows(x: Array, index: Array, inverse: Array) -> Array:
    """Return x[index], with a gradient that is a gather and a sum: deterministic, and faster than XLA's scatter.

    Args:
        x: rows.
        index: rows to take; each row of x occurs k times.
        inverse: [rows of x, k], the rows of the result that each row of x goes to.
    """
    return x[index]


def _gather_rows_fwd(x: Array, index: Array, inverse: Array) -> tuple[Array, tuple]:
    return x[index], (index, inverse)


def _gather_rows_bwd(residuals: tuple, dy: Array) -> tuple:
    index, inverse = residuals
    dx: Any = sum(dy[inverse[:, j]].astype(accumulation_dtype(dy.dtype)) for j in range(inverse.shape[1]))
    return dx.astype(dy.dtype), float0_zeros(index), float0_zeros(inverse)


_gather_rows.defvjp(_gather_rows_fwd, _gather_rows_bwd)

MAX_SINGLE_ROWS = 8  # N * k up to which each routed row is multiplied on its own
MATVEC_BLOCK = 1 << 15  # elements of the weights copied at a time: the copy stays in cache


def _matvec(x: Array, ws: tuple[Array, ...], e: Array) -> tuple[Array, ...]:
    """Multiply x [M] by w[e] for each w [E, M, F], block by block: only the weights of expert e are read."""
    M, F = ws[0].shape[1:]
    block_m = max(1, MATVEC_BLOCK // F)
    while M % block_m:
        block_m -= 1

    def add_block(i: Array, ys: tuple[Array, ...]) -> tuple[Array, ...]:
        x_i = jax.lax.dynamic_slice(x, (i * block_m,), (block_m,))[None]
        blocks = (jax.lax.dynamic_slice(w, (e, i * block_m, 0), (1, block_m, F))[0] for w in ws)
        return tuple(y + dot_accumulate(x_i, w_i, (1, 0)) for y, w_i in zip(ys, blocks, strict=True))

    zeros = tuple(jnp.zeros((1, F), accumulation_dtype(x.dtype)) for _ in ws)
    ys = jax.lax.fori_loop(0, M // block_m, add_block, zeros)
    return tuple(y[0] for y in ys)


@jax.custom_vjp
def _moe_single_rows_cpu(
    x: Array, w_gate: Array, w_up: Array, w_down: Array, expert_ids: Array, expert_weights: Array
) -> Array:
    """Run the experts of a few rows, one row at a time: decoding is bound by reading the weights of their experts."""
    N, k = expert_ids.shape
    acc_dtype = accumulation_dtype(x.dtype)

    def add_row(r: Array, y: Array) -> Array:
        n, e = r // k, expert_ids.reshape(-1)[r]
        gate, up = _matvec(x[n], (w_gate, w_up), e)
        (y_r,) = _matvec((jax.nn.silu(gate) * up).astype(x.dtype), (w_down,), e)
        return y.at[n].add(expert_weights.reshape(-1)[r].astype(acc_dtype) * y_r.astype(x.dtype).astype(acc_dtype))

    return jax.lax.fori_loop(0, N * k, add_row, jnp.zeros(x.shape, acc_dtype)).astype(x.dtype)


def _moe_single_rows_cpu_fwd(*args: Array) -> tuple[Array, tuple]:
    return _moe_single_rows_cpu(*args), args


def _moe_single_rows_cpu_bwd(residuals: tuple, dy: Array) -> tuple:
    x, w_gate, w_up, w_down, expert_ids, expert_weights = residuals

    def sorted_moe(x: Array, w_gate: Array, w_up: Array, w_down: Array, expert_weights: Array) -> Array:
        return _moe_sorted(x, w_gate, w_up, w_down, expert_ids, expert_weights)

    _, pull_back = jax.vjp(sorted_moe, x, w_gate, w_up, w_down, expert_weights)
    *grads, dexpert_weights = pull_back(dy)
    return *grads, float0_zeros(expert_ids), dexpert_weights


_moe_single_rows_cpu.defvjp(_moe_single_rows_cpu_fwd, _moe_single_rows_cpu_bwd)


def moe_mlp(x: Array, w_gate: Array, w_up: Array, w_down: Array, expert_ids: Array, expert_weights: Array) -> Array:
    """See `dantinox.kernels.moe_mlp`, which checks the arguments."""
    args = (x, w_gate, w_up, w_down, expert_ids, expert_weights)
    if expert_ids.size <= MAX_SINGLE_ROWS:
        return call_for_platform(*args, cpu=_moe_single_rows_cpu, default=_moe_sorted)
    return _moe_sorted(*args)


def _moe_sorted(x: Array, w_gate: Array, w_up: Array, w_down: Array, expert_ids: Array, expert_weights: Array) -> Array:
    """Sort the N * k routed rows by expert, run the experts, unsort their outputs and sum them by token."""
    N, k = expert_ids.shape
    permutation, inverse_permutation, group_sizes = sort_by_expert(expert_ids, w_gate.shape[0])
    rows = _gather_rows(x, permutation // k, inverse_permutation.reshape(N, k))
    y = call_for_platform(rows, w_gate, w_up, w_down, group_sizes, cpu=_experts_cpu, default=ragged_dot_experts)
    y = _gather_rows(y, inverse_permutation, permutation[:, None]).reshape(N, k, -1)
    acc_dtype = accumulation_dtype(x.dtype)
    return jnp.sum(y.astype(acc_dtype) * expert_weights.astype(acc_dtype)[..., None], axis=1).astype(x.dtype)
