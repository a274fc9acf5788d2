"""Cached decoding in plain XLA: a scatter into the ring, then one masked attention over its slots.

The order of the slots does not matter to a softmax, so the ring is never unrolled: slot c holds the token of age
(length - c) mod C, and a slot is visible when that age is inside min(length + 1, C, window).

Traffic   reads all C slots, whatever the length; writes one slot. The scatter is in place when the cache is donated.
"""

import jax
import jax.numpy as jnp

from kernels.decode.cache import KVCache

Array = jax.Array


def decode_attention(
    q: Array,
    k: Array,
    v: Array,
    cache: KVCache,
    *,
    gate: Array | None,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> tuple[Array, KVCache]:
    """See `kernels.decode_attention`; arguments are checked there."""
    B, H, D = q.shape
    K, C = cache.k.shape[1:3]
    row, slot = jnp.arange(B), cache.length % C
    keys = cache.k.at[row, :, slot].set(k.astype(cache.k.dtype), unique_indices=True)
    values = cache.v.at[row, :, slot].set(v.astype(cache.v.dtype), unique_indices=True)

    age = (cache.length[:, None] - jnp.arange(C)[None]) % C  # [B, C]
    limit = C if window is None else min(C, window)
    seen = (age < jnp.minimum(cache.length[:, None] + 1, limit))[:, None]  # [B, 1, C]

    scores = jnp.einsum(
        "BKGD,BKCD->BKGC",
        q.reshape(B, K, H // K, D),
        keys.astype(q.dtype),
        preferred_element_type=jnp.float32,
    )
    scores = scores * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(seen[:, :, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1)  # never empty: the new token sees itself
    # Slots past the length may hold anything, NaN included, and 0 * NaN is NaN.
    values_seen = jnp.where(seen[..., None], values, 0).astype(q.dtype)
    o = jnp.einsum("BKGC,BKCD->BKGD", weights.astype(q.dtype), values_seen, preferred_element_type=jnp.float32).reshape(
        B, H, D
    )
    if gate is not None:
        o = o * jax.nn.sigmoid(gate.astype(jnp.float32))
    return o.astype(q.dtype), KVCache(keys, values, cache.length + 1)
