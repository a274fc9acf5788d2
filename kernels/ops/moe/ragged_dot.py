"""The experts with XLA's grouped matmul."""

import jax

from dantinox.kernels.ops.grouped_matmul.ragged_dot import zeroed_ragged_dot

Array = jax.Array


def ragged_dot_experts(x: Array, w_gate: Array, w_up: Array, w_down: Array, group_sizes: Array) -> Array:
    """Run the experts of rows [R, M] sorted by expert: [R, M]; for devices other than CPUs."""
    h = jax.nn.silu(zeroed_ragged_dot(x, w_gate, group_sizes)) * zeroed_ragged_dot(x, w_up, group_sizes)
    return zeroed_ragged_dot(h, w_down, group_sizes)
