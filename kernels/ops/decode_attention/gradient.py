"""Decode attention serves inference: its kernels have no gradient, and say so."""

from typing import Any

import jax


@jax.custom_jvp
def without_gradient[T](arrays: T) -> T:
    """Return the arrays of a kernel, which refuse by one sentence to be differentiated."""
    return arrays


@without_gradient.defjvp
def _refuse(primals: Any, tangents: Any) -> Any:
    raise NotImplementedError("decode_attention: implementation='pallas' has no gradient; implementation='xla' has one")
