"""Argument checks of all operations: each raises a `ValueError` with the argument, its value and the allowed values.

Those of ids, lengths and sizes are in `integers.py`.
"""

import math
import numbers
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from dantinox.kernels.integers import native_order

FLOATS = (jnp.float64, jnp.float32, jnp.bfloat16, jnp.float16)


def as_array(name: str, x: Any, axes: str) -> jax.Array:
    """Convert x to an array that has one axis per letter of `axes`."""
    try:
        x = jnp.asarray(native_order(x) if isinstance(x, np.ndarray) else x)
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


def check_shape(name: str, x: jax.Array, *allowed: Sequence[int]) -> None:
    """Check that x has one of the allowed shapes."""
    if tuple(x.shape) not in {tuple(a) for a in allowed}:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; allowed: {' or '.join(str(tuple(a)) for a in allowed)}")


def check_flag(name: str, value: Any) -> bool:
    """Check that a flag is True or False, and not an array or a word, whose truth would decide."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} is {_describe(value)}; allowed: True or False")
    return bool(value)


def check_window(value: Any, causal: bool) -> int | None:
    """Check that the window is a positive number of keys, and that attention is causal."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"window is {_describe(value)}; allowed: an integer >= 1, or None")
    if not causal:
        raise ValueError(f"window is {value} with causal=False; a window needs causal=True")
    return int(value)


def check_scale(value: Any, D: int) -> float:
    """Check that the scale is 0 or a normal float32 number, and return it; None is D**-0.5."""
    if value is None:
        return 1.0 if D == 0 else D**-0.5
    scale = _as_float(value)
    if scale is None or not (scale == 0 or _is_normal(abs(scale))):
        raise ValueError(
            f"scale is {_describe(value)}; allowed: a finite number that float32 holds, or None for D**-0.5"
        )
    return scale


def check_softcap(value: Any) -> float | None:
    """Check that the soft cap is a positive normal float32 number."""
    if value is None:
        return None
    softcap = _as_float(value)
    if softcap is None or not _is_normal(softcap):
        raise ValueError(
            f"softcap is {_describe(value)}; allowed: a positive finite number that float32 holds, or None"
        )
    return softcap


def check_z_loss(value: Any) -> float:
    """Check that the weight of the squared logsumexp is 0 or a positive normal float32 number."""
    z_loss = _as_float(value)
    if z_loss is None or not (z_loss == 0 or _is_normal(z_loss)):
        raise ValueError(f"z_loss is {_describe(value)}; allowed: 0, or a positive finite number that float32 holds")
    return z_loss


def check_moe_activation(value: Any) -> Literal["swiglu"] | tuple[Literal["swiglu_clamped"], float, float]:
    """Check an activation of the experts: "swiglu", or ("swiglu_clamped", limit, alpha) of positive numbers."""
    if isinstance(value, str) and value == "swiglu":
        return "swiglu"
    if isinstance(value, tuple | list) and len(value) == 3 and value[0] == "swiglu_clamped":
        limit, alpha = _as_float(value[1]), _as_float(value[2])
        if limit is not None and alpha is not None and _is_normal(limit) and _is_normal(alpha):
            return ("swiglu_clamped", limit, alpha)
    raise ValueError(
        f"activation is {_describe(value)}; allowed: 'swiglu', or ('swiglu_clamped', limit, alpha) with positive "
        "finite numbers that float32 holds"
    )


def _as_float(value: Any) -> float | None:
    """Return a real number as a float, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _is_normal(value: float) -> bool:
    info = np.finfo(np.float32)
    return float(info.tiny) <= value <= float(info.max)


def _describe(value: Any) -> str:
    """Show a value in one line; an array by its type and shape."""
    if isinstance(value, jax.Array | np.ndarray):
        return f"{'a traced' if isinstance(value, jax.core.Tracer) else 'an'} array of shape {value.shape}"
    return " ".join(repr(value).split())[:80]


def check_sinks(sinks: Any, H: int, dtype: jnp.dtype) -> jax.Array:
    """Convert sinks to an array and check that it is [H], in float32 or in `dtype`, that of q."""
    sinks = as_array("sinks", sinks, "H")
    check_shape("sinks", sinks, (H,))
    if sinks.dtype not in (jnp.float32, dtype):
        other = "" if dtype == jnp.float32 else f" or {dtype}, the dtype of q"
        raise ValueError(f"sinks has dtype {sinks.dtype}; allowed: float32{other}")
    return sinks


def check_heads(H: int, K: int) -> None:
    """Check that the number of query heads is a multiple of the number of key/value heads."""
    if K < 1 or H % K:
        raise ValueError(f"q has {H} heads and k has {K}; allowed: a multiple of k's heads")
