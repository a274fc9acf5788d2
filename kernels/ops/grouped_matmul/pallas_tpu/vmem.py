"""Small operations of the kernels for a TPU: on values in registers, and on where they lie."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

Array = jax.Array


def before(end: Any, shape: tuple[int, int], axis: int) -> Array:
    """Which places of the axis come before the end."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis) < end


def lanes(row: Array) -> Array:
    """[1, n] as [n, 128], the same in each lane. The transpose unit takes whole registers."""
    return jnp.broadcast_to(row, (128, row.shape[1])).T


def across(lanes: Array, width: int) -> Array:
    """[n, 128] that has the same in each lane as [n, width]."""
    return jnp.concatenate([lanes] * -(-width // 128), axis=1)[:, :width]


def total(x: Array) -> Array:
    """[1, n], the sum of each row of [n, width]: lanes become sublanes first, which the transpose unit does faster."""
    if x.shape[1] % 128:
        return jnp.broadcast_to(jnp.sum(x, axis=1, keepdims=True), (x.shape[0], 128)).T[:1]
    lanes = functools.reduce(jnp.add, [x[:, c : c + size] for c, size in pieces(x.shape[1], 128)])
    return jnp.sum(lanes.T, axis=0, keepdims=True)


def pieces(size: int, piece: int) -> list[tuple[int, int]]:
    """(first, how many) of each piece of a side; the last may be smaller."""
    return [(first, min(piece, size - first)) for first in range(0, size, piece)]


def contraction(matrices: int, inner: int, part: int) -> list[list[tuple[int, Any]]]:
    """The terms of a sum of products, each `part` of all contractions: (which matrix, where in it) of what it has."""
    starts = sorted({*range(0, matrices * inner, part), *range(0, matrices * inner, inner)})
    spans = zip(starts, [*starts[1:], matrices * inner], strict=True)
    terms = itertools.groupby(spans, lambda span: span[0] // part)
    return [[(start // inner, pl.ds(start % inner, end - start)) for start, end in term] for _, term in terms]


def aligned(first: Any, unit: int) -> Any:
    """Tells the compiler that a place is a multiple of the unit, where it is one that it cannot see."""
    return first if isinstance(first, int) or unit % 8 else pl.multiple_of(first, unit)


def loop(rows: int, body: Callable[[Any, Any], None]) -> None:
    """body(some rows, the first of them), over all: little code for what few steps do."""
    few = next(few for few in (64, 32, 16, 8, 1) if rows % few == 0)

    def part(n: Array, _: None) -> None:
        body(pl.ds(pl.multiple_of(n * few, few), few), n * few)

    jax.lax.fori_loop(0, rows // few, part, None)
