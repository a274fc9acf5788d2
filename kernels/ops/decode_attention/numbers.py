"""Factors arranged so that intermediates fit their dtype wherever the result does; shared by all implementations."""

import math

import jax
import jax.numpy as jnp

Array = jax.Array


def split_scale(q: Array, scale: float) -> tuple[Array, float]:
    """Return q times a power of two, exact, and the rest of the scale, which is positive or 0.

    A scale below 1 thereby shrinks q, so that q k^T overflows only if the scores do. Products of float16 fit float32
    in any case, but a shrunk q might not fit float16.
    """
    power, rest = 1.0, abs(scale)
    if 0 < rest < 1 and q.dtype != jnp.float16:
        mantissa, exponent = math.frexp(rest)
        power, rest = 2.0 ** (exponent - 1), 2 * mantissa
    power = math.copysign(power, scale)
    return (q if power == 1 else q * jnp.asarray(power, q.dtype)), rest


def narrow_weights(weights: Array, dtype: jnp.dtype) -> tuple[Array, Array | None]:
    """Convert softmax weights [..., slots] to `dtype` -> (weights, factor [..., 1] on what they weigh, or None).

    The smallest number of float16 is 6e-8, which weights of long caches fall below, as do weights that are multiplied
    by the scales of an 8-bit cache. So the largest weight of a query becomes 1.
    """
    if dtype != jnp.float16:
        return weights.astype(dtype), None
    peak = jax.lax.stop_gradient(jnp.max(weights, axis=-1, keepdims=True))
    peak = jnp.where(peak > 0, peak, 1)
    return (weights / peak).astype(dtype), peak
