"""Argument checks of all operations: each raises a `ValueError` with the argument, its value and the allowed values."""

import math
import numbers
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

FLOATS = (jnp.float64, jnp.float32, jnp.bfloat16, jnp.float16)


def as_array(name: str, x: Any, axes: str) -> jax.Array:
    """Convert x to an array that has one axis per letter of `axes`."""
    try:
        x = jnp.asarray(x)
    except (TypeError, ValueError):
        raise ValueError(f"{name} is {type(x).__name__}; allowed: an array [{', '.join(axes)}]") from None
    if x.ndim != len(axes):
        raise ValueError(f"{name} has shape {x.shape}; allowed: [{', '.join(axes)}]")
    return x


def check_floating(**arrays: jax.Array | None) -> None:
    """Check that the arrays are floating point and share one dtype; None is skipped."""
    present = {name: x for name, x in arrays.items() if x is not None}
    for name, x in present.items():
        if x.dtype not in FLOATS:
            raise ValueError(f"{name} has dtype {x.dtype}; allowed: float32, bfloat16, float16")
    first = next(iter(present))
    for name, x in present.items():
        if x.dtype != present[first].dtype:
            raise ValueError(f"{name} has dtype {x.dtype}; allowed: {present[first].dtype}, the dtype of {first}")


def check_integer(name: str, x: jax.Array) -> None:
    """Check that x has an integer dtype."""
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{name} has dtype {x.dtype}; allowed: int32")


def check_shape(name: str, x: jax.Array, *allowed: Sequence[int]) -> None:
    """Check that x has one of the allowed shapes."""
    if tuple(x.shape) not in {tuple(a) for a in allowed}:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; allowed: {' or '.join(str(tuple(a)) for a in allowed)}")


def check_window(value: int | None, causal: bool) -> None:
    """Check that the window is a positive number of keys, and that attention is causal."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"window is {value!r}; allowed: an integer >= 1, or None")
    if not causal:
        raise ValueError(f"window is {value} with causal=False; a window needs causal=True")


def check_scalars(*, scale: float | None, softcap: float | None) -> None:
    """Check that the scale is finite and that the soft cap is positive and finite."""
    if scale is not None and not (isinstance(scale, numbers.Real) and math.isfinite(scale)):
        raise ValueError(f"scale is {scale!r}; allowed: a finite number, or None for D**-0.5")
    if softcap is not None and not (isinstance(softcap, numbers.Real) and math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"softcap is {softcap!r}; allowed: a positive finite number, or None")


def check_heads(H: int, K: int) -> None:
    """Check that the number of query heads is a multiple of the number of key/value heads."""
    if K < 1 or H % K:
        raise ValueError(f"q has {H} heads and k has {K}; allowed: a multiple of k's heads")
