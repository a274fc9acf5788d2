"""One decoding step as the formula says: append to the ring, read the ring in order, attend."""

from typing import Any

import jax
import jax.numpy as jnp

from dantinox.reference.attention import attention

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
        cache: a named tuple (k [B, K, C, D], v [B, K, C, D], length [B] int32), such as `dantinox.kernels.KVCache`: a
            ring of
            C slots a sequence, the token at position p in slot p % C; length counts all tokens ever appended. Where k
            and v are int8 or float8_e4m3fn it has k_scale and v_scale too, [B, K, C] float32: a slot's vector is what
            is stored times its scale, the largest number of the dtype standing for the largest of the vector.

    Returns:
        (o [B, H, D], the cache with length + 1).
    """
    B, _, C, _ = cache.k.shape
    length = cache.length
    slot = jnp.arange(C)[None] == (length % C)[:, None]  # [B, C]
    new, rings = {}, []
    for name, x in (("k", k), ("v", v)):
        ring, factors = getattr(cache, name), getattr(cache, f"{name}_scale", None)
        if factors is None:
            new[name] = jnp.where(slot[:, None, :, None], x[:, :, None].astype(ring.dtype), ring)
            rings.append(new[name])
        else:
            numbers, factor = _eight_bits(x, ring.dtype)
            new[name] = jnp.where(slot[:, None, :, None], numbers[:, :, None], ring)
            new[f"{name}_scale"] = jnp.where(slot[:, None], factor[:, :, None], factors)
            rings.append(new[name].astype(jnp.float32) * new[f"{name}_scale"][..., None])

    # Put the ring in order: entry C - 1 is the newest token, entry C - 1 - a the token of age a.
    age = jnp.arange(C - 1, -1, -1)[None]  # [1, C]
    order = (length[:, None] - age) % C  # [B, C] slot of each age
    in_order = [jnp.take_along_axis(x, order[:, None, :, None], axis=2).swapaxes(1, 2) for x in rings]
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
    return o[:, 0], cache._replace(**new, length=length + 1)


def _eight_bits(x: Array, dtype: jnp.dtype) -> tuple[Array, Array]:
    """Vectors [..., D] as (numbers of `dtype`, their scale [...] float32)."""
    largest = 127.0 if dtype == jnp.int8 else float(jnp.finfo(dtype).max)
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / largest
    scale = jnp.where(scale < jnp.finfo(jnp.float32).tiny, 0, scale)
    numbers = jnp.where(scale[..., None] > 0, x / scale[..., None], 0)
    numbers = jnp.clip(jnp.round(numbers) if dtype == jnp.int8 else numbers, -largest, largest)
    return numbers.astype(dtype), scale
