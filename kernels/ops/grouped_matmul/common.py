"""Helpers that the grouped kernels of every backend share."""

import jax
import jax.numpy as jnp

from dantinox.kernels.precision import matmul_precision

Array = jax.Array


def dot_f32(x: Array, w: Array, contract: tuple[int, int]) -> Array:
    """Multiply in float32, contracting axis contract[0] of x with axis contract[1] of w."""
    dims = (((contract[0],), (contract[1],)), ((), ()))
    precision = matmul_precision(x, w)
    return jax.lax.dot_general(x, w, dims, precision=precision, preferred_element_type=jnp.float32)


def mask_to_zero(x: Array, mask: Array) -> Array:
    """Zero x where the mask is false, even where x is NaN."""
    return jnp.where(mask, x, jnp.zeros_like(x))
