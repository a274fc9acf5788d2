"""The specification of a decode step: append to the ring buffer, read it in order, attend."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from dantinox.reference.attention import attention

Array = jax.Array


def decode_attention(
    q: Float[Array, "B H D"],
    k: Float[Array, "B K D"],
    v: Float[Array, "B K D"],
    cache: Any,
    *,
    gate: Float[Array, "B H #D"] | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[Float[Array, "B H D"], Any]:
    """Append one token per sequence at slot length % C, then attend to the last min(length + 1, C, window) tokens.

    Args:
        q: query of the new token [B, H, D].
        k: key of the new token [B, K, D]; H is a multiple of K.
        v: value of the new token [B, K, D].
        cache: a named tuple (k [B, K, C, D], v [B, K, C, D], length [B] int32), such as `dantinox.kernels.KVCache`: a
            ring buffer of C slots per sequence, with the token of position p in slot p % C; length counts all tokens
            ever appended. If k and v are int8 or float8_e4m3fn, the cache also has k_scale and v_scale [B, K, C]
            float32: a slot's vector is the stored one times its scale, chosen so that the vector's largest magnitude
            is stored as the dtype's largest value.
        gate: logits [B, H, D] or [B, H, 1], or None for no gate.
        window: number of keys that the query sees, its own included; None or more than C: all C slots.
        scale: factor on the scores; None: D**-0.5.
        softcap: caps the scores s at softcap * tanh(s / softcap); None: no cap.

    Returns:
        (o [B, H, D], the cache with length + 1).
    """
    B, _, C, _ = cache.k.shape
    length = cache.length
    slot = jnp.arange(C)[None] == (length % C)[:, None]  # [B, C]
    new, rings = {}, []
    for name, x in (("k", k), ("v", v)):
        ring, scales = getattr(cache, name), getattr(cache, f"{name}_scale", None)
        if scales is None:
            new[name] = jnp.where(slot[:, None, :, None], x[:, :, None].astype(ring.dtype), ring)
            rings.append(new[name])
        else:
            values, new_scales = _quantize(x, ring.dtype)
            new[name] = jnp.where(slot[:, None, :, None], values[:, :, None], ring)
            new[f"{name}_scale"] = jnp.where(slot[:, None], new_scales[:, :, None], scales)
            rings.append(new[name].astype(jnp.float32) * new[f"{name}_scale"][..., None])

    # Read the ring buffer in order: entry C - 1 is the newest token, entry C - 1 - a the token of age a.
    age = jnp.arange(C - 1, -1, -1)[None]  # [1, C]
    order = (length[:, None] - age) % C  # [B, C] slot of each age
    in_order = [jnp.take_along_axis(x, order[:, None, :, None], axis=2).swapaxes(1, 2) for x in rings]
    visible = age <= length[:, None]
    if window is not None:
        visible &= age < window
    o = attention(
        q[:, None],
        *(x.astype(q.dtype) for x in in_order),
        gate=None if gate is None else gate[:, None],
        causal=False,
        scale=scale,
        softcap=softcap,
        segment_ids=(jnp.ones((B, 1), jnp.int32), visible.astype(jnp.int32)),
    )
    return o[:, 0], cache._replace(**new, length=length + 1)


def _quantize(x: Array, dtype: jnp.dtype) -> tuple[Array, Array]:
    """Quantize vectors [..., D]: returns (values of `dtype` [..., D], scales [...] float32)."""
    qmax = 127.0 if dtype == jnp.int8 else float(jnp.finfo(dtype).max)
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / qmax
    scale = jnp.where(scale < jnp.finfo(jnp.float32).tiny, 0, scale)
    values = jnp.where(scale[..., None] > 0, x / scale[..., None], 0)
    values = jnp.clip(jnp.round(values) if dtype == jnp.int8 else values, -qmax, qmax)
    return values.astype(dtype), scale
