"""Checks shared by the operations: each raises `ValueError` naming the argument, what it was, what is allowed."""

import math
import numbers
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

FLOATS = (jnp.float64, jnp.float32, jnp.bfloat16, jnp.float16)


def as_array(name: str, x: Any, axes: str) -> jax.Array:
    """`x` as an array with one axis a letter of `axes`."""
    try:
        x = jnp.asarray(x)
    except (TypeError, ValueError):
        raise ValueError(f"{name} is {type(x).__name__}; allowed: an array [{', '.join(axes)}]") from None
    if x.ndim != len(axes):
        raise ValueError(f"{name} has shape {x.shape}; allowed: [{', '.join(axes)}]")
    return x


def check_floating(**arrays: jax.Array | None) -> None:
    """All given arrays are floating point and share one dtype."""
    given = {name: x for name, x in arrays.items() if x is not None}
    for name, x in given.items():
        if x.dtype not in FLOATS:
            raise ValueError(f"{name} has dtype {x.dtype}; allowed: float32, bfloat16, float16")
    first = next(iter(given))
    for name, x in given.items():
        if x.dtype != given[first].dtype:
            raise ValueError(f"{name} has dtype {x.dtype}; allowed: {given[first].dtype}, the dtype of {first}")


def check_integer(name: str, x: jax.Array) -> None:
    """`x` holds integers."""
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{name} has dtype {x.dtype}; allowed: int32")


def check_shape(name: str, x: jax.Array, *allowed: Sequence[int]) -> None:
    """`x` has one of the allowed shapes."""
    if tuple(x.shape) not in {tuple(a) for a in allowed}:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; allowed: {' or '.join(str(tuple(a)) for a in allowed)}")


def check_window(value: int | None, causal: bool) -> None:
    """A window is a positive number of keys and looks back only."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"window is {value!r}; allowed: an integer >= 1, or None")
    if not causal:
        raise ValueError(f"window is {value} with causal=False; a window needs causal=True")


def check_scalars(*, scale: float | None, softcap: float | None) -> None:
    """The scale is finite, the soft cap positive and finite."""
    if scale is not None and not (isinstance(scale, numbers.Real) and math.isfinite(scale)):
        raise ValueError(f"scale is {scale!r}; allowed: a finite number, or None for D**-0.5")
    if softcap is not None and not (isinstance(softcap, numbers.Real) and math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"softcap is {softcap!r}; allowed: a positive finite number, or None")


def check_heads(H: int, K: int) -> None:
    """Query heads are a multiple of key/value heads."""
    if K < 1 or H % K:
        raise ValueError(f"q has {H} heads and k has {K}; allowed: a multiple of k's heads")
