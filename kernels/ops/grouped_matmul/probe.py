"""The problems on which "auto" checks the Pallas grouped matmul before it first chooses it; see `first_use.py`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dantinox.kernels.first_use import Result

Array = jax.Array
TOLERANCES = {"float32": 1e-4, "bfloat16": 2.0**-6}
GROUP_SIZES = (300, 0, 1, 700, 129)  # several tiles of rows, an empty group, tiles that groups share


def run(grouped_matmul: Callable[..., Any], implementation: str) -> dict[str, Result]:
    """Return the output and the gradients by dtype; the last rows belong to no group."""
    results: dict[str, Result] = {}
    N, M, F = sum(GROUP_SIZES) + 70, 256, 384
    rng = np.random.default_rng(0)
    sizes = jnp.asarray(GROUP_SIZES, jnp.int32)
    for dtype, tolerance in TOLERANCES.items():
        shapes = ((N, M), (len(GROUP_SIZES), M, F), (N, F))
        x, w, dy = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)

        def forward_and_backward(x: Array, w: Array, dy: Array) -> tuple[Array, ...]:
            y, vjp = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, implementation=implementation), x, w)
            return y, *vjp(dy)

        for name, value in zip(("y", "dx", "dw"), jax.jit(forward_and_backward)(x, w, dy), strict=True):
            results[f"{name} ({dtype})"] = Result(value, tolerance)
    return results
