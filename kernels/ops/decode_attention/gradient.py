"""Decode attention serves inference: its kernels have no gradient, and say so."""

import functools
from typing import Any

import jax


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def without_gradient[T](arrays: T, implementation: str) -> T:
    """Return the arrays of an implementation, which refuses by one sentence to be differentiated."""
    return arrays


@without_gradient.defjvp
def _refuse(implementation: str, primals: Any, tangents: Any) -> Any:
    raise NotImplementedError(
        f"decode_attention: implementation={implementation!r} has no gradient; implementation='xla' has one"
    )
