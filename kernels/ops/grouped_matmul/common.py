"""What the grouped kernels of every backend share."""

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def no_gradient(ids: Array) -> np.ndarray:
    return np.zeros(ids.shape, jax.dtypes.float0)


def dot(x: Array, w: Array, contract: tuple[int, int]) -> Array:
    """The product in float32, over axis contract[0] of x and contract[1] of w."""
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(x, w, dims, preferred_element_type=jnp.float32)


def clear(x: Array, inside: Array) -> Array:
    """Zeros where it is not inside, whatever is there."""
    return jnp.where(inside, x, jnp.zeros_like(x))
