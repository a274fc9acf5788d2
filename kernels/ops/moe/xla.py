"""The mixture of experts in plain XLA.

On a CPU it loops over the rows of an expert in tiles, as `grouped_matmul/xla.py` does, and one pass computes all of an
expert's products, so that a tile's hidden rows are used while they are in cache; with biases or another activation it
runs the products one after the other. A few rows are multiplied one by one. Other devices use `lax.ragged_dot`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dantinox.kernels.einsum import accumulation_dtype
from dantinox.kernels.ops.grouped_matmul.group_metadata import zero_unassigned_rows
from dantinox.kernels.ops.grouped_matmul.xla import (
    RowTiles,
    call_for_platform,
    dot_accumulate,
    group_bounds,
    loop_gmm,
    loop_row_tiles,
    pad_for_last_tile,
    slice_rows,
    update_rows,
)
from dantinox.kernels.ops.moe.biases import ExpertBiases
from dantinox.kernels.ops.moe.ragged_dot import ragged_dot_experts
from dantinox.kernels.ops.moe.routing import combine_rows, permute_rows, sort_by_expert
from dantinox.kernels.ops.moe.swiglu import Activation, clamped_swiglu
from dantinox.kernels.ops.moe.wide import widen_float16
from dantinox.kernels.vma import match_vma

Array = jax.Array
EXPERTS_ROW_TILES: RowTiles = ((512, 384), (128, 96), (16, 0))


def _choose_row_tiles(N: int) -> RowTiles:
    if not isinstance(N, int):  # the size of an exported program's argument may be a symbol
        return EXPERTS_ROW_TILES
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
    outs = tuple(match_vma(jnp.empty((x.shape[0], width), x.dtype), x, group_sizes) for width in (M, F, F))
    return jax.lax.fori_loop(0, E, run_expert, outs)


class _Padded(NamedTuple):
    """What the backward pass needs, padded for the tiles; recomputing gate and up would cost 2 matmuls of 9."""

    x: Array
    gate: Array
    up: Array


def _loop_experts_bwd(
    row_tiles: RowTiles, padded: _Padded, w_gate: Array, w_up: Array, w_down: Array, group_sizes: Array, dy: Array
) -> tuple[Array, tuple[Array, ...]]:
    """Return dx and (dw_gate, dw_up, dw_down); dy and dx are padded."""
    x, gate, up = padded
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

        zeros = [match_vma(jnp.zeros(w.shape, acc_dtype), x) for w in (w_gate_e, w_up_e, w_down_e)]
        dx, *dws = loop_row_tiles(row_tiles, start, end, run_tile, (dx, *zeros))
        return dx, tuple(dw.astype(dtype) for dw in dws)

    return jax.lax.scan(run_expert, match_vma(jnp.empty_like(x), x), (starts, ends, w_gate, w_up, w_down))


@jax.custom_vjp
def _experts_cpu(x: Array, w_gate: Array, w_up: Array, w_down: Array, group_sizes: Array) -> tuple[Array, _Padded]:
    """Return y and what the backward pass needs."""
    row_tiles = _choose_row_tiles(N := x.shape[0])
    padded_x = pad_for_last_tile(x, row_tiles)
    y, gate, up = _loop_experts(row_tiles, padded_x, w_gate, w_up, w_down, group_sizes)
    return zero_unassigned_rows(y[:N], group_sizes), _Padded(padded_x, gate, up)


def _experts_cpu_fwd(*args: Array) -> tuple[tuple[Array, _Padded], tuple]:
    y, padded = _experts_cpu(*args)
    return (y, padded), (padded, *args)


def _experts_cpu_bwd(residuals: tuple, cotangents: tuple) -> tuple:
    dy, _ = cotangents  # the gradients take no derivative by what is kept for them
    return *_experts_grads_cpu(*residuals, dy), None


_experts_cpu.defvjp(_experts_cpu_fwd, _experts_cpu_bwd)


@jax.custom_vjp
def _experts_grads_cpu(
    padded: _Padded, x: Array, w_gate: Array, w_up: Array, w_down: Array, group_sizes: Array, dy: Array
) -> tuple[Array, ...]:
    """Return (dx, dw_gate, dw_up, dw_down), differentiable by recomputing in separate products."""
    row_tiles = _choose_row_tiles(N := dy.shape[0])
    dy = pad_for_last_tile(dy, row_tiles)
    dx, dws = _loop_experts_bwd(row_tiles, padded, w_gate, w_up, w_down, group_sizes, dy)
    return zero_unassigned_rows(dx[:N], group_sizes), *dws


def _experts_grads_cpu_fwd(*args: Any) -> tuple[tuple[Array, ...], tuple]:
    return _experts_grads_cpu(*args), args


def _experts_grads_cpu_bwd(args: tuple, cotangents: tuple) -> tuple:
    padded, *floats, group_sizes, dy = args

    def run(x: Array, w_gate: Array, w_up: Array, w_down: Array) -> Array:
        return ragged_dot_experts(x, w_gate, w_up, w_down, group_sizes, gmm=loop_gmm)

    def grads(*args: Array) -> tuple[Array, ...]:
        *floats, dy = args
        return jax.vjp(run, *floats)[1](dy)

    *dfloats, ddy = jax.vjp(grads, *floats, dy)[1](cotangents)
    return jax.tree.map(jnp.zeros_like, padded), *dfloats, None, ddy


_experts_grads_cpu.defvjp(_experts_grads_cpu_fwd, _experts_grads_cpu_bwd)


def _run_experts_cpu(*args: Array) -> Array:
    return _experts_cpu(*args)[0]


MAX_SINGLE_ROWS = 8  # N * k up to which each routed row is multiplied on its own
MATVEC_BLOCK = 1 << 15  # elements of the weights copied at a time: the copy stays in cache


def _matvec(x: Array, ws: tuple[Array, ...], e: Array) -> tuple[Array, ...]:
    """Multiply x [M] by w[e] for each w [E, M, F], block by block: only the weights of expert e are read."""
    M, F = ws[0].shape[1:]
    block_m = max(1, MATVEC_BLOCK // F)
    while M % block_m:
        block_m -= 1

    def add_block(i: Array, ys: tuple[Array, ...]) -> tuple[Array, ...]:
        row = jnp.int32(i * block_m)
        x_i = jax.lax.dynamic_slice(x, (row,), (block_m,))[None]
        blocks = (jax.lax.dynamic_slice(w, (e, row, jnp.int32(0)), (1, block_m, F))[0].astype(x.dtype) for w in ws)
        return tuple(y + dot_accumulate(x_i, w_i, (1, 0)) for y, w_i in zip(ys, blocks, strict=True))

    zeros = tuple(match_vma(jnp.zeros((1, F), accumulation_dtype(x.dtype)), x, e) for _ in ws)
    ys = jax.lax.fori_loop(0, M // block_m, add_block, zeros)
    return tuple(y[0] for y in ys)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _moe_single_rows_cpu(
    x: Array,
    w_gate: Array,
    w_up: Array,
    w_down: Array,
    expert_ids: Array,
    expert_weights: Array,
    biases: ExpertBiases,
    activation: Activation,
) -> Array:
    """Run the experts of a few rows, one row at a time: decoding is bound by reading the weights of their experts."""
    (N, k), E = expert_ids.shape, w_gate.shape[0]
    acc_dtype = accumulation_dtype(x.dtype)
    dtype = acc_dtype if x.dtype == jnp.float16 else x.dtype  # see `wide.py`; here no whole matrix is converted

    def add_bias_of(e: Array, value: Array, b: Array | None) -> Array:
        return value if b is None else value + b[e].astype(acc_dtype)

    def add_row(r: Array, y: Array) -> Array:
        n, e = r // k, expert_ids.reshape(-1)[r]
        gate, up = _matvec(x[n], (w_gate, w_up), e)
        gate, up = add_bias_of(e, gate, biases.b_gate), add_bias_of(e, up, biases.b_up)
        h = jax.nn.silu(gate) * up if activation == "swiglu" else clamped_swiglu(gate, up, *activation[1:])
        (y_r,) = _matvec(h.astype(dtype), (w_down,), e)
        y_r = add_bias_of(e, y_r, biases.b_down)
        weighted = expert_weights.reshape(-1)[r].astype(acc_dtype) * y_r.astype(dtype).astype(acc_dtype)
        return y.at[n].add(jnp.where(e < E, weighted, 0))

    y = match_vma(jnp.zeros(x.shape, acc_dtype), x, expert_ids)
    return jax.lax.fori_loop(0, N * k, add_row, y).astype(x.dtype)


def _moe_single_rows_cpu_fwd(*args: Any) -> tuple[Array, tuple]:
    return _moe_single_rows_cpu(*args), args[:-1]


def _moe_single_rows_cpu_bwd(activation: Activation, residuals: tuple, dy: Array) -> tuple:
    x, w_gate, w_up, w_down, expert_ids, expert_weights, biases = residuals

    def sorted_moe(
        x: Array, w_gate: Array, w_up: Array, w_down: Array, expert_weights: Array, biases: ExpertBiases
    ) -> Array:
        options = {**biases._asdict(), "activation": activation}
        return _moe_sorted(x, w_gate, w_up, w_down, expert_ids, expert_weights, **options)

    _, pull_back = jax.vjp(sorted_moe, x, w_gate, w_up, w_down, expert_weights, biases)
    *grads, dexpert_weights, dbiases = pull_back(dy)
    return *grads, None, dexpert_weights, dbiases


_moe_single_rows_cpu.defvjp(_moe_single_rows_cpu_fwd, _moe_single_rows_cpu_bwd)


def moe_mlp(
    x: Array,
    w_gate: Array,
    w_up: Array,
    w_down: Array,
    expert_ids: Array,
    expert_weights: Array,
    **options: Any,
) -> Array:
    """See `dantinox.kernels.moe_mlp`, which checks the arguments; `options` has those of the biases and activation."""
    args = (x, w_gate, w_up, w_down, expert_ids, expert_weights)
    size = expert_ids.size
    if not (isinstance(size, int) and size <= MAX_SINGLE_ROWS):
        return _moe_sorted(*args, **options)
    activation = options.get("activation", "swiglu")
    biases = ExpertBiases(*(options.get(name) for name in ExpertBiases._fields))

    def single_rows(*args: Any) -> Array:
        return _moe_single_rows_cpu(*args, activation)

    def sorted_rows(*args: Any) -> Array:
        return _moe_sorted(*args[:-1], **args[-1]._asdict(), activation=activation)

    return call_for_platform(*args, biases, cpu=single_rows, default=sorted_rows)


@widen_float16
def _moe_sorted(
    x: Array,
    w_gate: Array,
    w_up: Array,
    w_down: Array,
    expert_ids: Array,
    expert_weights: Array,
    *,
    b_gate: Array | None = None,
    b_up: Array | None = None,
    b_down: Array | None = None,
    activation: Activation = "swiglu",
) -> Array:
    """Sort the N * k routed rows by expert, run the experts, unsort their outputs and sum them by token."""
    routing = sort_by_expert(expert_ids, w_gate.shape[0])
    args = (permute_rows(x, routing), w_gate, w_up, w_down, routing.group_sizes)
    biases = ExpertBiases(b_gate, b_up, b_down)
    if activation == "swiglu" and all(b is None for b in biases):
        y = call_for_platform(*args, cpu=_run_experts_cpu, default=ragged_dot_experts)
    else:
        run = functools.partial(ragged_dot_experts, activation=activation)
        y = call_for_platform(*args, biases, cpu=functools.partial(run, gmm=loop_gmm), default=run)
    return combine_rows(y, expert_weights, routing)
