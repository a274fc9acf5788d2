"""Cached decoding in plain XLA: a write into the ring, then one masked attention over its slots.

The order of the slots does not matter to a softmax, so the ring is never unrolled: slot c holds the token of age
(length - c) mod C, and a slot is visible when that age is inside min(length + 1, C, window).

Traffic   reads all C slots, whatever the length; writes one slot. The write is in place when the cache is donated.
"""

import jax
import jax.numpy as jnp

from dantinox.kernels.ops.decode_attention.kv_cache import KVCache, append

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
    """See `dantinox.kernels.decode_attention`; arguments are checked there."""
    B, H, D = q.shape
    K, C = cache.k.shape[1:3]
    after = append(cache, k, v)

    age = (cache.length[:, None] - jnp.arange(C)[None]) % C  # [B, C]
    limit = C if window is None else min(C, window)
    seen = (age < jnp.minimum(cache.length[:, None] + 1, limit))[:, None]  # [B, 1, C]

    scores = jnp.einsum(
        "BKGD,BKCD->BKGC",
        q.reshape(B, K, H // K, D),
        after.k.astype(q.dtype),
        preferred_element_type=jnp.float32,
    )
    if after.k_scale is not None:
        scores = scores * after.k_scale[:, :, None]
    scores = scores * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(seen[:, :, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1)  # never empty: the new token sees itself
    # Slots past the length may hold anything, NaN included, and 0 * NaN is NaN.
    if after.v_scale is not None:
        weights = weights * jnp.where(seen, after.v_scale, 0)[:, :, None]
    values_seen = jnp.where(seen[..., None], after.v, 0).astype(q.dtype)
    o = jnp.einsum("BKGC,BKCD->BKGD", weights.astype(q.dtype), values_seen, preferred_element_type=jnp.float32).reshape(
        B, H, D
    )
    if gate is not None:
        o = o * jax.nn.sigmoid(gate.astype(jnp.float32))
    return o.astype(q.dtype), after
