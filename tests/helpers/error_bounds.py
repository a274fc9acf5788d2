"""Float64 values with bounds on the error that a dtype's rounding makes of them, for inputs of any magnitude."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

UNDERFLOW = float(jnp.finfo(jnp.float32).tiny)  # CPUs and TPUs flush smaller float32 numbers to zero


@dataclasses.dataclass(frozen=True)
class Bounded:
    """An array and a bound on the error of each element.

    Attributes:
        value: float64.
        error: the bound; every operation adds its own rounding, `eps` relative to the sum of the magnitudes.
        eps: relative rounding error of one operation.
        peak: the largest magnitude of a sum of products so far.
    """

    value: np.ndarray
    error: np.ndarray
    eps: float
    peak: float = 0.0

    def _rounded(self, value: np.ndarray, error: np.ndarray, magnitude: np.ndarray, *others: "Bounded") -> "Bounded":
        peak = max(self.peak, *(other.peak for other in others), float(magnitude.max(initial=0)))
        return Bounded(value, error + self.eps * magnitude + UNDERFLOW, self.eps, peak)

    def einsum(self, axes: str, other: "Bounded") -> "Bounded":
        """Contract two arrays, or multiply them element by element."""
        a, b = np.abs(self.value), np.abs(other.value)
        magnitude = np.einsum(axes, a, b)
        error = np.einsum(axes, a, other.error) + np.einsum(axes, self.error, b + other.error)
        return self._rounded(np.einsum(axes, self.value, other.value), error, magnitude, other)

    def __add__(self, other: "Bounded") -> "Bounded":
        magnitude = np.abs(self.value) + np.abs(other.value)
        return self._rounded(self.value + other.value, self.error + other.error, magnitude, other)

    def apply(self, f: Callable[[np.ndarray], np.ndarray]) -> "Bounded":
        """Apply a function that is monotonic on the scale of the error."""
        value = f(self.value)
        error = np.maximum(*(np.abs(f(self.value + sign * self.error) - value) for sign in (1, -1)))
        return self._rounded(value, 2 * error, np.abs(value))

    def of(self, index: np.ndarray) -> "Bounded":
        """Return the elements of an index."""
        return dataclasses.replace(self, value=self.value[index], error=self.error[index])

    def assert_contains(self, actual: np.ndarray, dtype: str, name: str) -> None:
        """Check the elements of which the dtype holds every value within the bound."""
        info = jnp.finfo(dtype)
        error = self.error + float(info.eps) * np.abs(self.value) + float(info.smallest_subnormal)
        fits = np.abs(self.value) + error < float(info.max)
        wrong = fits & ~(np.abs(np.asarray(actual).astype(np.float64) - self.value) <= error)  # true for NaN
        if wrong.any():
            at = tuple(map(int, np.argwhere(wrong)[0]))
            raise AssertionError(f"{name}{list(at)} is {actual[at]}, not {self.value[at]} +- {error[at]}")


def draw_magnitudes(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, span: float) -> np.ndarray:
    """Draw numbers of a dtype: each with a log-uniform magnitude of at most `span` of its binary exponents.

    Args:
        rng: source of the draws.
        shape: shape of the array.
        dtype: the dtype, which rounds the result.
        span: from 0, all of one magnitude, to 1, from the least number to the largest. The least is a subnormal of
            float16; float32 units flush those of the other dtypes to zero.
    """
    info = jnp.finfo(dtype)
    least = info.smallest_subnormal if dtype == "float16" else info.tiny
    low, high = float(np.log2(float(least))), float(np.log2(float(info.max)))
    centre, half = rng.uniform(low, high), span * (high - low) / 2
    exponent = np.clip(rng.uniform(centre - half, centre + half, shape), low, high)
    magnitude = np.minimum(2.0**exponent, float(info.max))
    return np.asarray(jnp.asarray(np.float64(magnitude * rng.choice([-1, 1], shape)).astype(dtype))).astype(np.float64)
