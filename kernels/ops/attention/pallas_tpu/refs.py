"""References to blocks of the TPU attention kernels, read and written by subtile."""

import math
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


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
