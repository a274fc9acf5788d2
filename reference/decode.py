"""The specification of a decode step: append to the ring buffer, read it in order, attend."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from dantinox.reference.attention import attention

Array = jax.Array


def decode_attention(
    q: Float[Array, "B *T H D"],
    k: Float[Array, "B *T K D"],
    v: Float[Array, "B *T K D"],
    cache: Any,
    *,
    gate: Float[Array, "B *T H #D"] | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Float[Array, "H"] | None = None,
) -> tuple[Float[Array, "B *T H D"], Any]:
    """Append T tokens per sequence at slots (length + t) % C; query t sees the last min(length + t + 1, C, window).

    A query sees only tokens that are still in the ring buffer: none at a position of length + T - 1 - C or before.

    Args:
        q: queries of the new tokens [B, T, H, D], or [B, H, D] of one token.
        k: their keys [B, T, K, D] or [B, K, D]; H is a multiple of K, and T at most C.
        v: their values [B, T, K, D] or [B, K, D].
        cache: a named tuple (k [B, K, C, D], v [B, K, C, D], length [B] int32), such as `dantinox.kernels.KVCache`: a
            ring buffer of C slots per sequence, with the token of position p in slot p % C; length counts all tokens
            ever appended. If k and v are int8 or float8_e4m3fn, the cache also has k_scale and v_scale [B, K, C]
            float32: a slot's vector is the stored one times its scale, chosen so that the vector's largest magnitude
            is stored as the dtype's largest value.
        gate: logits [B, T, H, D] or [B, T, H, 1], without T if q has none, or None for no gate.
        window: number of keys that a query sees, its own included; None: all C slots.
        scale: factor on the scores; None: D**-0.5.
        softcap: caps the scores s at softcap * tanh(s / softcap); None: no cap.
        sinks: logits [H] that join the softmax of their head as one more key without a value, neither scaled nor
            capped; None: no sinks.

    Returns:
        (o in q's shape, the cache with length + T).
    """
    if q.ndim == 3:
        one = None if gate is None else gate[:, None]
        options = {"window": window, "scale": scale, "softcap": softcap, "sinks": sinks}
        o, cache = decode_attention(q[:, None], k[:, None], v[:, None], cache, gate=one, **options)
        return o[:, 0], cache

    T, C = q.shape[1], cache.k.shape[2]
    length = cache.length
    # A slot gets the new token of this index, if it is less than T.
    token = (jnp.arange(C)[None] - length[:, None]) % C  # [B, C]
    is_new, token = token < T, jnp.minimum(token, T - 1)
    new, rings = {}, []
    for name, x in (("k", k), ("v", v)):
        ring, scales = getattr(cache, name), getattr(cache, f"{name}_scale", None)
        values, new_scales = (x.astype(ring.dtype), None) if scales is None else _quantize(x, ring.dtype)
        by_slot = jnp.take_along_axis(values, token[:, :, None, None], axis=1).swapaxes(1, 2)  # [B, K, C, D]
        new[name] = jnp.where(is_new[:, None, :, None], by_slot, ring)
        if scales is None:
            rings.append(new[name])
        else:
            by_slot = jnp.take_along_axis(new_scales, token[:, :, None], axis=1).swapaxes(1, 2)  # [B, K, C]
            new[f"{name}_scale"] = jnp.where(is_new[:, None], by_slot, scales)
            rings.append(new[name].astype(jnp.float32) * new[f"{name}_scale"][..., None])

    # Read the ring buffer in order: entry C - 1 is the newest token, entry C - 1 - a the token of age a.
    age = jnp.arange(C - 1, -1, -1)[None]  # [1, C]
    order = (length[:, None] % C + T - 1 - age) % C  # [B, C] slot of each age
    keys, values = (
        jnp.take_along_axis(x, order[:, None, :, None], axis=2).swapaxes(1, 2).astype(q.dtype) for x in rings
    )
    holds_token = age - (T - 1) <= length[:, None]
    o = attention(
        q,
        keys,
        values,
        gate=gate,
        window=window,
        scale=scale,
        softcap=softcap,
        segment_ids=(jnp.ones(q.shape[:2], jnp.int32), holds_token.astype(jnp.int32)),
        sinks=sinks,
    )
    return o, cache._replace(**new, length=length + T)


def _quantize(x: Array, dtype: jnp.dtype) -> tuple[Array, Array]:
    """Quantize vectors [..., D]: returns (values of `dtype` [..., D], scales [...] float32)."""
    qmax = 127.0 if dtype == jnp.int8 else float(jnp.finfo(dtype).max)
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / qmax
    scale = jnp.where(scale < jnp.finfo(jnp.float32).tiny, 0, scale)
    values = jnp.where(scale[..., None] > 0, x / scale[..., None], 0)
    values = jnp.clip(jnp.round(values) if dtype == jnp.int8 else values, -qmax, qmax)
    return values.astype(dtype), scale
