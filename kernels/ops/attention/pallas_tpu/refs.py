"""References to blocks of the TPU attention kernels, read and written by subtile."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

Array = jax.Array
ROWS_PER_PIECE = 128  # of a transpose: more of them spill, where other operations follow


class BlockRef:
    """A block or scratch memory [1, subtiles..., rows, columns] of one head."""

    def __init__(self, ref: Any) -> None:
        self.ref = ref

    @property
    def subtile_size(self) -> int:
        """Number of elements of a subtile."""
        return math.prod(self.ref.shape[-2:])

    def load(self, *subtile: Any) -> Array:
        """Return the subtile [rows, columns] at these indices."""
        return self.ref[0, *subtile]

    def store(self, value: Array, *subtile: Any) -> None:
        """Write a subtile, in the reference's dtype."""
        self.ref[0, *subtile] = value.astype(self.ref.dtype)

    def fill(self, value: float) -> None:
        """Write one value everywhere."""
        self.ref[...] = jnp.full(self.ref.shape, value, self.ref.dtype)

    def store_transposed(self, value: Array, *subtile: Any) -> None:
        """Write the transpose of a subtile, which is taken in the reference's dtype."""
        self.store(value.astype(self.ref.dtype).T, *subtile)


class QueriesRef(BlockRef):
    """A block [1, G, block_q, D] of queries; its subtiles are [rows, D], and may be read and written in pieces.

    Args:
        ref: the reference.
        rows: packed queries per subtile.
    """

    def __init__(self, ref: Any, rows: int) -> None:
        super().__init__(ref)
        block_q = ref.shape[2]
        self.q_parts, self.heads, self.q = max(1, block_q // rows), max(1, rows // block_q), min(block_q, rows)
        self.rows_per_piece = math.gcd(self.q, ROWS_PER_PIECE)

    def load(self, *subtile: Any) -> Array:
        """Return the subtile, or a piece of it, at the index (subtile,) or (subtile, piece)."""
        x = self.ref[self._index(*subtile)]
        return x.reshape(-1, x.shape[-1])

    def store(self, value: Array, *subtile: Any) -> None:
        """Write a subtile or a piece of it, in the reference's dtype."""
        index = self._index(*subtile)
        shape = (index[1].size, index[2].size, value.shape[-1])
        self.ref[index] = value.reshape(shape).astype(self.ref.dtype)

    def _index(self, r: int, piece: int | None = None) -> tuple[Any, ...]:
        (head_group, q_part), head, heads, start, q = divmod(r, self.q_parts), 0, self.heads, 0, self.q
        if piece is not None:
            head, n = divmod(piece, self.q // self.rows_per_piece)
            heads, start, q = 1, n * self.rows_per_piece, self.rows_per_piece
        return 0, pl.ds(head_group * self.heads + head, heads), pl.ds(q_part * self.q + start, q)
