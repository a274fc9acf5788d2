"""float16 experts in float32: hidden rows and the outputs of single experts exceed float16 where the results fit it."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
BIAS_NAMES = {"b_gate", "b_up", "b_down"}


def widen_float16(moe_mlp: Callable[..., Array]) -> Callable[..., Array]:
    """Return a mixture of experts that converts float16 tokens, matrices and biases to float32 and the output back."""

    @functools.wraps(moe_mlp)
    def widened(
        x: Array,
        w_gate: Array,
        w_up: Array,
        w_down: Array,
        expert_ids: Array,
        expert_weights: Array,
        **options: Any,
    ) -> Array:
        dtype = jnp.float32 if x.dtype == jnp.float16 else x.dtype
        floats = (array.astype(dtype) for array in (x, w_gate, w_up, w_down))
        options |= {name: b.astype(dtype) for name, b in options.items() if name in BIAS_NAMES and b is not None}
        return moe_mlp(*floats, expert_ids, expert_weights, **options).astype(x.dtype)

    return widened
