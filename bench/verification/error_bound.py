"""The error bound that every implementation must keep.

    error(kernel) <= 2 x error(the same formula in plain jnp, at the kernel's dtype) + one ulp

Errors are the largest absolute difference from the reference in float64, for the output and for every gradient. The
ulp is that of the largest exact value, or of 1 if that is smaller. The bound is flash-attention's
(hopper/test_flash_attn.py): the error is at most a factor of plain PyTorch's, plus an absolute term.

One exception: a gradient that is exactly zero (of the queries, with a window of one key) is a difference of equal sums
of some D products, rounded in an arbitrary direction. Its error may be `CANCELLATION_ULPS` float32 ulps in any dtype,
because kernels accumulate in float32.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from bench.verification import wrong_places

CANCELLATION_ULPS = 32
# The axis of rows, by the rank of an array: [N, M]; [E, M, F] and [B, H, D]; [B, T, H, D].
ROW_AXIS = {2: 0, 3: 1, 4: 1}
Arrays = Mapping[str, Any]


def bound_violations(actual: Arrays, plain: Arrays, oracle: Arrays, dtype: Any) -> list[str]:
    """One line per array that exceeds the error bound."""
    lines = {name: _violation(name, actual.get(name), plain[name], exact, dtype) for name, exact in oracle.items()}
    return [f"{name}: {line}" for name, line in lines.items() if line]


def error_terms(name: str, plain: Any, exact: np.ndarray, dtype: Any) -> tuple[float, float]:
    """Return (the error of plain jnp, the ulp-sized term) of the bound of one array."""
    largest = np.abs(exact).max(initial=0)
    ulp = float(jnp.finfo(dtype).eps) * max(1.0, largest)
    if name != "o" and largest < 1e-12:
        ulp = CANCELLATION_ULPS * float(jnp.finfo(jnp.float32).eps)
    return float(np.abs(to_float64(plain) - exact).max(initial=0)), ulp


def _violation(name: str, actual: Any, plain: Any, exact: Any, dtype: Any) -> str:
    exact = to_float64(exact)
    if actual is None:
        return "missing"
    if not np.isfinite(exact).all():
        return "the oracle itself is not finite"
    plain_error, ulp = error_terms(name, plain, exact, dtype)
    if np.abs(to_float64(actual) - exact).max(initial=0) <= 2 * plain_error + ulp:  # false for NaN
        return ""
    where = wrong_places.describe(to_float64(actual), exact, 2 * plain_error + ulp, ROW_AXIS.get(exact.ndim))
    return f"{where}; plain jnp {plain_error:.3g}, ulp {ulp:.3g}"


def to_float64(x: Any) -> np.ndarray:
    """`x` as a NumPy array in float64."""
    return np.asarray(x).astype(np.float64)
