"""The KV cache: one ring buffer of slots per sequence, in the model's dtype or in 8 bits with one scale per vector.

stored vector    k[b, k, c] = 12 -127 3 ...      int8 or float8_e4m3fn
its scale        k_scale[b, k, c]                their product is the cached vector
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float32, Int, Shaped

Array = jax.Array
QMAX = {jnp.dtype(jnp.int8): 127.0, jnp.dtype(jnp.float8_e4m3fn): 448.0}
"""The 8-bit dtypes of a cache and the largest value of each."""


class KVCache(NamedTuple):
    """A ring buffer of C slots per sequence: the token at position p is in slot p % C.

    Attributes:
        k: keys [B, K, C, D].
        v: values [B, K, C, D].
        length: tokens appended so far, [B] int32; it keeps counting past C.
        k_scale, v_scale: scale of each vector, [B, K, C] float32, if k and v are int8 or float8_e4m3fn; otherwise
            None.
    """

    k: Shaped[Array, "B K C D"]
    v: Shaped[Array, "B K C D"]
    length: Int[Array, "B"]
    k_scale: Float32[Array, "B K C"] | None = None
    v_scale: Float32[Array, "B K C"] | None = None

    @classmethod
    def zeros(cls, batch: int, kv_heads: int, slots: int, head_dim: int, dtype: jnp.dtype) -> "KVCache":
        """Return an empty cache of `slots` slots (C) per sequence."""
        shape = (batch, kv_heads, slots, head_dim)

        def zero_scale() -> Array | None:
            return jnp.zeros(shape[:3], jnp.float32) if jnp.dtype(dtype) in QMAX else None

        length = jnp.zeros((batch,), jnp.int32)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), length, zero_scale(), zero_scale())


def quantize(x: Array, dtype: jnp.dtype) -> tuple[Array, Array | None]:
    """Convert vectors [..., D] to a cache's dtype.

    Returns:
        (values [..., D] of `dtype`, scales [...] float32, or None if `dtype` is not an 8-bit dtype).
    """
    if (qmax := QMAX.get(jnp.dtype(dtype))) is None:
        return x.astype(dtype), None
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / qmax
    # The hardware may flush subnormal scales to zero, so such vectors are stored as zeros.
    scale = jnp.where(scale < jnp.finfo(jnp.float32).tiny, 0, scale)
    scaled = x / jnp.where(scale == 0, 1, scale)[..., None]
    if jnp.dtype(dtype) == jnp.int8:
        scaled = jnp.round(scaled)
    return jnp.clip(scaled, -qmax, qmax).astype(dtype), scale


def dequantize(x: Array, scale: Array | None, dtype: jnp.dtype) -> Array:
    """Convert the results of `quantize` back to vectors [..., D] of `dtype`."""
    if scale is None:
        return x.astype(dtype)
    return (x.astype(jnp.float32) * scale[..., None]).astype(dtype)


MAX_UNROLLED_BATCH = 8  # sequences written one by one; larger batches use a scatter


def write_slot(ring_buffer: Array, x: Array, slot: Array) -> Array:
    """Write x [B, K, ...] into ring_buffer [B, K, C, ...] at slot [B]."""
    B, x = ring_buffer.shape[0], x.astype(ring_buffer.dtype)
    if not isinstance(B, int) or B > MAX_UNROLLED_BATCH:  # a symbolic B is compared with nothing
        return ring_buffer.at[jnp.arange(B, dtype=slot.dtype), :, slot].set(x, unique_indices=True)
    zero = slot.dtype.type(0)
    for b in range(B):
        start = (slot.dtype.type(b), zero, slot[b], *(zero,) * (ring_buffer.ndim - 3))
        ring_buffer = jax.lax.dynamic_update_slice(ring_buffer, x[b][None, :, None], start)
    return ring_buffer


def append_token(cache: KVCache, k: Array, v: Array) -> KVCache:
    """Write one token per sequence, k and v [B, K, D], to slot length % C and increment the length.

    The kernels of TPUs and of Hopper write the token themselves, to the same slot.
    """
    slot = cache.length % cache.k.shape[2]
    new_values = [*quantize(k, cache.k.dtype), *quantize(v, cache.v.dtype)]
    ring_buffers = (cache.k, cache.k_scale, cache.v, cache.v_scale)
    # The barrier makes XLA write the new cache once; without it XLA writes it once per consumer.
    k, k_scale, v, v_scale = jax.lax.optimization_barrier(
        tuple(
            x if x is None else write_slot(ring_buffer, x, slot)
            for ring_buffer, x in zip(ring_buffers, new_values, strict=True)
        )
    )
    return KVCache(k, v, cache.length + 1, k_scale, v_scale)
