"""The mixture of experts on Hopper: its kernels behind the protocol of `moe/vjp.py`, and the supported inputs.

The kernels of both up projections and of the backward pass compute SwiGLU without biases. Others take one product per
matrix, whose results XLA adds the biases to and activates: 12 bytes more per hidden feature of a row in 16 bits, and 20
more in a backward pass of another activation.

In float16, gate, up and hidden rows and the weighted output of each expert must fit float16; the other implementations
keep them in float32.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from dantinox.kernels.dispatch import current_device
from dantinox.kernels.ops.grouped_matmul.pallas_sm90 import gmm, tgmm
from dantinox.kernels.ops.grouped_matmul.pallas_sm90.vjp import num_sms, unsupported_inputs
from dantinox.kernels.ops.grouped_matmul.pallas_sm90.warp_specialized import Sm90GmmConfig
from dantinox.kernels.ops.moe.biases import add_bias
from dantinox.kernels.ops.moe.pallas_sm90.down_proj_bwd import down_proj_bwd
from dantinox.kernels.ops.moe.pallas_sm90.up_proj import up_proj
from dantinox.kernels.ops.moe.swiglu import Activation, swiglu, swiglu_bwd
from dantinox.kernels.ops.moe.vjp import KernelsBackend, UpBiases, run_experts
from dantinox.kernels.vma import match_vma

Array = jax.Array


class Sm90ExpertsKernels(NamedTuple):
    """See `vjp.ExpertsKernels`."""

    config: Sm90GmmConfig

    def up_proj(
        self,
        x: Array,
        w_gate: Array,
        w_up: Array,
        group_sizes: Array,
        *,
        save_residuals: bool,
        biases: UpBiases = (None, None),
        activation: Activation = "swiglu",
    ) -> list[Array]:
        """Return h [R, F]; with `save_residuals` gate and up too, biases included."""
        if activation != "swiglu" or any(b is not None for b in biases):
            gate, up = (
                add_bias(match_vma(gmm.gmm([x], [w], group_sizes, self.config, name="experts_up"), x), b, group_sizes)
                for w, b in zip((w_gate, w_up), biases, strict=True)
            )
            h = swiglu(gate.astype(jnp.float32), up.astype(jnp.float32), activation).astype(x.dtype)
            return [h, gate, up] if save_residuals else [h]
        outs = up_proj(x, w_gate, w_up, group_sizes, self.config, save_residuals=save_residuals)
        return [match_vma(out, x) for out in outs if out is not None]

    def down_proj(self, h: Array, w_down: Array, router_weights: Array, group_sizes: Array) -> Array:
        """Return y [R, M]."""
        options = {"row_scale": router_weights, "name": "experts_down"}
        return match_vma(gmm.gmm([h], [w_down], group_sizes, self.config, **options), h)

    def down_proj_bwd(
        self,
        dy: Array,
        w_down: Array,
        gate: Array,
        up: Array,
        router_weights: Array,
        group_sizes: Array,
        *,
        activation: Activation = "swiglu",
    ) -> list[Array]:
        """Return dgate, dup, weighted h [R, F] and the gradients of the router's weights [R]."""
        if activation != "swiglu":
            options = {"transposed": True, "name": "experts_dh"}
            dh = match_vma(gmm.gmm([dy], [w_down], group_sizes, self.config, **options), dy)
            grads = swiglu_bwd(dh.astype(jnp.float32), gate, up, router_weights[:, None], activation)
            return [*(grad.astype(dy.dtype) for grad in grads[:3]), jnp.sum(grads.drouter_weight, axis=1)]
        grads = down_proj_bwd(dy, w_down, gate, up, router_weights, group_sizes, self.config)
        return [match_vma(grad, dy) for grad in grads]

    def input_grad(self, dgate: Array, dup: Array, w_gate: Array, w_up: Array, group_sizes: Array) -> Array:
        """Return dx [R, M]."""
        options = {"transposed": True, "name": "experts_dx"}
        return match_vma(gmm.gmm([dgate, dup], [w_gate, w_up], group_sizes, self.config, **options), dgate)

    def weight_grad(self, x: Array, dys: Sequence[Array], group_sizes: Array, name: str) -> list[Array]:
        """Return x^T dy per group, [E, columns of x, columns of dy], for each dy."""
        # One kernel per dy: x is read again, but the products take longer than all reads if M F / (M + F) is above 270
        # (F of 320 with M of 2048). A tile of both would read as much from L2.
        return [match_vma(tgmm.tgmm(x, dy, group_sizes, self.config, name=name), x) for dy in dys]


def moe_mlp(
    x: Array,
    w_gate: Array,
    w_up: Array,
    w_down: Array,
    expert_ids: Array,
    expert_weights: Array,
    *,
    interpret: plgpu.InterpretGPUParams | None = None,
    blocks: int = 0,
    width: int | None = None,
    b_gate: Array | None = None,
    b_up: Array | None = None,
    b_down: Array | None = None,
    activation: Activation = "swiglu",
) -> Array:
    """See `dantinox.kernels.moe_mlp`, which checks the arguments; the other options are those of `grouped_matmul`.

    Raises:
        NotImplementedError: the kernels do not support the dtype or a size.
    """
    if (reason := unsupported_inputs(x.dtype, *w_gate.shape[1:], weight="w_gate")) is not None:
        raise NotImplementedError(f"moe_mlp: implementation='pallas' cannot run here: {reason}")
    if 0 in (*x.shape, *w_gate.shape):
        return jnp.zeros_like(x)
    biases = {name: b for name, b in (("b_gate", b_gate), ("b_up", b_up), ("b_down", b_down)) if b is not None}
    arrays = x, w_gate, w_up, w_down, expert_ids, expert_weights, *biases.values()
    config = Sm90GmmConfig(blocks or num_sms(current_device().kind), interpret, width)
    x, w_gate, w_up, w_down, expert_ids, expert_weights, *rest = (match_vma(array, *arrays) for array in arrays)
    options = dict(zip(biases, rest, strict=True))
    backend = KernelsBackend(Sm90ExpertsKernels(config))
    return run_experts(x, w_gate, w_up, w_down, expert_ids, expert_weights, backend, activation=activation, **options)
