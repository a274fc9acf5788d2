"""What the kernels of a mixture do with their products, in float32; `vjp.py` has the formulas."""

import jax
import jax.numpy as jnp

Array = jax.Array


def swiglu(g: Array, u: Array) -> Array:
    """h [n, F]."""
    return g * jax.nn.sigmoid(g) * u


def swiglu_bwd(s: Array, g: Array, u: Array, p: Array) -> tuple[Array, Array, Array, Array]:
    """dg, du, p h and s h, which is dp before its sum; s, g, u [n, F], p [n, 1] or as wide."""
    g, u = g.astype(jnp.float32), u.astype(jnp.float32)
    open_ = jax.nn.sigmoid(g)
    silu = g * open_
    h, ps = silu * u, p * s
    return ps * u * open_ * (1 + g - silu), ps * silu, p * h, s * h
