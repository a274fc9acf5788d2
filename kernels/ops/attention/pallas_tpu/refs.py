"""How the attention kernels read and write subtiles: three kinds of references with one interface.

A compiled kernel has a `BlockRef` per argument. An interpreted one reads its inputs from whole arrays (`UnblockedRef`)
and keeps what passes from one phase to the next as a value (`PhaseValues`), which costs XLA fewer copies.
"""

import math
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

Array = jax.Array


class SubtileRef(Protocol):
    """What a kernel may do with a reference; with several heads per step, subtiles have a leading axis of heads."""

    def load(self, *subtile: Any) -> Array:
        """Returns the subtile [rows, columns] at these indices."""

    def store(self, value: Array, *subtile: Any) -> None:
        """Writes a subtile, in the reference's dtype."""


class BlockRef:
    """A block or scratch memory [heads, subtiles..., rows, columns]."""

    def __init__(self, ref: Any, kv_heads: int) -> None:
        self.ref = ref
        self.heads = 0 if kv_heads == 1 else slice(None)

    @property
    def subtile_size(self) -> int:
        """Elements of a subtile."""
        return math.prod(self.ref.shape[-2:])

    def load(self, *subtile: Any) -> Array:
        return self.ref[self.heads, *subtile]

    def store(self, value: Array, *subtile: Any) -> None:
        self.ref[self.heads, *subtile] = value.astype(self.ref.dtype)

    def fill(self, value: float) -> None:
        """Writes one value everywhere."""
        self.ref[...] = jnp.full(self.ref.shape, value, self.ref.dtype)


class UnblockedRef:
    """A whole input [heads, subtiles, rows, columns], from which the step's own block is read.

    Args:
        ref: the array's reference.
        follows: the axis of the score matrix whose block index selects the block.
        kv_axis: the axis of a subtile that holds keys; consecutive key blocks are concatenated along it.
        kv_heads: heads per step.
        head_step: index of the step's group of heads.
        block: index of the step's query or key block, as `follows` says.
        num_subtiles: subtiles per block.
        kv_blocks_per_step: key blocks that the step processes as one.
    """

    def __init__(
        self,
        ref: Any,
        follows: Literal["q", "kv"],
        kv_axis: int,
        *,
        kv_heads: int,
        head_step: Array,
        block: Array,
        num_subtiles: int,
        kv_blocks_per_step: int,
    ) -> None:
        self.ref, self.follows, self.kv_axis = ref, follows, kv_axis
        self.kv_heads, self.head_step, self.block = kv_heads, head_step, block
        self.num_subtiles, self.kv_blocks_per_step = num_subtiles, kv_blocks_per_step

    def load(self, *subtile: Any) -> Array:
        if self.follows == "q":
            return self._load_from(self.block * self.num_subtiles, *subtile)
        blocks = [self._load_from(self.block * self.num_subtiles + n, *subtile) for n in range(self.kv_blocks_per_step)]
        return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, self.kv_axis)

    def _load_from(self, start: Array, subtile: Any) -> Array:
        heads = self.head_step if self.kv_heads == 1 else pl.ds(self.head_step * self.kv_heads, self.kv_heads)
        return self.ref[heads, start + subtile]

    def store(self, value: Array, *subtile: Any) -> None:
        raise TypeError("an input is read-only")


class PhaseValues:
    """Subtiles that pass from one phase to the next as values, without memory of their own."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype
        self.values: dict[tuple[Any, ...], Array] = {}

    def load(self, *subtile: Any) -> Array:
        return self.values[subtile]

    def store(self, value: Array, *subtile: Any) -> None:
        self.values[subtile] = value.astype(self.dtype)
