"""XLA's grouped matmul, with zeros in the unassigned rows."""

import jax
import jax.numpy as jnp

from dantinox.kernels.dispatch import on_tpu
from dantinox.kernels.ops.grouped_matmul.group_metadata import zero_unassigned_rows

Array = jax.Array


def zeroed_ragged_dot(x: Array, w: Array, group_sizes: Array) -> Array:
    """Run `lax.ragged_dot` with unassigned rows zeroed in x and in the result, so that NaN there cannot reach dw."""
    x, dtype, precision = zero_unassigned_rows(x, group_sizes), x.dtype, None
    if dtype == jnp.float16 and on_tpu():  # which XLA does not compile on TPU v5e
        x, w, precision = x.astype(jnp.float32), w.astype(jnp.float32), jax.lax.Precision.HIGH
    y = jax.lax.ragged_dot(x, w, group_sizes.astype(jnp.int32), precision=precision)
    return zero_unassigned_rows(y.astype(dtype), group_sizes)
