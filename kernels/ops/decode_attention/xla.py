"""Decode attention in plain XLA: a write into the ring buffer, then one masked attention over its slots.

A softmax does not depend on the order of its terms, so the slots are never put in order: slot c holds the token of age
(length - c) mod C and is visible if that age is less than min(length + 1, C, window).

Traffic   reads all C slots for any length; writes one slot. The write is in place if the cache is donated.
"""

import jax
import jax.numpy as jnp

from dantinox.kernels.ops.decode_attention.kv_cache import KVCache, append_token

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
    """See `dantinox.kernels.decode_attention`, which checks the arguments."""
    B, H, D = q.shape
    K, C = cache.k.shape[1:3]
    new_cache = append_token(cache, k, v)

    age = (cache.length[:, None] - jnp.arange(C)[None]) % C  # [B, C]
    max_visible = C if window is None else min(C, window)
    visible = (age < jnp.minimum(cache.length[:, None] + 1, max_visible))[:, None]  # [B, 1, C]

    scores = jnp.einsum(
        "BKGD,BKCD->BKGC",
        q.reshape(B, K, H // K, D),
        new_cache.k.astype(q.dtype),
        preferred_element_type=jnp.float32,
    )
    if new_cache.k_scale is not None:
        scores = scores * new_cache.k_scale[:, :, None]
    scores = scores * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(visible[:, :, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1)  # never empty: the new token attends to itself
    # Slots past the length may hold anything, NaN included, and 0 * NaN is NaN.
    if new_cache.v_scale is not None:
        weights = weights * jnp.where(visible, new_cache.v_scale, 0)[:, :, None]
    visible_v = jnp.where(visible[..., None], new_cache.v, 0).astype(q.dtype)
    o = jnp.einsum("BKGC,BKCD->BKGD", weights.astype(q.dtype), visible_v, preferred_element_type=jnp.float32)
    o = o.reshape(B, H, D)
    if gate is not None:
        o = o * jax.nn.sigmoid(gate.astype(jnp.float32))
    return o.astype(q.dtype), new_cache
