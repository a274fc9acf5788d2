"""The key/value cache: one ring of slots a sequence."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class KVCache(NamedTuple):
    """A ring of C slots a sequence: the token at position p lies in slot p % C.

    Attributes:
        k: keys [B, K, C, D].
        v: values [B, K, C, D].
        length: tokens appended so far, [B] int32; it goes on counting past C.
    """

    k: jax.Array
    v: jax.Array
    length: jax.Array

    @classmethod
    def zeros(cls, batch: int, kv_heads: int, slots: int, head_dim: int, dtype: jnp.dtype) -> "KVCache":
        """An empty cache of `slots` slots C."""
        shape = (batch, kv_heads, slots, head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((batch,), jnp.int32))
