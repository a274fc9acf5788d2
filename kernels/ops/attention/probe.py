"""The problems on which "auto" checks the Pallas attention before it first chooses it; see `first_use.py`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dantinox.kernels.first_use import Result

Array = jax.Array
TOLERANCES = {"float32": 1e-4, "bfloat16": 2.0**-6}


def run(attention: Callable[..., Any], implementation: str) -> dict[str, Result]:
    """Return the output and the gradients of windowed, gated, packed attention by dtype."""
    results: dict[str, Result] = {}
    T, H, K, D = 600, 4, 2, 128  # several blocks of queries and of keys
    rng = np.random.default_rng(0)
    ids = np.repeat(np.arange(3, dtype=np.int32), T // 3)[None]
    for dtype, tolerance in TOLERANCES.items():
        shapes = ((1, T, H, D), (1, T, K, D), (1, T, K, D), (1, T, H, 1), (1, T, H, D))
        q, k, v, gate, do = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)

        def forward(q: Array, k: Array, v: Array, gate: Array) -> Array:
            return attention(q, k, v, gate=gate, window=150, segment_ids=ids, implementation=implementation)

        def forward_and_backward(do: Array, *inputs: Array) -> tuple[Array, ...]:
            o, vjp = jax.vjp(forward, *inputs)
            return o, *vjp(do)

        for name, value in zip(
            ("o", "dq", "dk", "dv", "dgate"), jax.jit(forward_and_backward)(do, q, k, v, gate), strict=True
        ):
            results[f"{name} ({dtype})"] = Result(value, tolerance)
    return results
