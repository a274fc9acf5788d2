"""The precision of matrix products inside the Pallas kernels."""

import jax
import jax.numpy as jnp

Array = jax.Array
THREE_PASSES = ("high", "bfloat16_3x", "BF16_BF16_F32_X3")  # values of jax_default_matmul_precision


def matmul_precision(a: Array, b: Array) -> jax.lax.Precision:
    """Return the precision that multiplies two operands as exactly as their dtype holds them.

    A TPU multiplies bfloat16; JAX's default rounds float32 operands to it, which leaves them 8 of 24 bits. Six passes
    (HIGHEST) keep them all. `jax.default_matmul_precision("high")` asks for three. Operands of 16 bits take one pass,
    whatever that setting says: Mosaic does not compile more.
    """
    if jnp.float32 not in (a.dtype, b.dtype):
        return jax.lax.Precision.DEFAULT
    asked = jax.config.jax_default_matmul_precision
    return jax.lax.Precision.HIGH if asked in THREE_PASSES else jax.lax.Precision.HIGHEST
