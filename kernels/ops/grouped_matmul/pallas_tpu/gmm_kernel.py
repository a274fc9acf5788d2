"""One grid step of `gmm.py`: the rows and columns of a visit, over part or all of the contraction.

run ── multiply_all_chunks or ── multiply_strips ── multiply_strip ── products ── apply_epilogue ── write_outputs
       multiply_touched_chunks   each strip         one instruction   several     per output tile   rows of the
       the whole tile, or only                      stream without    MXU tiles                     outputs
       chunks that have rows                        branches
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from dantinox.kernels.ops.grouped_matmul.common import dot_f32, mask_to_zero
from dantinox.kernels.ops.grouped_matmul.group_metadata import ForwardTables, TileTask
from dantinox.kernels.ops.grouped_matmul.pallas_tpu.block_sizes import GmmBlockSizes
from dantinox.kernels.ops.grouped_matmul.pallas_tpu.vmem import (
    ContractionSlice,
    for_each_row_chunk,
    hint_multiple_of,
    index_lt,
    row_sums,
    split_contraction,
    split_range,
    tile_lanes,
    to_lanes,
)

Array = jax.Array
Ref = Any
Epilogue = Callable[..., Sequence[Array]]


class GmmConfig(NamedTuple):
    """Static parameters of a kernel, named as in `gmm.gmm`. `num_grid_axes` is 1 or 3."""

    block_sizes: GmmBlockSizes
    K: int
    J: int
    transposed: bool
    sum_products: bool
    epilogue: Epilogue | None
    out_kinds: tuple[str, ...]
    num_grid_axes: int


class GmmInputs(NamedTuple):
    """Arrays, their block specs or their references."""

    xs: Sequence[Any]
    ws: Sequence[Any]
    matrices: Sequence[Any]
    row_vectors: Sequence[Any]
    group_vectors: Sequence[Any]


class GmmScratch(NamedTuple):
    """Shapes or references in VMEM.

    Attributes:
        acc: float32 sums of one tile, if the contraction takes several steps.
        saved_rows: for each matrix among the outputs, the rows of earlier groups in this tile.
        partial_sums: float32 sums of a part of the contraction of one step.
        lanes: each of the row vectors, with the value of a row in every lane.
    """

    acc: Sequence[Any]
    saved_rows: Sequence[Any]
    partial_sums: Sequence[Any]
    lanes: Sequence[Any]


class OutputTile(NamedTuple):
    """The output of one product: slices of rows and columns of the block, and where they start."""

    rows: Any
    columns: Any
    row_start: Any
    column_start: Any
    partial_sums: Ref | None


def gmm_kernel(
    tables: ForwardTables, inputs: GmmInputs, outs: Sequence[Ref], scratch: GmmScratch, *, config: GmmConfig
) -> None:
    """See `gmm.py`."""
    GmmKernelStep(config, tables, inputs, outs, scratch).run()


class GmmKernelStep:
    """One grid step: a visit of a tile, or a part of its contraction."""

    def __init__(
        self, config: GmmConfig, tables: ForwardTables, inputs: GmmInputs, outs: Sequence[Ref], scratch: GmmScratch
    ) -> None:
        self.config, self.sizes = config, config.block_sizes
        self.inputs, self.outs, self.scratch = inputs, outs, scratch
        self.matrix_outs = [ref for ref, kind in zip(outs, config.out_kinds, strict=True) if kind == "matrix"]
        one_axis = config.num_grid_axes == 1
        self.j, v, self.k = (0, pl.program_id(0), 0) if one_axis else (pl.program_id(axis) for axis in range(3))
        self.task, self.covers_tile = TileTask.load(tables, v, self.sizes.block_m), tables.covers_tile[v]
        self.has_rows = self.task.row_start < self.task.row_end
        num_w = len(inputs.ws)
        self.has_no_epilogue = config.epilogue is None and num_w == 1
        # A term may join halves from two operands: the matrix unit is as busy, and fewer sums stay in VMEM.
        splits_k = self.sizes.block_k_sub and (scratch.partial_sums or (scratch.acc and self.has_no_epilogue))
        self.terms = [[ContractionSlice(n, slice(None))] for n in range(num_w)]
        if splits_k:
            self.terms = split_contraction(num_w, self.sizes.block_k, self.sizes.block_k_sub)
        # Always 0, but opaque to the compiler, so that partial sums stay in VMEM instead of registers.
        self.opaque_zero = pl.multiple_of(jnp.minimum(self.covers_tile, 0), 8)
        # A single product leaves enough registers for its partial sums.
        self.partial_sums_start = 0 if config.epilogue is None and not config.sum_products else self.opaque_zero

    def run(self) -> None:
        """Multiply the rows of this visit and write the outputs."""
        sizes = self.sizes
        for lanes_ref, row_vector_ref in zip(self.scratch.lanes, self.inputs.row_vectors, strict=True):
            for start, size in split_range(sizes.block_m, 128):
                lanes_ref[pl.ds(start, size)] = to_lanes(row_vector_ref[:, pl.ds(start, size)])
        self.is_last_k = self.k == -(-self.config.K // sizes.block_k) - 1
        if self.scratch.acc:
            pl.when(self.k == 0)(self.zero_acc)
        # Most visits cover their tile and need one branch only.
        if sizes.block_m > sizes.block_m_sub:
            jax.lax.cond(self.covers_tile == 1, self.multiply_all_chunks, self.multiply_touched_chunks)
        else:
            self.multiply_touched_chunks()

    def zero_acc(self) -> None:
        """Zero the sums of the tile."""

        def zero_rows(rows: Any, _: Any) -> None:
            for ref in self.scratch.acc:
                ref[rows] = jnp.zeros_like(ref[rows])

        for_each_row_chunk(self.sizes.block_m, zero_rows)

    # --- chunks of rows -------------------------------------------------------------------------------------------

    def multiply_all_chunks(self) -> None:
        """Multiply a tile whose chunks all have rows of this visit."""
        self.multiply_strips(0, self.sizes.block_m)
        self.write_acc()

    def multiply_touched_chunks(self) -> None:
        """Multiply the chunks that have rows of this visit, then restore the rows of earlier groups.

        One instruction stream covers at most `max_chunks` of them.
        """
        task, chunk, block_m = self.task, self.sizes.block_m_sub, self.sizes.block_m
        overwrites = self.is_last_k & ~(self.has_rows & (task.row_start <= task.row))
        pl.when(overwrites)(lambda: for_each_row_chunk(block_m, self.save_rows))
        first = jax.lax.div(jnp.maximum(task.row_start - task.row, 0), chunk)
        end = jnp.minimum(jax.lax.div(task.row_end - task.row + chunk - 1, chunk), block_m // chunk)
        for num_chunks in range(self.sizes.max_chunks, 0, -1):
            trips = jax.lax.div(jnp.maximum(end - first, 0), num_chunks)

            def multiply_chunks(n: Array, _: None, num_chunks: int = num_chunks, first: Array = first) -> None:
                self.multiply_strips((first + n * num_chunks) * chunk, num_chunks * chunk)

            jax.lax.fori_loop(0, trips, multiply_chunks, None)
            first += trips * num_chunks
        self.write_acc()
        pl.when(overwrites)(lambda: for_each_row_chunk(block_m, self.restore_rows))
        for ref, kind in zip(self.outs, self.config.out_kinds, strict=True):
            if kind == "row_sum":

                @pl.when(~self.has_rows & self.is_last_k)
                def zero_unassigned_row_sums(ref: Ref = ref) -> None:
                    ref[0] = jnp.where(index_lt(task.row_start - task.row, ref.shape[1:], 1), ref[0], 0)

    def save_rows(self, rows: Any, _: Any) -> None:
        """Save the output's rows, which may belong to earlier groups."""
        for ref, saved in zip(self.matrix_outs, self.scratch.saved_rows, strict=True):
            saved[rows] = ref[rows]

    def restore_rows(self, rows: Any, first: Any) -> None:
        """Restore the rows of earlier groups; later groups' visits write their own rows again."""
        is_earlier = index_lt(self.task.row_start - self.task.row - first, (rows.size, 1), 0)
        for ref, saved in zip(self.matrix_outs, self.scratch.saved_rows, strict=True):
            ref[rows] = jnp.where(is_earlier, saved[rows], mask_to_zero(ref[rows], self.has_rows))

    def write_acc(self) -> None:
        """Write the complete sums of a product without an epilogue to the output."""

        def write_rows(rows: Any, _: Any) -> None:
            self.outs[0][rows] = self.scratch.acc[0][rows].astype(self.outs[0].dtype)

        if self.scratch.acc and self.has_no_epilogue:
            pl.when(self.is_last_k)(lambda: for_each_row_chunk(self.sizes.block_m, write_rows))

    # --- products -------------------------------------------------------------------------------------------------

    def multiply_strips(self, row: Any, num_rows: int) -> None:
        """Multiply all strips of columns of `num_rows` rows from `row` on."""
        strip = self.sizes.block_n_sub

        def multiply_nth_strip(n: Array, _: None) -> None:
            self.multiply_strip(row, n * strip, num_rows)

        if (strips := self.sizes.block_n // strip) == 1:
            self.multiply_strip(row, 0, num_rows)
        else:
            jax.lax.fori_loop(0, strips, multiply_nth_strip, None)

    def multiply_strip(self, row: Any, column: Any, num_rows: int) -> None:
        """Multiply without a branch in between: filling and draining the matrix unit takes some 260 bundles."""
        sizes, partial_sums = self.sizes, self.scratch.partial_sums
        ranges = itertools.product(split_range(sizes.block_n_sub, sizes.mxu_n), split_range(sizes.block_m, sizes.mxu_m))
        tiles = []
        for ((c, width), (r, height)), ref in itertools.zip_longest(ranges, partial_sums if sizes.block_k_sub else []):
            if r < num_rows:
                row_start = hint_multiple_of(row + r, min(num_rows, sizes.mxu_m))
                column_start = hint_multiple_of(column + c, 128)
                rows, columns = pl.ds(row_start, min(height, num_rows)), pl.ds(column_start, width)
                tiles.append(OutputTile(rows, columns, row_start, column_start, ref))
        if sizes.block_k_sub and partial_sums:
            self.accumulate_partial_sums(tiles)
        if sizes.leading_k:
            self.multiply_leading_k_first(tiles, row, num_rows)
        elif not self.scratch.acc:
            for tile in tiles:
                self.apply_epilogue(tile, self.products(tile))
        elif self.has_no_epilogue:
            for term in self.terms:
                for tile in tiles:
                    self.scratch.acc[0][tile.rows, tile.columns] += self.partial_product(tile, term)
        else:
            self.accumulate(tiles)

    def accumulate_partial_sums(self, tiles: Sequence[OutputTile]) -> None:
        """Sum all terms but the last of each tile into VMEM."""
        for n, term in enumerate(self.terms[:-1]):
            for tile in tiles:
                value, ref = self.partial_product(tile, term), tile.partial_sums
                size = tile.rows.size
                ref[pl.ds(0, size)] = ref[pl.ds(self.partial_sums_start, size)] + value if n else value

    def multiply_leading_k_first(self, tiles: Sequence[OutputTile], row: Any, num_rows: int) -> None:
        """Multiply the leading part of the contraction of all rows, in the first columns, then the rest."""
        sizes, (partial_sums,) = self.sizes, self.scratch.partial_sums
        all_rows = pl.ds(hint_multiple_of(row, sizes.block_m_sub), num_rows)
        leading = ContractionSlice(0, pl.ds(0, sizes.leading_k))
        partial_sums[pl.ds(0, num_rows)] = self.dot_block(all_rows, tiles[0].columns, leading)
        tiles_in_column = -(-num_rows // sizes.mxu_m)
        for tile in tiles[tiles_in_column:]:
            self.apply_epilogue(tile, self.products(tile._replace(partial_sums=None)))
        trailing = ContractionSlice(0, pl.ds(sizes.leading_k, sizes.block_k - sizes.leading_k))
        for r, tile in zip(range(0, num_rows, sizes.mxu_m), tiles[:tiles_in_column], strict=True):
            value = self.dot_block(tile.rows, tile.columns, trailing)
            self.apply_epilogue(tile, [partial_sums[pl.ds(self.opaque_zero + r, tile.rows.size)] + value])

    def accumulate(self, tiles: Sequence[OutputTile]) -> None:
        """Add this step's products to the sums; the last step applies the epilogue."""
        for tile in tiles:
            for ref, value in zip(self.scratch.acc, self.products(tile._replace(partial_sums=None)), strict=True):
                ref[tile.rows, tile.columns] += value

        @pl.when(self.is_last_k)
        def apply_epilogues() -> None:
            for tile in tiles:
                self.apply_epilogue(tile, [ref[tile.rows, tile.columns] for ref in self.scratch.acc])

    def products(self, tile: OutputTile) -> list[Array]:
        """Return this step's products; with partial sums, these plus the last term."""
        if tile.partial_sums is not None:
            partial_sums = tile.partial_sums[pl.ds(self.partial_sums_start, tile.rows.size)]
            return [partial_sums + self.partial_product(tile, self.terms[-1])]
        values = [self.partial_product(tile, term) for term in self.terms]
        return [functools.reduce(jnp.add, values)] if self.config.sum_products else values

    def partial_product(self, tile: OutputTile, term: Sequence[ContractionSlice]) -> Array:
        """Return the sum of one term's products."""
        return functools.reduce(jnp.add, [self.dot_block(tile.rows, tile.columns, part) for part in term])

    def dot_block(self, rows: Any, columns: Any, part: ContractionSlice) -> Array:
        """Return the product of some rows and columns over a part of the contraction, float32."""
        transposed, block_k, xs = self.config.transposed, self.sizes.block_k, self.inputs.xs
        x = xs[part.operand if len(xs) > 1 else 0][rows, part.k]
        w = self.inputs.ws[part.operand][(0, columns, part.k) if transposed else (0, part.k, columns)]
        if self.config.K % block_k:
            end = self.config.K - self.k * block_k - (part.k.start or 0)
            x = mask_to_zero(x, index_lt(end, x.shape, 1))
            w = mask_to_zero(w, index_lt(end, w.shape, 1 if transposed else 0))
        return dot_f32(x, w, (1, 1 if transposed else 0))

    # --- outputs --------------------------------------------------------------------------------------------------

    def apply_epilogue(self, tile: OutputTile, values: Sequence[Array]) -> None:
        """Apply the epilogue to the sums of one tile and write its outputs."""
        if self.config.epilogue is not None:
            values = [*values, *(ref[tile.rows, tile.columns] for ref in self.inputs.matrices)]
            if self.masks_columns:
                end = self.config.J - self.j * self.sizes.block_n - tile.column_start
                values = [mask_to_zero(value, index_lt(end, value.shape, 1)) for value in values]
            weights = (tile_lanes(ref[tile.rows], tile.columns.size) for ref in self.scratch.lanes)
            vectors = (ref[0, :, tile.columns] for ref in self.inputs.group_vectors)
            values = self.config.epilogue(*values, *weights, *vectors)
        self.write_outputs(tile, values)

    @property
    def masks_columns(self) -> bool:
        """Whether a block reaches past the last column, whose padding must not enter a sum over columns."""
        return self.config.J % self.sizes.block_n != 0 and "row_sum" in self.config.out_kinds

    def write_outputs(self, tile: OutputTile, values: Sequence[Array]) -> None:
        """Write the outputs of one tile; row sums add up over the tiles of a row."""
        for ref, kind, value in zip(self.outs, self.config.out_kinds, values, strict=True):
            index = (tile.rows, tile.columns) if kind == "matrix" else (0, slice(None), tile.rows)
            if kind == "row_sum":
                previous, value = ref[index], row_sums(value)
                value = mask_to_zero(previous, jnp.asarray(tile.column_start) > 0) + value
                value = jnp.where(self.task.row_mask(value.shape, 1, tile.row_start), value, previous)
            ref[index] = value.astype(ref.dtype)
