"""The soft cap on attention scores, cap(s) = softcap * tanh(s / softcap), for caps over float32's whole range.

Float32 arithmetic flushes subnormal numbers to zero, so that `scale / softcap`, `1 / softcap` or a capped score can
vanish. These identities, exact to float32's rounding, avoid it:
    cap(s) = s                             where |s| < 2^-12 softcap
    exp(cap(s)) = exp(c tanh(s / softcap)), c = max(softcap, 2^-64): every weight is 1 below it
XLA multiplies consecutive constant factors, whose product can overflow or vanish too; a selection keeps them apart.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

MAX_SIMPLE_SOFTCAP = 2.0**40  # from here on, the scores that matter can be far below the cap
SIMPLE_RATIOS = 2.0**-80, float(np.finfo(np.float32).max)  # of scale / softcap
MIN_CAPPED_SCORE = 2.0**-64
LINEAR = 2.0**-12  # |s / softcap| below which cap(s) rounds to s
SHRINK = 2.0**-4  # of the largest caps, so that their inverses are normal


def cap_scores(qk: Array, *, scale: float, softcap: float, unit: float = 1.0) -> Array:
    """Return unit * cap(scale * qk) in qk's dtype, float32 or float64.

    Args:
        qk: products of queries and keys, of any shape.
        scale: factor on the products, 0 or normal in float32.
        softcap: bound of the scores, normal in float32.
        unit: factor on the scores, such as log2(e).
    """
    bound, ratio = max(softcap, MIN_CAPPED_SCORE), abs(scale) / softcap
    is_simple = softcap < MAX_SIMPLE_SOFTCAP and (ratio == 0 or SIMPLE_RATIOS[0] <= ratio <= SIMPLE_RATIOS[1])
    if is_simple or qk.dtype == jnp.float64:
        return jnp.tanh(qk * (scale / softcap)) * (bound * unit)
    s, shrink = qk * scale, SHRINK if softcap > 2**100 else 1.0
    is_linear = jnp.abs(s) < softcap * LINEAR
    t = jnp.tanh(jnp.where(is_linear, 0, s * shrink) * (1 / (softcap * shrink)))
    return jnp.where(is_linear, s, t * bound) * unit


def cap_derivative(capped: Array, *, softcap: float, unit: float = 1.0) -> Array:
    """Return 1 - tanh(s / softcap)^2 from the result of `cap_scores`; 0 for masked scores, below -softcap."""
    bound = max(softcap, MIN_CAPPED_SCORE) * unit
    if bound < MAX_SIMPLE_SOFTCAP:
        t = capped * (1 / bound)
        return 1 - jnp.minimum(t * t, 1)
    limit = bound * SHRINK
    t = jnp.clip(capped * SHRINK, -limit, limit) * (1 / limit)
    return 1 - t * t


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def soft_cap(s: Array, softcap: float) -> Array:
    """Return cap(s) in s's dtype, float32 or float64, with derivatives of any order."""
    return cap_scores(s, scale=1.0, softcap=softcap)


@soft_cap.defjvp
def _soft_cap_jvp(softcap: float, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    # The chain rule of its parts, softcap * (1 - t^2) / softcap, can overflow or vanish in between.
    capped = soft_cap(*primals, softcap)
    return capped, tangents[0] * cap_derivative(capped, softcap=softcap)
