"""XLA's grouped matmul, with zeros in the unassigned rows."""

import jax
import jax.numpy as jnp

from dantinox.kernels.ops.grouped_matmul.group_metadata import zero_unassigned_rows

Array = jax.Array


def zeroed_ragged_dot(x: Array, w: Array, group_sizes: Array) -> Array:
    """Run `lax.ragged_dot` with unassigned rows zeroed in x and in the result, so that NaN there cannot reach dw."""
    x = zero_unassigned_rows(x, group_sizes)
    return zero_unassigned_rows(jax.lax.ragged_dot(x, w, group_sizes.astype(jnp.int32)), group_sizes)
