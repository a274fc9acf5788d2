"""The Pallas mixture of experts of TPUs and CPUs; CPUs have separate kernels."""

from typing import Any

import jax

from dantinox.kernels.dispatch import current_device
from dantinox.kernels.ops.moe import pallas_cpu
from dantinox.kernels.ops.moe.pallas_tpu import TpuExpertsKernels
from dantinox.kernels.ops.moe.vjp import KernelsBackend, run_experts
from dantinox.kernels.ops.moe.wide import widen_float16

Array = jax.Array


@widen_float16
def moe_mlp(
    x: Array,
    w_gate: Array,
    w_up: Array,
    w_down: Array,
    expert_ids: Array,
    expert_weights: Array,
    **options: Any,
) -> Array:
    """See `dantinox.kernels.moe_mlp`, which checks the arguments; `options` has those of the biases and activation."""
    device = current_device()
    backend = pallas_cpu if device.platform == "cpu" else KernelsBackend(TpuExpertsKernels(device))
    return run_experts(x, w_gate, w_up, w_down, expert_ids, expert_weights, backend, **options)
