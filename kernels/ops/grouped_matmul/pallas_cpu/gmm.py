"""The grouped products of `pallas_tpu/gmm.py` and `pallas_tpu/tgmm.py` as a CPU interprets them: group after group.

Math      y = x w_e, or x w_e^T; dw_e = sum of x_n^T dy_n
Tiling    grid (groups that have rows); a step walks those in tiles of a few sizes, the large ones first.

              rows      ├──────── group 0 ────────┼─ 1 ─┼──── group 2 ────┤ nobody's
              step 0    [  large  ][  large  ][ s ]░        ░ what runs over the end is multiplied and not written
              step 1                            [ s ][s]░
              step 2                                    [  large  ][ s ][s]
              and the first step writes zeros                                     [  large  ]

          Large tiles are a group's own. XLA packs a matrix anew for every tile: one tile more costs as much as `TURN`
          rows. So what is left of a group is one tile that is not full where small ones would cost more.
State     y: none. dw: the float32 sum of one group, which stays in cache.
Traffic   reads x and each matrix once, writes y and each dw once; 2 N K J FLOPs, and those of the rows run over.
Limits    float32, bfloat16, float16; any N, K, J, E. XLA writes into an array in place on one thread: 16 MB take 5 of
          the 25 core-ms in which two cores multiply 4096 x 256 by 256 x 1024.
Source    as theirs.

Inputs come whole, as prefetched ones do: the interpreter would copy a block in every step.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dantinox.kernels.cost import Cost
from dantinox.kernels.ops.grouped_matmul.common import clear, dot
from dantinox.kernels.ops.grouped_matmul.group_metadata import broadcast_row_mask

Array = jax.Array

LARGEST, SMALLEST = 512, 16  # rows of a tile
TURN = 16  # rows that one more tile costs, measured for float32 matrices of 256 x 1024: 8 to 24 are as good, 48 is not


def sizes(N: int, E: int) -> tuple[int, ...]:
    """Rows of the tiles, falling: the largest, about as many as a group has, and a quarter of that."""
    each = min(LARGEST, max(SMALLEST, 1 << max(0, round(N / E).bit_length() - 1)))
    return fitting((LARGEST, each, max(SMALLEST, each // 4)), N, E)


def fitting(sizes: Sequence[int], N: int, E: int) -> tuple[int, ...]:
    """Tiles of N rows of E groups.

    None is as large as N where other groups have rows: it would have the same rows whatever the group, and XLA takes
    what is the same in every turn out of a loop, also out of one that does not turn at all.
    """
    most = N if E == 1 else (N + 1) // 2
    return tuple(sorted({min(most, size) for size in sizes}, reverse=True))


def product(x: Array, w: Array, group_sizes: Array, *, transposed: bool = False, name: str) -> Array:
    """y [N, J]: each row times the matrix of its group, rows of nobody zero.

    Args:
        x: [N, K], sorted by group.
        w: [E, K, J]; [E, J, K] where `transposed`.
        group_sizes: [E] int32.
    """
    (N, K), E, J = x.shape, w.shape[0], w.shape[1 if transposed else 2]
    tiles = sizes(N, E)

    def kernel(groups: Any, starts: Any, x_ref: Any, w_ref: Any, y_ref: Any) -> None:
        e = groups[pl.program_id(0)]
        matrix = w_ref[e]

        def multiply(rows: Any, mine: Array | None, _: None) -> None:
            put(y_ref, rows, mine, dot(x_ref[rows], matrix, (1, 1 if transposed else 0)))

        def nothing(rows: Any, mine: Array | None, _: None) -> None:
            put(y_ref, rows, mine, jnp.zeros((rows.size, J)))

        walk(N, starts[e], starts[e + 1], tiles, multiply)
        first = pl.program_id(0) == 0
        walk(N, starts[E], jnp.where(first, N, starts[E]), tiles[:1], nothing)

    groups, steps = busy_first(group_sizes)
    shape = jax.ShapeDtypeStruct((N, J), x.dtype)
    return call(kernel, [groups, bounds(group_sizes), x, w], [shape], steps, 2 * N * K * J, name)[0]


def summed(x: Array, dy: Array, group_sizes: Array, *, name: str) -> Array:
    """dw [E, M, F]: the sum of x_n^T dy_n over each group's rows, zero where it has none.

    Args:
        x, dy: [N, M], [N, F], sorted by group.
        group_sizes: [E] int32.
    """
    (N, M), F, E, dtype = x.shape, dy.shape[1], group_sizes.shape[0], x.dtype
    tiles = sizes(N, E)

    def kernel(starts: Any, x_ref: Any, dy_ref: Any, dw_ref: Any) -> None:
        e = pl.program_id(0)

        def add(rows: Any, mine: Array | None, dw: Array) -> Array:
            return dw + dot(own(x_ref, rows, mine), own(dy_ref, rows, mine), (0, 0))

        dw_ref[e] = walk(N, starts[e], starts[e + 1], tiles, add, jnp.zeros((M, F), jnp.float32)).astype(dtype)

    shape = jax.ShapeDtypeStruct((E, M, F), dtype)
    return call(kernel, [bounds(group_sizes), x, dy], [shape], E, 2 * N * M * F, name)[0]


def walk(
    N: int,
    start: Array,
    end: Array,
    sizes: Sequence[int],
    body: Callable[..., Any],
    carry: Any = None,
    *,
    large_full: bool = True,
) -> Any:
    """carry = body(rows, mine, carry) over tiles of N rows that cover start <= n < end.

    Args:
        sizes: rows of the tiles, falling, none above N.
        body: gets the rows and which of them are to be covered, a mask; None: all.
        large_full: large tiles are full, and without a mask; else the last of them may reach past the end.
    """
    row = start
    for place, size in enumerate(sizes):
        last, left = size == sizes[-1], end - row
        whole = large_full and place == 0 and not last
        few = 0 if last else size if whole else _few(size, sizes[place + 1])
        trips = left // size + (left % size > few)

        def step(i: Array, carry: Any, size: int = size, row: Array = row, whole: bool = whole) -> Any:
            first = row + i * size
            at = jnp.minimum(first, N - size)  # what would reach past the end lies as far back as it must
            n = at + jnp.arange(size)
            return body(pl.ds(at, size), None if whole else (first <= n) & (n < end), carry)

        carry = jax.lax.fori_loop(0, trips, step, carry)
        row = jnp.minimum(row + trips * size, end)
    return carry


def _few(size: int, smaller: int) -> int:
    """So many rows are cheaper in smaller tiles than in one that is not full."""
    return min(size - 1, (size + TURN - 1) // (smaller + TURN) * smaller)


def put(ref: Any, rows: Any, mine: Array | None, value: Array) -> None:
    """Write rows, all or those that are `mine`."""
    value = value.astype(ref.dtype)
    ref[rows] = value if mine is None else jnp.where(broadcast_row_mask(mine, value), value, ref[rows])


def own(ref: Any, rows: Any, mine: Array | None) -> Array:
    """Read rows, zero where not `mine`: what is not the group's must not get into a sum, whatever it is."""
    value = ref[rows]
    return value if mine is None else clear(value, broadcast_row_mask(mine, value))


def busy_first(group_sizes: Array) -> tuple[Array, Array]:
    """The groups that have rows, one at least, and how many: a step copies its matrices, so none is made for others."""
    busy = group_sizes > 0
    (groups,) = jnp.nonzero(busy, size=group_sizes.shape[0], fill_value=0)
    return groups.astype(jnp.int32), jnp.maximum(jnp.sum(busy, dtype=jnp.int32), 1)


def bounds(group_sizes: Array) -> Array:
    """[E + 1]: the first row of each group, and of what is nobody's."""
    return jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(group_sizes.astype(jnp.int32))])


def call(
    kernel: Callable[..., None],
    operands: Sequence[Array],
    shapes: Sequence[jax.ShapeDtypeStruct],
    steps: int | Array,
    flops: int,
    name: str,
) -> list[Array]:
    """The arrays that so many steps of the kernel write."""
    moved = sum(each.size * each.dtype.itemsize for each in (*operands, *shapes))
    whole = lambda shape: pl.BlockSpec(shape, lambda *_: (0,) * len(shape))

    # JAX's own rule forgets how many steps there are where operands differ along a batch and the steps do not.
    @jax.custom_batching.sequential_vmap
    def run(steps: Array, *operands: Array) -> list[Array]:
        return pl.pallas_call(
            kernel,
            out_shape=list(shapes),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(operands),
                grid=(steps,),
                in_specs=[],
                out_specs=[whole(shape.shape) for shape in shapes],
            ),
            cost_estimate=Cost(flops, moved).to_pallas(),
            interpret=True,
            name=name,
        )(*operands)

    return run(jnp.int32(steps), *operands)
