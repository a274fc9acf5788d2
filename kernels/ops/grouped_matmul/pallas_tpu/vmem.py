"""Small operations of the TPU kernels, on values in registers and on ranges of rows and columns in VMEM."""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

Array = jax.Array


class ContractionSlice(NamedTuple):
    """A part of the contraction of one of several products."""

    operand: int
    k: Any


def index_lt(end: Any, shape: tuple[int, int], axis: int) -> Array:
    """Return a mask of the given shape: true where the index along the axis is less than `end`."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis) < end


def to_lanes(row: Array) -> Array:
    """Broadcast [1, n] to [n, 128], one value per row. The transpose unit takes whole registers."""
    return jnp.broadcast_to(row, (128, row.shape[1])).T


def tile_lanes(lanes: Array, width: int) -> Array:
    """Broadcast [n, 128], one value per row, to [n, width]."""
    return jnp.concatenate([lanes] * -(-width // 128), axis=1)[:, :width]


def row_sums(x: Array) -> Array:
    """Return the sum of each row of [n, width], as [1, n].

    Lanes become sublanes before the sum, because the transpose unit is faster than a reduction over lanes.
    """
    if x.shape[1] % 128:
        return jnp.broadcast_to(jnp.sum(x, axis=1, keepdims=True), (x.shape[0], 128)).T[:1]
    lanes = functools.reduce(jnp.add, [x[:, c : c + size] for c, size in split_range(x.shape[1], 128)])
    return jnp.sum(lanes.T, axis=0, keepdims=True)


def split_range(size: int, step: int) -> list[tuple[int, int]]:
    """Return (start, size) of consecutive parts of a range; the last may be smaller."""
    return [(start, min(step, size - start)) for start in range(0, size, step)]


def split_contraction(num_operands: int, block_k: int, block_k_sub: int) -> list[list[ContractionSlice]]:
    """Split the concatenated contractions of several products into terms of `block_k_sub`."""
    starts = sorted({*range(0, num_operands * block_k, block_k_sub), *range(0, num_operands * block_k, block_k)})
    ranges = zip(starts, [*starts[1:], num_operands * block_k], strict=True)
    terms = itertools.groupby(ranges, lambda bounds: bounds[0] // block_k_sub)
    return [
        [ContractionSlice(start // block_k, pl.ds(start % block_k, end - start)) for start, end in term]
        for _, term in terms
    ]


def hint_multiple_of(start: Any, multiple: int) -> Any:
    """Return `start` with the hint that it is a multiple, which the compiler cannot always derive."""
    return start if isinstance(start, int) or multiple % 8 else pl.multiple_of(start, multiple)


def for_each_row_chunk(num_rows: int, body: Callable[[Any, Any], None]) -> None:
    """Run body(rows, first row) over chunks of all rows in a loop: compact code for rarely executed work."""
    if num_rows % 8:  # Mosaic slices packed rows only at indices that it can prove to be aligned
        body(pl.ds(0, num_rows), 0)
        return
    size = next(size for size in (64, 32, 16, 8) if num_rows % size == 0)

    def chunk(n: Array, _: None) -> None:
        body(pl.ds(pl.multiple_of(n * size, size), size), n * size)

    jax.lax.fori_loop(0, num_rows // size, chunk, None)
