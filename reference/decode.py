"""One decoding step as the formula says: append to the ring, read the ring in order, attend."""

from typing import Any

import jax
import jax.numpy as jnp

from reference.attention import attention

Array = jax.Array


def decode_attention(
    q: Array,
    k: Array,
    v: Array,
    cache: Any,
    *,
    gate: Array | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[Array, Any]:
    """Append one token a sequence at slot length % C, then attend to the last min(length + 1, C, window) tokens.

    Args:
        q: [B, H, D]; k: [B, K, D]; v: [B, K, D]; gate: [B, H, D] or [B, H, 1].
        cache: a named tuple (k [B, K, C, D], v [B, K, C, D], length [B] int32), such as `kernels.KVCache`: a ring of
            C slots a sequence, the token at position p in slot p % C; length counts all tokens ever appended.

    Returns:
        (o [B, H, D], the cache with length + 1).
    """
    B, _, C, _ = cache.k.shape
    length = cache.length
    slot = jnp.arange(C)[None] == (length % C)[:, None]  # [B, C]
    new_k = jnp.where(slot[:, None, :, None], k[:, :, None].astype(cache.k.dtype), cache.k)
    new_v = jnp.where(slot[:, None, :, None], v[:, :, None].astype(cache.v.dtype), cache.v)

    # Put the ring in order: entry C - 1 is the newest token, entry C - 1 - a the token of age a.
    age = jnp.arange(C - 1, -1, -1)[None]  # [1, C]
    order = (length[:, None] - age) % C  # [B, C] slot of each age
    in_order = [jnp.take_along_axis(x, order[:, None, :, None], axis=2).swapaxes(1, 2) for x in (new_k, new_v)]
    seen = age < jnp.minimum(length[:, None] + 1, C if window is None else min(C, window))
    o = attention(
        q[:, None],
        *(x.astype(q.dtype) for x in in_order),
        gate=None if gate is None else gate[:, None],
        causal=False,
        scale=scale,
        softcap=softcap,
        segment_ids=(jnp.ones((B, 1), jnp.int32), seen.astype(jnp.int32)),
    )
    return o[:, 0], cache._replace(k=new_k, v=new_v, length=length + 1)
