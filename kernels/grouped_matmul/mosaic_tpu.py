"""Grouped matmul on Mosaic TPU: every row times its own group's matrix.

Math      sums = x w_e, or x w_e^T with the matrices read as they lie; several of them, or their sum; then an epilogue
          on the sums while they are on the chip: y = epilogue(sums, what else there is of these rows)
Tiling    grid (column tiles, visits, steps of the contraction); a visit is a tile of rows for one group, see
          `groups.py`. The columns are outermost: through one pass over the rows a group's matrix stays where it is.

              columns ->    tile 0     tile 1            w_0 ╲
              rows  tile 0  ██ 0       ██ 0              w_1  ╲ one of them at a time
                    tile 1  ██ 0 ▒ 1   ██ 0 ▒ 1          w_2   ╲
                    tile 2  ▒▒ 1       ▒▒ 1         ▒ next group: the tile is visited again, the old rows stay
                    tile 3  ░░         ░░           ░ nobody's: zeros are written, nothing is multiplied

          A visit multiplies the chunks of rows that it has a row of, all of a tile or some of them in one stream of
          products: a stream takes some 260 bundles to fill the matrix unit and to empty it. A visit writes
          whole chunks: rows of later groups are written again by their own visit, rows of earlier ones are
          saved before and put back after. So the stream of products has no mask in it, and registers suffice.
State     float32 sums of one tile, where the contraction takes several steps; else none at all. Where the products of
          one step are taken part by part (`Tiles.part`, `Tiles.lead`), their sums wait in memory of their own.
Traffic   reads x once for each column tile, each busy group's matrix once; with several steps of the contraction, a
          matrix once a visit. Writes y once. 2 N K J FLOPs; intensity as of a dense matmul where groups have more than
          some 500 rows, below that the matrices bind.
Limits    float32, bfloat16, float16; any N, K, J, E. ValueError comes from `kernels.grouped_matmul`.
Source    Gale et al., MegaBlocks (arXiv:2211.15841); jax's megablox for the grid of (tile, group) pairs.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.cost import Cost
from kernels.dispatch import Device
from kernels.grouped_matmul import tiles
from kernels.grouped_matmul.groups import Visit, visits

Array = jax.Array
Epilogue = Callable[..., Sequence[Array]]


def lanes(row: Array) -> Array:
    """[1, n] as [n, 128], the same in each lane. The transpose unit takes whole registers."""
    return jnp.broadcast_to(row, (128, row.shape[1])).T


def total(x: Array) -> Array:
    """[1, n], the sum of each row of [n, width]: lanes become sublanes first, which the transpose unit does faster."""
    if x.shape[1] % 128:
        return jnp.broadcast_to(jnp.sum(x, axis=1, keepdims=True), (x.shape[0], 128)).T[:1]
    lanes = functools.reduce(jnp.add, [x[:, c : c + size] for c, size in pieces(x.shape[1], 128)])
    return jnp.sum(lanes.T, axis=0, keepdims=True)


def across(lanes: Array, width: int) -> Array:
    """[n, 128] that has the same in each lane as [n, width]."""
    return jnp.concatenate([lanes] * -(-width // 128), axis=1)[:, :width]


def dot(x: Array, w: Array, contract: tuple[int, int]) -> Array:
    """The product in float32, over axis contract[0] of x and contract[1] of w."""
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(x, w, dims, preferred_element_type=jnp.float32)


def pieces(size: int, piece: int) -> list[tuple[int, int]]:
    """(first, how many) of each piece of a side; the last may be smaller."""
    return [(first, min(piece, size - first)) for first in range(0, size, piece)]


def contraction(matrices: int, inner: int, part: int) -> list[list[tuple[int, Any]]]:
    """The terms of a sum of products, each `part` of all contractions: (which matrix, where in it) of what it has."""
    starts = sorted({*range(0, matrices * inner, part), *range(0, matrices * inner, inner)})
    spans = zip(starts, [*starts[1:], matrices * inner], strict=True)
    terms = itertools.groupby(spans, lambda span: span[0] // part)
    return [[(start // inner, pl.ds(start % inner, end - start)) for start, end in term] for _, term in terms]


def loop(rows: int, body: Callable[[Any, Any], None]) -> None:
    """body(some rows, the first of them), over all: little code for what few steps do."""
    few = next(few for few in (64, 32, 16, 8, 1) if rows % few == 0)

    def part(n: Array, _: None) -> None:
        body(pl.ds(pl.multiple_of(n * few, few), few), n * few)

    jax.lax.fori_loop(0, rows // few, part, None)


def aligned(first: Any, unit: int) -> Any:
    """Tells the compiler that a place is a multiple of the unit, where it is one that it cannot see."""
    return first if isinstance(first, int) or unit % 8 else pl.multiple_of(first, unit)


def clear(x: Array, inside: Array) -> Array:
    """Zeros where it is not inside, whatever is there."""
    return jnp.where(inside, x, jnp.zeros_like(x))


def product(
    xs: Sequence[Array],
    ws: Sequence[Array],
    group_sizes: Array,
    here: Device,
    *,
    transposed: bool = False,
    add: bool = False,
    epilogue: Epilogue | None = None,
    wide: Sequence[Array] = (),
    thin: Sequence[Array] = (),
    outs: Sequence[str] = ("wide",),
    name: str,
) -> list[Array]:
    """The outputs of `epilogue(*sums, *wide, *thin)`, zeros in rows that are nobody's.

    Args:
        xs: [N, K], as many as matrices, or one for all.
        ws: [E, K, J], or [E, J, K] where `transposed`.
        add: the products are summed, and the epilogue gets that; else it gets one after the other.
        epilogue: gets float32 [rows, J] and the same rows of the other arrays, of thin ones a column that broadcasts;
            None: the sum itself.
        wide: [N, J]. thin: [1, N].
        outs: of each output "wide", [N, J] in x's dtype, or "thin", [1, N] in float32: what the epilogue gives,
            [rows, J], summed over columns.
    """
    (N, K), E, J = xs[0].shape, ws[0].shape[0], ws[0].shape[1 if transposed else 2]
    dtype = xs[0].dtype
    n_wide = len(wide) + sum(kind == "wide" for kind in outs)
    sizes = {"xs": len(xs), "ws": len(ws), "wide": n_wide, "transposed": transposed, "itemsize": dtype.itemsize}
    chosen = tiles.product(here, N, E, K, J, plain=epilogue is None, **sizes)
    plan = visits(group_sizes, N, chosen.rows)
    across, steps = -(-J // chosen.columns), -(-K // chosen.inner)
    # The scalar unit counts the axes that there are, also those of one step.
    grid, at = (across, plan.count, steps), lambda index: index
    if across == steps == 1:
        grid, at = (plan.count,), lambda index: lambda v, *tables: index(0, v, 0, *tables)
    tables, operands = plan.blocks(chosen.rows, chosen.chunk, E), [*xs, *ws, *wide, *thin]
    counts = [len(xs), len(ws), len(wide), len(thin), len(outs)]

    block = pl.BlockSpec
    x_spec = block((chosen.rows, chosen.inner), at(lambda j, v, k, g, r, *_: (r[v], k)))
    if transposed:
        w_spec = block((1, chosen.columns, chosen.inner), at(lambda j, v, k, g, *_: (g[v], j, k)))
    else:
        w_spec = block((1, chosen.inner, chosen.columns), at(lambda j, v, k, g, *_: (g[v], k, j)))
    wide_out = block((chosen.rows, chosen.columns), at(lambda j, v, k, g, r, *_: (r[v], j)))
    thin_in = block((1, chosen.rows), at(lambda j, v, k, g, r, *_: (0, r[v])))
    thin_out = block((1, 1, chosen.rows), at(lambda j, v, k, g, r, *_: (j, 0, r[v])))
    in_specs = [x_spec] * len(xs) + [w_spec] * len(ws) + [wide_out] * len(wide) + [thin_in] * len(thin)

    n_sums = 0 if steps == 1 else 1 if add else len(ws)
    waits = []
    if chosen.lead:
        waits = [pltpu.VMEM((chosen.rows, min(chosen.width, chosen.strip)), jnp.float32)]
    elif chosen.part and steps == 1 and (add or len(ws) == 1):
        sides = itertools.product(pieces(chosen.strip, chosen.width), pieces(chosen.rows, chosen.height))
        waits = [pltpu.VMEM((height, width), jnp.float32) for (_, width), (_, height) in sides]
    wide_shape, thin_shape = jax.ShapeDtypeStruct((N, J), dtype), jax.ShapeDtypeStruct((across, 1, N), jnp.float32)
    moved = dtype.itemsize * (sum(x.size for x in xs) + sum(w.size for w in ws) + n_wide * N * J)
    found = pl.pallas_call(
        functools.partial(_kernel, chosen, K, J, transposed, add, epilogue, outs, counts, len(waits), len(grid)),
        out_shape=[wide_shape if kind == "wide" else thin_shape for kind in outs],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(tables),
            grid=grid,
            in_specs=in_specs,
            out_specs=[wide_out if kind == "wide" else thin_out for kind in outs],
            scratch_shapes=[pltpu.VMEM((chosen.rows, chosen.columns), jnp.float32)] * n_sums
            + [pltpu.VMEM((chosen.rows, chosen.columns), dtype)] * sum(kind == "wide" for kind in outs)
            + waits
            + [pltpu.VMEM((chosen.rows, 128), jnp.float32)] * len(thin),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary") if len(grid) == 3 else ("arbitrary",),
            vmem_limit_bytes=chosen.vmem,
            disable_bounds_checks=True,  # 45 bundles a step; the tables have no block that is not there
        ),
        cost_estimate=Cost(2 * N * K * J * len(ws), moved).estimate(),
        name=name,
    )(*tables, *operands)
    return [x if kind == "wide" else jnp.sum(x, axis=0) for x, kind in zip(found, outs, strict=True)]


def _kernel(
    chosen: tiles.Tiles,
    K: int,
    J: int,
    transposed: bool,
    add: bool,
    epilogue: Epilogue | None,
    kinds: Sequence[str],
    counts: Sequence[int],
    n_waits: int,
    n_axes: int,
    *refs: Any,
) -> None:
    tables, rest = refs[:5], list(refs[5:])
    xs, ws, wide, thin, outs = ([rest.pop(0) for _ in range(n)] for n in counts)
    columns_of = [rest.pop() for _ in thin]
    waits = rest[len(rest) - n_waits :]
    rest = rest[: len(rest) - n_waits]
    n_saved = sum(kind == "wide" for kind in kinds)
    sums, saved = rest[: len(rest) - n_saved], rest[len(rest) - n_saved :]
    j, v, k = (pl.program_id(axis) for axis in range(3)) if n_axes == 3 else (0, pl.program_id(0), 0)
    visit, whole = Visit.read(tables, v, chosen.rows), tables[4][v]
    busy = visit.low < visit.high
    ragged, past_end = K % chosen.inner != 0, J % chosen.columns != 0 and "thin" in kinds

    def term(rows: Any, columns: Any, parts: Sequence[tuple[int, Any]]) -> Array:
        """The products of these rows and columns, of each matrix over a part of a step of the contraction, summed."""
        return functools.reduce(jnp.add, [one(rows, columns, *part) for part in parts])

    def one(rows: Any, columns: Any, n: int, part: Any) -> Array:
        x = xs[n if len(xs) > 1 else 0][rows, part]
        w = ws[n][(0, columns, part) if transposed else (0, part, columns)]
        if ragged:
            end = K - k * chosen.inner - (part.start or 0)
            x = clear(x, _before(end, x.shape, 1))
            w = clear(w, _before(end, w.shape, 1 if transposed else 0))
        return dot(x, w, (1, 1 if transposed else 0))

    plain_sums = sums and len(ws) == 1 and epilogue is None
    # Two halves of a part, of two matrices, are one part: the unit is as busy, and less waits in memory.
    by_parts = chosen.part and (waits or plain_sums)
    whole_terms = [[(n, slice(None))] for n in range(len(ws))]
    terms = contraction(len(ws), chosen.inner, chosen.part) if by_parts else whole_terms
    # Never anything but 0, which libtpu cannot know: or it would keep what waits in registers.
    nothing = pl.multiple_of(jnp.minimum(whole, 0), 8)
    waiting_at = 0 if epilogue is None and not add else nothing  # a product alone has registers for it

    def products(rows: Any, columns: Any, waiting: Any) -> list[Array]:
        """One step of the contraction; of what is taken part by part, the last."""
        if waiting is not None:
            return [waiting[pl.ds(waiting_at, rows.size)] + term(rows, columns, terms[-1])]
        found = [term(rows, columns, each) for each in terms]
        return [functools.reduce(jnp.add, found)] if add else found

    def write(rows: Any, columns: Any, first: tuple[int, int], values: Sequence[Array]) -> None:
        for ref, kind, value in zip(outs, kinds, values, strict=True):
            at = (rows, columns) if kind == "wide" else (0, slice(None), rows)
            if kind == "thin":
                old, value = ref[at], total(value)
                value = clear(old, jnp.asarray(first[1]) > 0) + value
                value = jnp.where(visit.mine(value.shape, 1, first[0]), value, old)
            ref[at] = value.astype(ref.dtype)

    def piece(rows: Any, columns: Any, first: tuple[int, int], waiting: Any = None, values: Any = None) -> None:
        def finish(values: Sequence[Array]) -> None:
            if epilogue is not None:
                values = [*values, *(ref[rows, columns] for ref in wide)]
                if past_end:  # what lies there must not get into a sum over columns
                    inside = [_before(J - j * chosen.columns - first[1], value.shape, 1) for value in values]
                    values = [clear(*pair) for pair in zip(values, inside, strict=True)]
                values = epilogue(*values, *(across(ref[rows], columns.size) for ref in columns_of))
            write(rows, columns, first, values)

        finish(values if values is not None else products(rows, columns, waiting))

    for found, ref in zip(columns_of, thin, strict=True):
        for first, n in pieces(chosen.rows, 128):
            found[pl.ds(first, n)] = lanes(ref[:, pl.ds(first, n)])

    last = k == -(-K // chosen.inner) - 1
    blocks = [ref for ref, kind in zip(outs, kinds, strict=True) if kind == "wide"]
    if sums:

        @pl.when(k == 0)
        def _():
            def zero(rows: Any, _: Any) -> None:
                for ref in sums:
                    ref[rows] = jnp.zeros_like(ref[rows])

            loop(chosen.rows, zero)

    sides = itertools.product(pieces(chosen.strip, chosen.width), pieces(chosen.rows, chosen.height))
    each_side = list(itertools.zip_longest(sides, waits if chosen.part else []))

    def stream(down: Any, right: Any, size: int) -> None:
        at = []
        for ((c, width), (r, height)), ref in each_side:
            if r < size:
                first = aligned(down + r, min(size, chosen.height)), aligned(right + c, 128)
                at.append(((pl.ds(first[0], min(height, size)), pl.ds(first[1], width), first), ref))
        for t in range(len(terms) - 1 if chosen.part and waits else 0):
            for (rows, columns, _), ref in at:
                found = term(rows, columns, terms[t])
                ref[pl.ds(0, rows.size)] = ref[pl.ds(waiting_at, rows.size)] + found if t else found
        if chosen.lead:
            lead(at, down, size)
            return
        if not sums:
            for where, ref in at:
                piece(*where, ref)
            return
        if plain_sums:
            for which in terms:
                for (rows, columns, _), _ in at:
                    sums[0][rows, columns] += term(rows, columns, which)
            return
        for (rows, columns, _), _ in at:
            for ref, value in zip(sums, products(rows, columns, None), strict=True):
                ref[rows, columns] += value

        @pl.when(last)
        def _():
            for (rows, columns, first), _ in at:
                piece(rows, columns, first, values=[ref[rows, columns] for ref in sums])

    def lead(at: Any, down: Any, size: int) -> None:
        """A part of the contraction of all rows, in the first columns, then all else."""
        (held,), first = waits, at[0][0][1]
        held[pl.ds(0, size)] = one(pl.ds(aligned(down, chosen.chunk), size), first, 0, pl.ds(0, chosen.lead))
        ahead = -(-size // chosen.height)
        for where, _ in at[ahead:]:
            piece(*where)
        for r, (where, _) in zip(range(0, size, chosen.height), at[:ahead], strict=True):
            rest = one(*where[:2], 0, pl.ds(chosen.lead, chosen.inner - chosen.lead))
            piece(*where, values=[held[pl.ds(nothing + r, where[0].size)] + rest])

    def keep(rows: Any, _: Any) -> None:
        for ref, old in zip(blocks, saved, strict=True):
            old[rows] = ref[rows]

    def put_back(rows: Any, first: Any) -> None:
        """Rows after this group's belong to later visits, which write them again. Those before it were there."""
        before = _before(visit.low - visit.row - first, (rows.size, 1), 0)
        for ref, old in zip(blocks, saved, strict=True):
            ref[rows] = jnp.where(before, old[rows], clear(ref[rows], busy))

    def leave(rows: Any, _: Any) -> None:
        outs[0][rows] = sums[0][rows].astype(outs[0].dtype)

    strips, chunks = chosen.columns // chosen.strip, chosen.rows // chosen.chunk

    def streams(down: Any, size: int) -> None:
        """All strips of columns."""
        if strips == 1:
            stream(down, 0, size)
        else:
            jax.lax.fori_loop(0, strips, lambda n, _: stream(down, n * chosen.strip, size), None)

    def end() -> None:
        if plain_sums:
            pl.when(last)(lambda: loop(chosen.rows, leave))

    def all_chunks() -> None:
        streams(0, chosen.rows)
        end()

    def some_chunks() -> None:
        spoils = last & ~(busy & (visit.low <= visit.row))
        pl.when(spoils)(lambda: loop(chosen.rows, keep))
        first = jax.lax.div(jnp.maximum(visit.low - visit.row, 0), chosen.chunk)
        stop = jnp.minimum(jax.lax.div(visit.high - visit.row + chosen.chunk - 1, chosen.chunk), chunks)
        for size in range(chosen.chunks, 0, -1):
            trips = jax.lax.div(jnp.maximum(stop - first, 0), size)
            at = lambda n, size=size, first=first: (first + n * size) * chosen.chunk
            jax.lax.fori_loop(0, trips, lambda n, _, at=at, size=size: streams(at(n), size * chosen.chunk), None)
            first += trips * size
        end()
        pl.when(spoils)(lambda: loop(chosen.rows, put_back))
        for ref, kind in zip(outs, kinds, strict=True):
            if kind == "thin":

                @pl.when(~busy & last)
                def _(ref: Any = ref) -> None:
                    ref[0] = jnp.where(_before(visit.low - visit.row, ref.shape[1:], 1), ref[0], 0)

    # Most visits begin with their tile, and need one branch.
    if chunks > 1:
        jax.lax.cond(whole == 1, all_chunks, some_chunks)
    else:
        some_chunks()


def _before(end: Any, shape: tuple[int, int], axis: int) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis) < end
