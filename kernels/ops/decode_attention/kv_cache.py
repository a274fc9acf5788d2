"""The key/value cache: one ring of slots a sequence, in the dtype of the model or in 8 bits with a scale a slot.

a stored vector    k[b, k, c] = 12 -127 3 ...      int8, or float8_e4m3fn
its scale          k_scale[b, k, c]                what the vector holds is their product
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
QMAX = {jnp.dtype(jnp.int8): 127.0, jnp.dtype(jnp.float8_e4m3fn): 448.0}
"""The 8-bit dtypes of a ring, and the largest number of each."""


class KVCache(NamedTuple):
    """A ring of C slots a sequence: the token at position p lies in slot p % C.

    Attributes:
        k: keys [B, K, C, D].
        v: values [B, K, C, D].
        length: tokens appended so far, [B] int32; it goes on counting past C.
        k_scale, v_scale: where k and v are int8 or float8_e4m3fn, the factor of each vector, [B, K, C] float32;
            None where they are not.
    """

    k: Array
    v: Array
    length: Array
    k_scale: Array | None = None
    v_scale: Array | None = None

    @classmethod
    def zeros(cls, batch: int, kv_heads: int, slots: int, head_dim: int, dtype: jnp.dtype) -> "KVCache":
        """An empty cache of `slots` slots C."""
        shape = (batch, kv_heads, slots, head_dim)
        scale = lambda: jnp.zeros(shape[:3], jnp.float32) if jnp.dtype(dtype) in QMAX else None
        length = jnp.zeros((batch,), jnp.int32)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), length, scale(), scale())


def quantize(x: Array, dtype: jnp.dtype) -> tuple[Array, Array | None]:
    """Vectors [..., D] as a ring of `dtype` holds them: (numbers [..., D], factors [...] float32 or None)."""
    if (largest := QMAX.get(jnp.dtype(dtype))) is None:
        return x.astype(dtype), None
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / largest
    # Factors below the normal numbers may be flushed to 0: such a vector is one of zeros, here already.
    scale = jnp.where(scale < jnp.finfo(jnp.float32).tiny, 0, scale)
    fraction = x / jnp.where(scale == 0, 1, scale)[..., None]
    if jnp.dtype(dtype) == jnp.int8:
        fraction = jnp.round(fraction)
    return jnp.clip(fraction, -largest, largest).astype(dtype), scale


def dequantize(x: Array, scale: Array | None, dtype: jnp.dtype) -> Array:
    """What `stored` vectors hold, [..., D] in `dtype`."""
    if scale is None:
        return x.astype(dtype)
    return (x.astype(jnp.float32) * scale[..., None]).astype(dtype)


UNROLL = 8  # sequences written one by one; more of them by a scatter


def put(ring: Array, x: Array, slot: Array) -> Array:
    """x [B, K, ...] into ring [B, K, C, ...] at slot [B]."""
    B, x = ring.shape[0], x.astype(ring.dtype)
    if B > UNROLL:
        return ring.at[jnp.arange(B), :, slot].set(x, unique_indices=True)
    for b in range(B):
        ring = jax.lax.dynamic_update_slice(ring, x[b][None, :, None], (b, 0, slot[b], *(0,) * (ring.ndim - 3)))
    return ring


def append(cache: KVCache, k: Array, v: Array) -> KVCache:
    """One token a sequence, k and v [B, K, D], at slot length % C; length goes up by one."""
    slot = cache.length % cache.k.shape[2]
    new = [*quantize(k, cache.k.dtype), *quantize(v, cache.v.dtype)]
    # Behind the barrier the new cache has one maker; without it XLA writes it once for each of its readers.
    k, k_scale, v, v_scale = jax.lax.optimization_barrier(
        tuple(
            x if x is None else put(ring, x, slot)
            for ring, x in zip((cache.k, cache.k_scale, cache.v, cache.v_scale), new, strict=True)
        )
    )
    return KVCache(k, v, cache.length + 1, k_scale, v_scale)
