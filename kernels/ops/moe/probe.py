"""The problems on which "auto" checks the Pallas mixture of experts before it first chooses it; see `first_use.py`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dantinox.kernels.first_use import Result

Array = jax.Array
TOLERANCES = {"float32": 1e-4, "bfloat16": 2.0**-5}  # the gradients pass two products in 16 bits


def run(moe_mlp: Callable[..., Any], implementation: str) -> dict[str, Result]:
    """Return the output and the gradients by dtype, with an expert without tokens and choices of no expert."""
    results: dict[str, Result] = {}
    N, M, F, E, k = 300, 256, 384, 5, 2
    rng = np.random.default_rng(0)
    ids = rng.integers(0, E - 1, (N, k))  # the last expert gets no token
    ids[::7, 1] = E  # no expert
    for dtype, tolerance in TOLERANCES.items():
        shapes = ((N, M), (E, M, F), (E, M, F), (E, F, M), (N, k), (N, M))
        scales = (1, M**-0.5, M**-0.5, F**-0.5, 1, 1)
        draws = (rng.standard_normal(shape) * scale for shape, scale in zip(shapes, scales, strict=True))
        *inputs, dy = (jnp.asarray(x, dtype) for x in draws)

        def forward(x: Array, w_gate: Array, w_up: Array, w_down: Array, weights: Array) -> Array:
            return moe_mlp(x, w_gate, w_up, w_down, ids, weights, implementation=implementation)

        def forward_and_backward(dy: Array, *inputs: Array) -> tuple[Array, ...]:
            y, vjp = jax.vjp(forward, *inputs)
            return y, *vjp(dy)

        names = ("y", "dx", "dw_gate", "dw_up", "dw_down", "dexpert_weights")
        for name, value in zip(names, jax.jit(forward_and_backward)(dy, *inputs), strict=True):
            results[f"{name} ({dtype})"] = Result(value, tolerance)
    return results
