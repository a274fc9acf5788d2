"""The experts as three grouped matmuls that JAX differentiates."""

from collections.abc import Callable

import jax

from dantinox.kernels.ops.grouped_matmul.ragged_dot import zeroed_ragged_dot

Array = jax.Array


def ragged_dot_experts(
    x: Array,
    w_gate: Array,
    w_up: Array,
    w_down: Array,
    group_sizes: Array,
    gmm: Callable[[Array, Array, Array], Array] = zeroed_ragged_dot,
) -> Array:
    """Run the experts of rows [R, M] sorted by expert with XLA's grouped matmul, or with `gmm`: [R, M]."""
    h = jax.nn.silu(gmm(x, w_gate, group_sizes)) * gmm(x, w_up, group_sizes)
    return gmm(h, w_down, group_sizes)
