"""The grouped products of `mosaic_tpu.py` and `mosaic_tpu_dw.py` as a CPU interprets them: group after group.

Math      as theirs: epilogue(x w_e, or x w_e^T, several of them or their sum); dw_e = sum of x_n^T dy_n
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

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.cost import Cost
from kernels.grouped_matmul.mosaic_tpu import Epilogue, dot

Array = jax.Array

LARGEST, SMALLEST = 512, 16  # rows of a tile
TURN = 48  # rows that one more tile costs, measured for float32 matrices of 256 x 1024


def sizes(N: int, E: int) -> tuple[int, ...]:
    """Rows of the tiles, falling: the largest, about as many as a group has, and a quarter of that."""
    each = min(LARGEST, max(SMALLEST, 1 << max(0, round(N / E).bit_length() - 1)))
    found = (LARGEST, each, max(SMALLEST, each // 4))
    return tuple(sorted({min(N, size) for size in found}, reverse=True))


def product(
    xs: Sequence[Array],
    ws: Sequence[Array],
    group_sizes: Array,
    *,
    transposed: bool = False,
    add: bool = False,
    epilogue: Epilogue | None = None,
    wide: Sequence[Array] = (),
    thin: Sequence[Array] = (),
    outs: Sequence[str] = ("wide",),
    name: str,
) -> list[Array]:
    """As `mosaic_tpu.product`."""
    (N, K), E, J = xs[0].shape, ws[0].shape[0], ws[0].shape[1 if transposed else 2]
    dtype = xs[0].dtype
    shapes = {"wide": jax.ShapeDtypeStruct((N, J), dtype), "thin": jax.ShapeDtypeStruct((1, N), jnp.float32)}
    tiles, counts = sizes(N, E), [len(each) for each in (xs, ws, wide, thin, outs)]

    def kernel(groups: Any, starts: Any, *refs: Any) -> None:
        rest = list(refs)
        x_refs, w_refs, wide_refs, thin_refs, out_refs = ([rest.pop(0) for _ in range(n)] for n in counts)
        e = groups[pl.program_id(0)]
        matrices = [ref[e] for ref in w_refs]

        def write(rows: Any, mine: Array | None, values: Sequence[Array]) -> None:
            for ref, kind, value in zip(out_refs, outs, values, strict=True):
                at = rows if kind == "wide" else (0, rows)
                value = (value if kind == "wide" else jnp.sum(value, axis=1)).astype(ref.dtype)
                if mine is not None:
                    value = jnp.where(mine[:, None] if kind == "wide" else mine, value, ref[at])
                ref[at] = value

        def multiply(rows: Any, mine: Array | None, _: None) -> None:
            of = lambda n: x_refs[n if len(xs) > 1 else 0][rows]
            values = [dot(of(n), w, (1, 1 if transposed else 0)) for n, w in enumerate(matrices)]
            values = [functools.reduce(jnp.add, values)] if add else values
            if epilogue is not None:
                values = epilogue(
                    *values, *(ref[rows] for ref in wide_refs), *(ref[0, rows][:, None] for ref in thin_refs)
                )
            write(rows, mine, values)

        def nothing(rows: Any, mine: Array | None, _: None) -> None:
            zeros = {"wide": jnp.zeros((rows.size, J)), "thin": jnp.zeros((rows.size, 1))}
            write(rows, mine, [zeros[kind] for kind in outs])

        walk(N, starts[e], starts[e + 1], tiles, multiply)
        first = pl.program_id(0) == 0
        walk(N, starts[E], jnp.where(first, N, starts[E]), tiles[:1], nothing)

    # A step copies its matrices: groups without rows have none. The first is there in any case, for nobody's rows.
    busy = group_sizes > 0
    (groups,) = jnp.nonzero(busy, size=E, fill_value=0)
    steps = jnp.maximum(jnp.sum(busy, dtype=jnp.int32), 1)
    operands = [groups.astype(jnp.int32), _starts(group_sizes), *xs, *ws, *wide, *thin]
    moved = sum(each.size * each.dtype.itemsize for each in (*operands, *(shapes[kind] for kind in outs)))
    return _call(kernel, operands, [shapes[kind] for kind in outs], steps, Cost(2 * N * K * J * len(ws), moved), name)


def summed(x: Array, dys: Sequence[Array], group_sizes: Array, *, name: str) -> list[Array]:
    """As `mosaic_tpu_dw.summed`."""
    (N, M), F, E, dtype = x.shape, dys[0].shape[1], group_sizes.shape[0], x.dtype
    tiles = sizes(N, E)

    def kernel(starts: Any, x_ref: Any, *refs: Any) -> None:
        e = pl.program_id(0)

        def add(rows: Any, mine: Array | None, sums: Sequence[Array]) -> list[Array]:
            # What is not the group's must not get into a sum, whatever it is.
            x, *dys_ = (
                ref[rows] if mine is None else jnp.where(mine[:, None], ref[rows], 0) for ref in (x_ref, *refs[:n])
            )
            return [value + dot(x, dy, (0, 0)) for value, dy in zip(sums, dys_, strict=True)]

        found = walk(N, starts[e], starts[e + 1], tiles, add, [jnp.zeros((M, F), jnp.float32)] * n)
        for out, value in zip(refs[n:], found, strict=True):
            out[e] = value.astype(dtype)

    n, shape = len(dys), jax.ShapeDtypeStruct((E, M, F), dtype)
    cost = Cost(2 * N * M * F * n, dtype.itemsize * (x.size + n * (N * F + E * M * F)))
    return _call(kernel, [_starts(group_sizes), x, *dys], [shape] * n, E, cost, name)


def walk(N: int, start: Array, end: Array, sizes: Sequence[int], body: Callable[..., Any], carry: Any = None) -> Any:
    """carry = body(rows, mine, carry) over tiles of N rows that cover start <= n < end.

    Args:
        sizes: rows of the tiles, falling, none above N.
        body: gets the rows and which of them are to be covered, a mask; None: all.
    """
    row = start
    for place, size in enumerate(sizes):
        last, left = size == sizes[-1], end - row
        whole = place == 0 and not last
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


def _starts(group_sizes: Array) -> Array:
    """[E + 1]: the first row of each group, and of what is nobody's."""
    return jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(group_sizes.astype(jnp.int32))])


def _call(
    kernel: Callable[..., None],
    operands: Sequence[Array],
    shapes: Sequence[jax.ShapeDtypeStruct],
    steps: Any,
    cost: Cost,
    name: str,
) -> list[Array]:
    whole = lambda shape: pl.BlockSpec(shape, lambda *_: (0,) * len(shape))
    return pl.pallas_call(
        kernel,
        out_shape=list(shapes),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(operands),
            grid=(steps,),
            in_specs=[],
            out_specs=[whole(shape.shape) for shape in shapes],
        ),
        cost_estimate=cost.estimate(),
        interpret=True,
        name=name,
    )(*operands)
