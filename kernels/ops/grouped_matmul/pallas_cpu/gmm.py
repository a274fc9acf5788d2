"""The grouped products of `pallas_tpu/gmm.py` and `pallas_tpu/tgmm.py` in a form that a CPU interprets fast.

Math      y = x w_e, or x w_e^T; dw_e = sum of x_n^T dy_n
Tiling    grid (non-empty groups); a step processes its group's rows in tiles of a few sizes, large ones first.

              rows      ├──────── group 0 ────────┼─ 1 ─┼──── group 2 ────┤ unassigned
              step 0    [  large  ][  large  ][ s ]░        ░ rows past the end are multiplied, but not written
              step 1                            [ s ][s]░
              step 2                                    [  large  ][ s ][s]
              and the first step writes zeros                                     [  large  ]

          Large tiles have rows of one group only. XLA packs the weights again for every tile: one more tile costs as
          much as `EXTRA_TILE_COST_ROWS` rows. So the rest of a group is one partial tile where small tiles would cost
          more.
State     y: none. dw: the float32 sum of one group, which stays in cache.
Traffic   reads x and the weights once, writes y and each dw once; 2 N K J FLOPs, plus those of rows past the end.
Limits    float32, bfloat16, float16; any N, K, J, E. XLA updates an array in place on one thread: 16 MB take 5 of
          the 25 core-ms in which two cores multiply 4096 x 256 by 256 x 1024.
Source    that of the TPU kernels.

Inputs are scalar-prefetch operands, since the interpreter would copy blocks in every step.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dantinox.kernels.cost import Cost
from dantinox.kernels.ops.grouped_matmul.common import dot_f32, mask_to_zero
from dantinox.kernels.ops.grouped_matmul.group_metadata import broadcast_row_mask
from dantinox.kernels.tuning import tunable
from dantinox.kernels.vma import call_invariant, varying_shape

Array = jax.Array
Ref = Any

MAX_TILE_ROWS, MIN_TILE_ROWS = 512, 16
# Measured with float32 weights of 256 x 1024: 8 to 24 rows are as good, 48 is not.
EXTRA_TILE_COST_ROWS = 16


@tunable
def tile_sizes(N: int, E: int) -> tuple[int, ...]:
    """Return the rows per tile, decreasing: the largest size, about as many as a group has, a quarter of that."""
    group = min(MAX_TILE_ROWS, max(MIN_TILE_ROWS, 1 << max(0, round(N / E).bit_length() - 1)))
    return limit_tile_sizes((MAX_TILE_ROWS, group, max(MIN_TILE_ROWS, group // 4)), N, E)


def limit_tile_sizes(sizes: Sequence[int], N: int, E: int) -> tuple[int, ...]:
    """Return the tile sizes that suit N rows in E groups.

    No tile has all N rows if there are several groups: its rows would not depend on the group, and XLA hoists
    loop-invariant work out of a loop, even out of one with no iterations.
    """
    most = N if E == 1 else (N + 1) // 2
    return tuple(sorted({min(most, size) for size in sizes}, reverse=True))


def interpreted_gmm(x: Array, w: Array, group_sizes: Array, *, transposed: bool = False, name: str) -> Array:
    """Multiply each row by the weights of its group: [N, J], zeros in unassigned rows.

    Args:
        x: [N, K], sorted by group.
        w: [E, K, J]; [E, J, K] if `transposed`.
        group_sizes: [E] int32.
        transposed: see `w`.
        name: name of the kernel.
    """
    (N, K), E, J = x.shape, w.shape[0], w.shape[1 if transposed else 2]
    sizes = tile_sizes(N, E)

    def gmm_kernel(groups_ref: Ref, offsets_ref: Ref, x_ref: Ref, w_ref: Ref, y_ref: Ref) -> None:
        e = groups_ref[pl.program_id(0)]
        w_e = w_ref[e]

        def multiply(rows: Any, row_mask: Array | None, _: None) -> None:
            store_rows(y_ref, rows, row_mask, dot_f32(x_ref[rows], w_e, (1, 1 if transposed else 0)))

        def write_zeros(rows: Any, row_mask: Array | None, _: None) -> None:
            store_rows(y_ref, rows, row_mask, jnp.zeros((rows.size, J)))

        for_each_row_tile(N, offsets_ref[e], offsets_ref[e + 1], sizes, multiply)
        is_first = pl.program_id(0) == 0
        for_each_row_tile(N, offsets_ref[E], jnp.where(is_first, N, offsets_ref[E]), sizes[:1], write_zeros)

    groups, num_groups = compact_nonempty_groups(group_sizes)
    y = jax.ShapeDtypeStruct((N, J), x.dtype)
    operands = [groups, group_offsets(group_sizes), x, w]
    return call_interpreted(gmm_kernel, operands, [y], num_groups, 2 * N * K * J, name)[0]


def interpreted_tgmm(x: Array, dy: Array, group_sizes: Array, *, name: str) -> Array:
    """Sum x_n^T dy_n over the rows n of each group: [E, M, F], zeros for an empty group.

    Args:
        x: [N, M], sorted by group.
        dy: [N, F], sorted by group.
        group_sizes: [E] int32.
        name: name of the kernel.
    """
    (N, M), F, E, dtype = x.shape, dy.shape[1], group_sizes.shape[0], x.dtype
    sizes = tile_sizes(N, E)

    def tgmm_kernel(offsets_ref: Ref, x_ref: Ref, dy_ref: Ref, dw_ref: Ref) -> None:
        e = pl.program_id(0)

        def add(rows: Any, row_mask: Array | None, dw: Array) -> Array:
            x, dy = load_rows_masked(x_ref, rows, row_mask), load_rows_masked(dy_ref, rows, row_mask)
            return dw + dot_f32(x, dy, (0, 0))

        start, end = offsets_ref[e], offsets_ref[e + 1]
        dw_ref[e] = for_each_row_tile(N, start, end, sizes, add, jnp.zeros((M, F), jnp.float32)).astype(dtype)

    dw = jax.ShapeDtypeStruct((E, M, F), dtype)
    return call_interpreted(tgmm_kernel, [group_offsets(group_sizes), x, dy], [dw], E, 2 * N * M * F, name)[0]


def for_each_row_tile(
    N: int,
    start: Array,
    end: Array,
    sizes: Sequence[int],
    body: Callable[..., Any],
    carry: Any = None,
    *,
    full_large_tiles: bool = True,
) -> Any:
    """Run carry = body(rows, row_mask, carry) over tiles that cover start <= n < end of N rows.

    Args:
        N: number of rows.
        start: first row to cover.
        end: the row after the last one to cover.
        sizes: rows per tile, decreasing, none above N.
        body: takes a slice of rows and a mask of the rows to cover, or None for all of them.
        carry: initial value of the carry.
        full_large_tiles: whether all tiles of the largest size are full and need no mask; otherwise the last of them
            may reach past the end.

    Returns:
        The last carry.
    """
    row = start
    for i, size in enumerate(sizes):
        is_last_size, num_remaining = size == sizes[-1], end - row
        is_full = full_large_tiles and i == 0 and not is_last_size
        leftover = 0 if is_last_size else size if is_full else _max_leftover(size, sizes[i + 1])
        trips = num_remaining // size + (num_remaining % size > leftover).astype(jnp.int32)

        def run_tile(i: Array, carry: Any, size: int = size, row: Array = row, is_full: bool = is_full) -> Any:
            first_row = row + i * size
            tile_start = jnp.minimum(first_row, N - size)  # a tile that would reach past N starts earlier
            n = tile_start + jnp.arange(size)
            return body(pl.ds(tile_start, size), None if is_full else (first_row <= n) & (n < end), carry)

        carry = jax.lax.fori_loop(0, trips, run_tile, carry)
        row = jnp.minimum(row + trips * size, end)
    return carry


def _max_leftover(size: int, smaller: int) -> int:
    """Return the largest remainder that is cheaper in smaller tiles than in one partial tile."""
    return min(size - 1, (size + EXTRA_TILE_COST_ROWS - 1) // (smaller + EXTRA_TILE_COST_ROWS) * smaller)


def store_rows(ref: Ref, rows: Any, row_mask: Array | None, value: Array) -> None:
    """Write the rows of the mask; None: all rows."""
    value = value.astype(ref.dtype)
    ref[rows] = value if row_mask is None else jnp.where(broadcast_row_mask(row_mask, value), value, ref[rows])


def load_rows_masked(ref: Ref, rows: Any, row_mask: Array | None) -> Array:
    """Return the rows with zeros outside the mask, even for NaN: other groups' rows must not enter a sum."""
    value = ref[rows]
    return value if row_mask is None else mask_to_zero(value, broadcast_row_mask(row_mask, value))


def compact_nonempty_groups(group_sizes: Array) -> tuple[Array, Array]:
    """Return the groups that have rows and their number, at least 1; empty groups get no grid step."""
    nonempty = group_sizes > 0
    (groups,) = jnp.nonzero(nonempty, size=group_sizes.shape[0], fill_value=0)
    return groups.astype(jnp.int32), jnp.maximum(jnp.sum(nonempty, dtype=jnp.int32), 1)


def group_offsets(group_sizes: Array) -> Array:
    """Return the first row of each group and the first unassigned row, [E + 1]."""
    return jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(group_sizes.astype(jnp.int32))])


def call_interpreted(
    kernel: Callable[..., None],
    operands: Sequence[Array],
    out_shapes: Sequence[jax.ShapeDtypeStruct],
    num_steps: int | Array,
    flops: int,
    name: str,
) -> list[Array]:
    """Return the arrays that `num_steps` steps of the kernel write."""
    moved = sum(x.size * x.dtype.itemsize for x in (*operands, *out_shapes))

    def whole_array(shape: tuple[int, ...]) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda *_: (0,) * len(shape))

    # JAX's own batching rule loses the number of steps if operands are batched and that number is not.
    @jax.custom_batching.sequential_vmap
    def call_kernel(num_steps: Array, *operands: Array) -> list[Array]:
        return pl.pallas_call(
            kernel,
            out_shape=[varying_shape(out.shape, out.dtype, *operands) for out in out_shapes],
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(operands),
                grid=(num_steps,),
                in_specs=[],
                out_specs=[whole_array(out.shape) for out in out_shapes],
            ),
            cost_estimate=Cost(flops, moved).to_pallas(),
            interpret=True,
            name=name,
        )(*operands)

    return call_invariant(call_kernel, jnp.int32(num_steps), *operands)
