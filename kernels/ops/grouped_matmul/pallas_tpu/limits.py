"""What the grouped matmuls of a TPU take."""

from typing import Any

import jax.numpy as jnp


def unsupported_reason(dtype: Any, M: int, F: int) -> str | None:
    """Return why the kernels do not support matrices [E, M, F] of a dtype, or None if they do."""
    if 1 in (M, F) and jnp.dtype(dtype) == jnp.bfloat16:
        return f"matrices are {M} by {F} and Mosaic takes single columns of float32 only"
    return None
