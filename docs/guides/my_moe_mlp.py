"""A mixture of experts with its backward pass: Pallas kernels for TPUs, interpreted on a CPU.

Choices are sorted by expert, so each expert has consecutive rows. The starts of the tiles of 128 rows and the starts of
the experts cut the rows into intervals, each of one tile and one expert, which the last axis of both grids goes over.
One kernel multiplies rows, with one matrix or with two and SwiGLU; the other sums the gradient of the matrices.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dantinox.kernels.dispatch import current_device
from dantinox.kernels.precision import matmul_precision
from dantinox.kernels.vma import call_invariant, varying_shape

Array = jax.Array
ROWS, COLUMNS = 128, 512  # sizes of a tile


def moe_mlp(x, w_gate, w_up, w_down, expert_ids, expert_weights):
    """See `dantinox.kernels.moe_mlp`, which has checked the arguments; the id E stands for no expert."""
    if current_device().platform == "gpu" or x.dtype == jnp.float64:
        raise NotImplementedError("my mixture runs on TPU and CPU, and not in float64")
    dtype, (N, k), E = x.dtype, expert_ids.shape, w_gate.shape[0]
    if dtype == jnp.float16:  # a TPU does not multiply it
        x, w_gate, w_up, w_down = (array.astype(jnp.float32) for array in (x, w_gate, w_up, w_down))
    ids = expert_ids.reshape(-1)
    order = jnp.argsort(ids, stable=True)  # choices by expert; those of no expert are last
    sizes = jnp.sum(ids[:, None] == jnp.arange(E), axis=0, dtype=jnp.int32)
    outputs = experts(x[order // k], w_gate, w_up, w_down, sizes)
    by_token = outputs[jnp.argsort(order)].reshape(N, k, -1)
    return jnp.sum(by_token * expert_weights[:, :, None].astype(jnp.float32), axis=1).astype(dtype)


class Intervals(NamedTuple):
    """Tables in scalar memory: of each interval the first row, the end and the expert, E for none."""

    start: Array
    end: Array
    expert: Array


def cut(sizes: Array, N: int) -> Intervals:
    """Cut N rows at the start of every tile and at the end of every expert. An interval may have no rows."""
    ends = jnp.cumsum(sizes).astype(jnp.int32)
    start = jnp.sort(jnp.concatenate([jnp.arange(0, N, ROWS, dtype=jnp.int32), ends]))
    end = jnp.append(start[1:], N).astype(jnp.int32)
    return Intervals(start, end, jnp.sum(ends <= start[:, None], axis=1, dtype=jnp.int32))


def tile_of(t: Any, table: Any, N: int) -> Any:
    """Tile of rows of an interval; intervals without rows may start at the end of the array."""
    return jnp.minimum(table[0][t], N - 1) // ROWS


def own_rows(t: Any, table: Any, N: int) -> Array:
    """Which rows of the tile are in the interval [ROWS, 1]."""
    row = tile_of(t, table, N) * ROWS + jax.lax.broadcasted_iota(jnp.int32, (ROWS, 1), 0)
    return (table[0][t] <= row) & (row < table[1][t])


def dot(a: Array, b: Array, contract: int) -> Array:
    """Multiply two tiles in their own dtype, over axis `contract` of a and axis 0 of b; accumulate in float32."""
    dims = (((contract,), (0,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=matmul_precision(a, b), preferred_element_type=jnp.float32)


def call(kernel, table, inputs, out, grid, in_specs, out_spec, scratch=()):
    """Call a kernel with the intervals in scalar memory."""
    run = pl.pallas_call(
        kernel,
        out_shape=out,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3, grid=grid, in_specs=in_specs, out_specs=out_spec, scratch_shapes=scratch
        ),
        interpret=current_device().platform == "cpu",
        name="my_moe_mlp",
    )
    return call_invariant(run, *table, *inputs)  # also under `shard_map`


def rows_kernel(start, end, expert, x_ref, *refs, N, E):
    """The product of one interval's rows with the expert's matrix, or silu(x w_gate) * (x w_up) with two."""
    *w_refs, y_ref = refs
    t = pl.program_id(1)
    mine = own_rows(t, (start, end), N)

    @pl.when(expert[t] < E)
    def multiply():
        products = [dot(x_ref[...], w_ref[...], 1) for w_ref in w_refs]
        y = products[0] if len(products) == 1 else swiglu(*products)
        y_ref[...] = jnp.where(mine, y.astype(y_ref.dtype), y_ref[...])

    @pl.when(expert[t] == E)
    def no_expert():
        y_ref[...] = jnp.where(mine, 0, y_ref[...])


def swiglu(gate: Array, up: Array) -> Array:
    """silu(gate) * up."""
    return gate * jax.nn.sigmoid(gate) * up


def multiply_rows(x: Array, weights: list[Array], sizes: Array, dtype: Any) -> Array:
    """y[n] = x[n] w[expert of n], or SwiGLU of two such products; zero for rows without an expert."""
    (N, M), (E, _, F), columns = x.shape, weights[0].shape, min(weights[0].shape[2], COLUMNS)
    x_spec = pl.BlockSpec((ROWS, M), lambda f, t, *table: (tile_of(t, table, N), 0))
    w_spec = pl.BlockSpec((None, M, columns), lambda f, t, *table: (jnp.minimum(table[2][t], E - 1), 0, f))
    y_spec = pl.BlockSpec((ROWS, columns), lambda f, t, *table: (tile_of(t, table, N), f))
    table = cut(sizes, N)
    return call(
        functools.partial(rows_kernel, N=N, E=E),
        table,
        (x, *weights),
        varying_shape((N, F), dtype),
        (pl.cdiv(F, columns), table.start.size),
        [x_spec] + [w_spec] * len(weights),
        y_spec,
    )


def weights_kernel(start, end, expert, x_ref, dy_ref, dw_ref, acc_ref, *, N, E):
    """Sum dw = x^T dy over the intervals of an expert."""
    t = pl.program_id(2)
    mine = own_rows(t, (start, end), N)

    @pl.when((t == 0) | (expert[t] != expert[jnp.maximum(t - 1, 0)]))
    def init():
        acc_ref[...] = jnp.zeros_like(acc_ref)

    @pl.when(expert[t] < E)
    def add():
        x, dy = (jnp.where(mine, ref[...], 0) for ref in (x_ref, dy_ref))  # the other rows may hold NaN
        acc_ref[...] += dot(x, dy, 0)
        dw_ref[...] = acc_ref[...].astype(dw_ref.dtype)


def multiply_columns(x: Array, dy: Array, sizes: Array) -> Array:
    """dw[e] = x^T dy over the rows of expert e."""
    (N, M), F, E = x.shape, dy.shape[1], sizes.size
    m_tile, f_tile, table = min(M, COLUMNS), min(F, COLUMNS), cut(sizes, N)
    dw = call(
        functools.partial(weights_kernel, N=N, E=E),
        table,
        (x, dy),
        varying_shape((E, M, F), x.dtype),
        (pl.cdiv(M, m_tile), pl.cdiv(F, f_tile), table.start.size),
        [
            pl.BlockSpec((ROWS, m_tile), lambda m, f, t, *table: (tile_of(t, table, N), m)),
            pl.BlockSpec((ROWS, f_tile), lambda m, f, t, *table: (tile_of(t, table, N), f)),
        ],
        pl.BlockSpec((None, m_tile, f_tile), lambda m, f, t, *table: (jnp.minimum(table[2][t], E - 1), m, f)),
        [pltpu.VMEM((m_tile, f_tile), jnp.float32)],
    )
    return jnp.where(sizes[:, None, None] > 0, dw, 0)  # no program writes the matrix of an expert without rows


@jax.custom_vjp
def experts(rows, w_gate, w_up, w_down, sizes):
    """Rows sorted by expert [R, M] through their experts: [R, M] in float32."""
    hidden = multiply_rows(rows, [w_gate, w_up], sizes, rows.dtype)
    return multiply_rows(hidden, [w_down], sizes, jnp.float32)


def experts_forward(*inputs):
    """The backward pass needs the inputs only: it computes the hidden rows again."""
    return experts(*inputs), inputs


def experts_backward(inputs, dy):
    """Gradients of the rows and the matrices; the sizes have none."""
    rows, w_gate, w_up, w_down, sizes = inputs
    dtype, dy = rows.dtype, dy.astype(rows.dtype)
    gate = multiply_rows(rows, [w_gate], sizes, jnp.float32)
    up = multiply_rows(rows, [w_up], sizes, jnp.float32)
    hidden = swiglu(gate, up).astype(dtype)
    dhidden = multiply_rows(dy, [w_down.swapaxes(1, 2)], sizes, jnp.float32)
    s = jax.nn.sigmoid(gate)
    dgate = (dhidden * up * s * (1 + gate * (1 - s))).astype(dtype)  # silu' = s (1 + gate (1 - s))
    dup = (dhidden * gate * s).astype(dtype)
    drows = multiply_rows(dgate, [w_gate.swapaxes(1, 2)], sizes, jnp.float32)
    drows += multiply_rows(dup, [w_up.swapaxes(1, 2)], sizes, jnp.float32)
    dw_gate = multiply_columns(rows, dgate, sizes)
    dw_up = multiply_columns(rows, dup, sizes)
    dw_down = multiply_columns(hidden, dy, sizes)
    return drows.astype(dtype), dw_gate, dw_up, dw_down, None


experts.defvjp(experts_forward, experts_backward)
