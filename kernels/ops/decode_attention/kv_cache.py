"""The KV cache: one ring buffer of slots per sequence, in the model's dtype or in 8 bits with one scale per vector.

stored vector    k[b, k, c] = 12 -127 3 ...      int8 or float8_e4m3fn
its scale        k_scale[b, k, c]                their product is the cached vector
"""

import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int, Shaped

from dantinox.kernels import integers

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


def write_slots(ring_buffer: Array, x: Array, slots: Array) -> Array:
    """Write x [B, T, K, ...] into ring_buffer [B, K, C, ...] at slots [B, T], which differ within a sequence."""
    sequence = jnp.arange(ring_buffer.shape[0], dtype=slots.dtype)[:, None]
    return ring_buffer.at[sequence, :, slots].set(x.astype(ring_buffer.dtype), unique_indices=True)


def append_token(cache: KVCache, k: Array, v: Array) -> KVCache:
    """Write one token per sequence, k and v [B, K, D], to slot length % C and increment the length.

    The kernels of TPUs and of Hopper write the token themselves, to the same slot.
    """
    slot = cache.length % cache.k.shape[2]
    return _append(cache, k, v, slot, write_slot)._replace(length=cache.length + 1)


def append_tokens(cache: KVCache, k: Array, v: Array) -> KVCache:
    """Write T tokens per sequence, k and v [B, T, K, D], to slots (length + t) % C and add T to the length."""
    T, C = k.shape[1], cache.k.shape[2]
    slots = (cache.length[:, None] % C + jnp.arange(T, dtype=cache.length.dtype)[None]) % C
    return _append(cache, k, v, slots, write_slots)._replace(length=cache.length + T)


def _append(cache: KVCache, k: Array, v: Array, slots: Array, write: Callable[[Array, Array, Array], Array]) -> KVCache:
    """Return the cache with k and v written to `slots`, and its old length."""
    new_values = [*quantize(k, cache.k.dtype), *quantize(v, cache.v.dtype)]
    ring_buffers = (cache.k, cache.k_scale, cache.v, cache.v_scale)
    # The barrier makes XLA write the new cache once; without it XLA writes it once per consumer.
    k, k_scale, v, v_scale = jax.lax.optimization_barrier(
        tuple(
            x if x is None else write(ring_buffer, x, slots)
            for ring_buffer, x in zip(ring_buffers, new_values, strict=True)
        )
    )
    return KVCache(k, v, cache.length, k_scale, v_scale)


def rewind(cache: KVCache, n: int | Array) -> KVCache:
    """Take back the last n tokens of each sequence, such as those that speculative decoding rejects.

    Only the length changes, so this costs nothing; the next tokens overwrite those that were taken back. A ring buffer
    that has wrapped has lost the tokens that the rewound ones overwrote: after T tokens were appended and up to T taken
    back, a query with a window still finds all that it sees if C >= window + T - 1.

    Args:
        cache: `KVCache` of B sequences.
        n: tokens to take back, 0 <= n <= length: an integer, or [B] integers. Under `jit`, where values cannot be
            checked, n is clamped to this range.

    Returns:
        The cache with length - n.

    Raises:
        ValueError: n is not an array of integers, has another shape, or has a value out of range outside `jit`.
    """
    length = integers.as_integers("cache.length", cache.length, "B")
    counts: Any = n
    if isinstance(n, numbers.Integral | np.ndarray | jax.Array) and np.ndim(n) == 0:
        counts = jnp.broadcast_to(n, length.shape) if isinstance(n, jax.Array) else np.full(length.shape, n)
    counts = integers.as_integers("n", counts, "B")
    if counts.shape != length.shape:
        raise ValueError(f"n has shape {counts.shape}; allowed: an integer, or {length.shape} as cache.length has")
    values, lengths = integers.concrete_value(counts), integers.concrete_value(length)
    if values is not None and lengths is not None:
        for taken, held in zip(values.tolist(), lengths.tolist(), strict=True):
            if not 0 <= taken <= held:
                raise ValueError(f"n is {taken} for a sequence of {held} tokens; allowed: 0 to {held}")
    length = jnp.asarray(length)
    taken = jnp.maximum(integers.saturate_int32(counts), 0).astype(length.dtype)
    return cache._replace(length=length - jnp.minimum(taken, length))
