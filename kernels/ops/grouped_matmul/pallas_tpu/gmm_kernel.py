"""What one step of the grid of `gmm.py` does: a visit's rows and columns, some or all of the contraction.

run ── all_chunks or some_chunks ── streams ── stream ── products ── piece ── write
       the whole tile, or as many   each strip  the products without a branch   epilogue, rows of the output
       chunks as it has rows of                 between them: they are one
                                                schedule of the matrix unit
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from dantinox.kernels.ops.grouped_matmul.common import clear, dot
from dantinox.kernels.ops.grouped_matmul.group_metadata import TileTask
from dantinox.kernels.ops.grouped_matmul.pallas_tpu import block_sizes
from dantinox.kernels.ops.grouped_matmul.pallas_tpu.vmem import (
    across,
    aligned,
    before,
    contraction,
    lanes,
    loop,
    pieces,
    total,
)

Array = jax.Array
Epilogue = Callable[..., Sequence[Array]]


class Static(NamedTuple):
    """What a kernel is compiled for; the names are those of `gmm.product`.

    Attributes:
        counts: how many of xs, ws, wide, thin, outs there are.
        waits: how many places there are where sums of a part of the contraction wait.
        axes: of the grid.
    """

    tiles: block_sizes.Tiles
    K: int
    J: int
    transposed: bool
    add: bool
    epilogue: Epilogue | None
    outs: tuple[str, ...]
    counts: tuple[int, ...]
    waits: int
    axes: int


class Step:
    """One step. Its refs are tables, inputs, outputs, sums, saved rows, what waits, lanes of `thin`, in this order."""

    def __init__(self, static: Static, *refs: Any) -> None:
        self.static, self.tiles = static, static.tiles
        tables, rest = refs[:5], list(refs[5:])
        self.xs, self.ws, self.wide, self.thin, self.outs = ([rest.pop(0) for _ in range(n)] for n in static.counts)
        self.lanes = [rest.pop() for _ in self.thin]
        self.waits = rest[len(rest) - static.waits :]
        rest = rest[: len(rest) - static.waits]
        self.forward_tables = [ref for ref, kind in zip(self.outs, static.outs, strict=True) if kind == "wide"]
        self.visit_empty_groups, self.saved = (
            rest[: len(rest) - len(self.forward_tables)],
            rest[len(rest) - len(self.forward_tables) :],
        )

        alone = static.axes == 1
        self.j, v, self.k = (0, pl.program_id(0), 0) if alone else (pl.program_id(axis) for axis in range(3))
        self.visit, self.whole = TileTask.read(tables, v, self.tiles.rows), tables[4][v]
        self.busy = self.visit.row_start < self.visit.row_end
        self.plain = static.epilogue is None and len(self.ws) == 1
        # Two halves of a part, of two matrices, are one part: the unit is as busy, and less waits in memory.
        by_parts = self.tiles.part and (self.waits or (self.visit_empty_groups and self.plain))
        whole_terms = [[(n, slice(None))] for n in range(len(self.ws))]
        self.terms = contraction(len(self.ws), self.tiles.inner, self.tiles.part) if by_parts else whole_terms
        # Never anything but 0, which libtpu cannot know: or it would keep what waits in registers.
        self.nothing = pl.multiple_of(jnp.minimum(self.whole, 0), 8)
        # A product alone has registers for it.
        self.waiting_at = 0 if static.epilogue is None and not static.add else self.nothing

    def run(self) -> None:
        """All of it."""
        for found, ref in zip(self.lanes, self.thin, strict=True):
            for first, n in pieces(self.tiles.rows, 128):
                found[pl.ds(first, n)] = lanes(ref[:, pl.ds(first, n)])
        self.last = self.k == -(-self.static.K // self.tiles.inner) - 1
        if self.visit_empty_groups:
            pl.when(self.k == 0)(self.zero_sums)
        # Most visits begin with their tile, and need one branch.
        if self.tiles.rows > self.tiles.chunk:
            jax.lax.cond(self.whole == 1, self.all_chunks, self.some_chunks)
        else:
            self.some_chunks()

    def zero_sums(self) -> None:
        def zero(rows: Any, _: Any) -> None:
            for ref in self.visit_empty_groups:
                ref[rows] = jnp.zeros_like(ref[rows])

        loop(self.tiles.rows, zero)

    # --- which chunks of rows -------------------------------------------------------------------------------------

    def all_chunks(self) -> None:
        self.streams(0, self.tiles.rows)
        self.leave()

    def some_chunks(self) -> None:
        """Those that this visit has a row of, `Tiles.chunks` in a stream at most; then what it spoilt is mended."""
        visit, chunk = self.visit, self.tiles.chunk
        spoils = self.last & ~(self.busy & (visit.row_start <= visit.row))
        pl.when(spoils)(lambda: loop(self.tiles.rows, self.keep))
        first = jax.lax.div(jnp.maximum(visit.row_start - visit.row, 0), chunk)
        stop = jnp.minimum(jax.lax.div(visit.row_end - visit.row + chunk - 1, chunk), self.tiles.rows // chunk)
        for size in range(self.tiles.chunks, 0, -1):
            trips = jax.lax.div(jnp.maximum(stop - first, 0), size)
            at = lambda n, size=size, first=first: (first + n * size) * chunk
            jax.lax.fori_loop(0, trips, lambda n, _, at=at, size=size: self.streams(at(n), size * chunk), None)
            first += trips * size
        self.leave()
        pl.when(spoils)(lambda: loop(self.tiles.rows, self.put_back))
        for ref, kind in zip(self.outs, self.static.outs, strict=True):
            if kind == "thin":

                @pl.when(~self.busy & self.last)
                def _(ref: Any = ref) -> None:
                    ref[0] = jnp.where(before(visit.row_start - visit.row, ref.shape[1:], 1), ref[0], 0)

    def keep(self, rows: Any, _: Any) -> None:
        for ref, old in zip(self.forward_tables, self.saved, strict=True):
            old[rows] = ref[rows]

    def put_back(self, rows: Any, first: Any) -> None:
        """Rows after this group's belong to later visits, which write them again. Those before it were there."""
        earlier = before(self.visit.row_start - self.visit.row - first, (rows.size, 1), 0)
        for ref, old in zip(self.forward_tables, self.saved, strict=True):
            ref[rows] = jnp.where(earlier, old[rows], clear(ref[rows], self.busy))

    def leave(self) -> None:
        """The sums of a plain product, all of them there, become the output."""

        def some(rows: Any, _: Any) -> None:
            self.outs[0][rows] = self.visit_empty_groups[0][rows].astype(self.outs[0].dtype)

        if self.visit_empty_groups and self.plain:
            pl.when(self.last)(lambda: loop(self.tiles.rows, some))

    # --- the products ---------------------------------------------------------------------------------------------

    def streams(self, down: Any, size: int) -> None:
        """All strips of columns of `size` rows from `down` on."""
        strip = self.tiles.strip
        if (strips := self.tiles.columns // strip) == 1:
            self.stream(down, 0, size)
        else:
            jax.lax.fori_loop(0, strips, lambda n, _: self.stream(down, n * strip, size), None)

    def stream(self, down: Any, right: Any, size: int) -> None:
        """Products with no branch between them: the matrix unit takes some 260 bundles to fill and to empty."""
        t = self.tiles
        sides = itertools.product(pieces(t.strip, t.width), pieces(t.rows, t.height))
        at = []
        for ((c, width), (r, height)), wait in itertools.zip_longest(sides, self.waits if t.part else []):
            if r < size:
                first = aligned(down + r, min(size, t.height)), aligned(right + c, 128)
                at.append(((pl.ds(first[0], min(height, size)), pl.ds(first[1], width), first), wait))
        if t.part and self.waits:
            self.all_parts_but_one(at)
        if t.lead:
            self.lead(at, down, size)
        elif not self.visit_empty_groups:
            for where, wait in at:
                self.piece(*where, self.products(*where[:2], wait))
        elif self.plain:
            for parts in self.terms:
                for (rows, columns, _), _ in at:
                    self.visit_empty_groups[0][rows, columns] += self.term(rows, columns, parts)
        else:
            self.into_sums(at)

    def all_parts_but_one(self, at: Any) -> None:
        for n, parts in enumerate(self.terms[:-1]):
            for (rows, columns, _), wait in at:
                found = self.term(rows, columns, parts)
                wait[pl.ds(0, rows.size)] = wait[pl.ds(self.waiting_at, rows.size)] + found if n else found

    def lead(self, at: Any, down: Any, size: int) -> None:
        """A part of the contraction of all rows, in the first columns, then all else."""
        t, (held,), first = self.tiles, self.waits, at[0][0][1]
        held[pl.ds(0, size)] = self.one(pl.ds(aligned(down, t.chunk), size), first, 0, pl.ds(0, t.lead))
        ahead = -(-size // t.height)
        for where, _ in at[ahead:]:
            self.piece(*where, self.products(*where[:2], None))
        for r, (where, _) in zip(range(0, size, t.height), at[:ahead], strict=True):
            rest = self.one(*where[:2], 0, pl.ds(t.lead, t.inner - t.lead))
            self.piece(*where, [held[pl.ds(self.nothing + r, where[0].size)] + rest])

    def into_sums(self, at: Any) -> None:
        for (rows, columns, _), _ in at:
            for ref, value in zip(self.visit_empty_groups, self.products(rows, columns, None), strict=True):
                ref[rows, columns] += value

        @pl.when(self.last)
        def _() -> None:
            for (rows, columns, first), _ in at:
                self.piece(rows, columns, first, [ref[rows, columns] for ref in self.visit_empty_groups])

    def products(self, rows: Any, columns: Any, wait: Any) -> list[Array]:
        """One step of the contraction; of what is taken part by part, the last, and what waits of the others."""
        if wait is not None:
            return [wait[pl.ds(self.waiting_at, rows.size)] + self.term(rows, columns, self.terms[-1])]
        found = [self.term(rows, columns, parts) for parts in self.terms]
        return [functools.reduce(jnp.add, found)] if self.static.add else found

    def term(self, rows: Any, columns: Any, parts: Sequence[tuple[int, Any]]) -> Array:
        """The products of these rows and columns, of each matrix over a part of a step of the contraction, summed."""
        return functools.reduce(jnp.add, [self.one(rows, columns, *part) for part in parts])

    def one(self, rows: Any, columns: Any, n: int, part: Any) -> Array:
        transposed, inner = self.static.transposed, self.tiles.inner
        x = self.xs[n if len(self.xs) > 1 else 0][rows, part]
        w = self.ws[n][(0, columns, part) if transposed else (0, part, columns)]
        if self.static.K % inner:
            end = self.static.K - self.k * inner - (part.start or 0)
            x, w = clear(x, before(end, x.shape, 1)), clear(w, before(end, w.shape, 1 if transposed else 0))
        return dot(x, w, (1, 1 if transposed else 0))

    # --- what becomes of them -------------------------------------------------------------------------------------

    def piece(self, rows: Any, columns: Any, first: tuple[int, int], values: Sequence[Array]) -> None:
        """The epilogue of these rows and columns, which begin at `first`, and its outputs written."""
        if self.static.epilogue is not None:
            values = [*values, *(ref[rows, columns] for ref in self.wide)]
            if self.past_end:  # what lies there must not get into a sum over columns
                end = self.static.J - self.j * self.tiles.columns - first[1]
                values = [clear(value, before(end, value.shape, 1)) for value in values]
            values = self.static.epilogue(*values, *(across(ref[rows], columns.size) for ref in self.lanes))
        self.write(rows, columns, first, values)

    @property
    def past_end(self) -> bool:
        """Whether some column tile reaches past the last column, and columns are summed."""
        return self.static.J % self.tiles.columns != 0 and "thin" in self.static.outs

    def write(self, rows: Any, columns: Any, first: tuple[int, int], values: Sequence[Array]) -> None:
        for ref, kind, value in zip(self.outs, self.static.outs, values, strict=True):
            at = (rows, columns) if kind == "wide" else (0, slice(None), rows)
            if kind == "thin":
                old, value = ref[at], total(value)
                value = clear(old, jnp.asarray(first[1]) > 0) + value
                value = jnp.where(self.visit.row_mask(value.shape, 1, first[0]), value, old)
            ref[at] = value.astype(ref.dtype)
