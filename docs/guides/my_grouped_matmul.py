"""Grouped matmul with its backward pass: Pallas kernels for TPUs, interpreted on a CPU.

Rows are sorted by group, so the starts of the tiles of 128 rows and the starts of the groups cut them into intervals,
each of one tile and one group. The last axis of both grids goes over these intervals. A tile that groups share is
multiplied once per group, and each time only the rows of the interval are written.
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


def grouped_matmul(x, w, group_sizes):
    """See `dantinox.kernels.grouped_matmul`, which has checked the arguments."""
    if current_device().platform == "gpu" or x.dtype == jnp.float64:
        raise NotImplementedError("my grouped matmul runs on TPU and CPU, and not in float64")
    if x.dtype == jnp.float16:  # a TPU does not multiply it
        return product(x.astype(jnp.float32), w.astype(jnp.float32), group_sizes).astype(x.dtype)
    return product(x, w, group_sizes)


class Intervals(NamedTuple):
    """Tables in scalar memory: of each interval the first row, the end and the group, E past the last group."""

    start: Array
    end: Array
    group: Array


def cut(group_sizes: Array, N: int) -> Intervals:
    """Cut N rows at the start of every tile and at the end of every group. An interval may have no rows."""
    ends = jnp.cumsum(group_sizes).astype(jnp.int32)
    tiles = jnp.arange(0, N, ROWS, dtype=jnp.int32)
    start = jnp.sort(jnp.concatenate([tiles, ends]))
    end = jnp.append(start[1:], N).astype(jnp.int32)
    group = jnp.sum(ends <= start[:, None], axis=1, dtype=jnp.int32)
    return Intervals(start, end, group)


def tile_of(t: Any, table: Intervals, N: int) -> Any:
    """Tile of rows of an interval; intervals without rows may start at the end of the array."""
    return jnp.minimum(table.start[t], N - 1) // ROWS


def own_rows(t: Any, table: Intervals, N: int) -> Array:
    """Which rows of the tile are in the interval [ROWS, 1]."""
    row = tile_of(t, table, N) * ROWS + jax.lax.broadcasted_iota(jnp.int32, (ROWS, 1), 0)
    return (table.start[t] <= row) & (row < table.end[t])


def dot(a: Array, b: Array, contract: int) -> Array:
    """Multiply two tiles in their own dtype, over axis `contract` of a and axis 0 of b; accumulate in float32."""
    dims = (((contract,), (0,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=matmul_precision(a, b), preferred_element_type=jnp.float32)


def call(kernel, table, inputs, **options):
    """Call a kernel with the intervals in scalar memory."""
    out = options.pop("out_shape")
    run = pl.pallas_call(
        kernel,
        out_shape=out,
        grid_spec=pltpu.PrefetchScalarGridSpec(num_scalar_prefetch=len(table), **options),
        interpret=current_device().platform == "cpu",
        name="my_grouped_matmul",
    )
    return call_invariant(run, *table, *inputs)  # also under `shard_map`


def rows_kernel(start, end, group, x_ref, w_ref, y_ref, *, N, E):
    """The product of the rows of one interval with the matrix of its group, in one tile of columns."""
    t = pl.program_id(1)
    mine = own_rows(t, Intervals(start, end, group), N)

    @pl.when(group[t] < E)
    def multiply():
        y_ref[...] = jnp.where(mine, dot(x_ref[...], w_ref[...], 1).astype(y_ref.dtype), y_ref[...])

    @pl.when(group[t] == E)
    def rows_past_the_sum():
        y_ref[...] = jnp.where(mine, 0, y_ref[...])


def multiply_rows(x: Array, w: Array, group_sizes: Array) -> Array:
    """y[n] = x[n] w[group of n], and zero past the last group."""
    (N, M), (E, _, F) = x.shape, w.shape
    columns = min(F, COLUMNS)
    tile = lambda t, table: tile_of(t, Intervals(*table), N)
    return call(
        functools.partial(rows_kernel, N=N, E=E),
        table := cut(group_sizes, N),
        (x, w),
        out_shape=varying_shape((N, F), x.dtype),
        grid=(pl.cdiv(F, columns), table.start.size),
        in_specs=[
            pl.BlockSpec((ROWS, M), lambda f, t, *table: (tile(t, table), 0)),
            pl.BlockSpec((None, M, columns), lambda f, t, *table: (jnp.minimum(table[2][t], E - 1), 0, f)),
        ],
        out_specs=pl.BlockSpec((ROWS, columns), lambda f, t, *table: (tile(t, table), f)),
    )


def weights_kernel(start, end, group, x_ref, dy_ref, dw_ref, acc_ref, *, N, E):
    """Sum dw = x^T dy over the intervals of a group."""
    t = pl.program_id(2)
    mine = own_rows(t, Intervals(start, end, group), N)

    @pl.when((t == 0) | (group[t] != group[jnp.maximum(t - 1, 0)]))
    def init():
        acc_ref[...] = jnp.zeros_like(acc_ref)

    @pl.when(group[t] < E)
    def add():
        x, dy = (jnp.where(mine, ref[...], 0) for ref in (x_ref, dy_ref))  # the other rows may hold NaN
        acc_ref[...] += dot(x, dy, 0)
        dw_ref[...] = acc_ref[...].astype(dw_ref.dtype)


def multiply_columns(x: Array, dy: Array, group_sizes: Array) -> Array:
    """dw[e] = x^T dy over the rows of group e."""
    (N, M), F, E = x.shape, dy.shape[1], group_sizes.size
    m_tile, f_tile = min(M, COLUMNS), min(F, COLUMNS)
    tile = lambda t, table: tile_of(t, Intervals(*table), N)
    dw = call(
        functools.partial(weights_kernel, N=N, E=E),
        table := cut(group_sizes, N),
        (x, dy),
        out_shape=varying_shape((E, M, F), x.dtype),
        grid=(pl.cdiv(M, m_tile), pl.cdiv(F, f_tile), table.start.size),
        in_specs=[
            pl.BlockSpec((ROWS, m_tile), lambda m, f, t, *table: (tile(t, table), m)),
            pl.BlockSpec((ROWS, f_tile), lambda m, f, t, *table: (tile(t, table), f)),
        ],
        out_specs=pl.BlockSpec((None, m_tile, f_tile), lambda m, f, t, *table: (jnp.minimum(table[2][t], E - 1), m, f)),
        scratch_shapes=[pltpu.VMEM((m_tile, f_tile), jnp.float32)],
    )
    return jnp.where(group_sizes[:, None, None] > 0, dw, 0)  # no program writes the matrix of an empty group


@jax.custom_vjp
def product(x, w, group_sizes):
    """Grouped matmul with a derivative."""
    return multiply_rows(x, w, group_sizes)


def product_forward(x, w, group_sizes):
    """The backward pass needs the inputs only."""
    return multiply_rows(x, w, group_sizes), (x, w, group_sizes)


def product_backward(inputs, dy):
    """The gradient of x is a grouped matmul with the transposed matrices."""
    x, w, group_sizes = inputs
    return multiply_rows(dy, w.swapaxes(1, 2), group_sizes), multiply_columns(x, dy, group_sizes), None


product.defvjp(product_forward, product_backward)
