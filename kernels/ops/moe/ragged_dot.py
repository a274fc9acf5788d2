"""The experts as three grouped matmuls that JAX differentiates."""

from collections.abc import Callable

import jax

from dantinox.kernels.einsum import accumulation_dtype
from dantinox.kernels.ops.grouped_matmul.ragged_dot import zeroed_ragged_dot
from dantinox.kernels.ops.moe.biases import NO_BIASES, ExpertBiases, add_bias
from dantinox.kernels.ops.moe.swiglu import Activation, clamped_swiglu

Array = jax.Array


def ragged_dot_experts(
    x: Array,
    w_gate: Array,
    w_up: Array,
    w_down: Array,
    group_sizes: Array,
    biases: ExpertBiases = NO_BIASES,
    *,
    gmm: Callable[[Array, Array, Array], Array] = zeroed_ragged_dot,
    activation: Activation = "swiglu",
) -> Array:
    """Run the experts of rows [R, M] sorted by expert with XLA's grouped matmul, or with `gmm`: [R, M]."""

    def project(rows: Array, w: Array, b: Array | None) -> Array:
        return add_bias(gmm(rows, w, group_sizes), b, group_sizes)

    if activation == "swiglu":
        h = jax.nn.silu(project(x, w_gate, biases.b_gate)) * project(x, w_up, biases.b_up)
    else:
        wide = accumulation_dtype(x.dtype)
        gate, up = (project(x, w, b).astype(wide) for w, b in ((w_gate, biases.b_gate), (w_up, biases.b_up)))
        h = clamped_swiglu(gate, up, *activation[1:]).astype(x.dtype)
    return project(h, w_down, biases.b_down)
