"""The products of the mixture of experts on a TPU, by the kernels of grouped matmul."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dantinox.kernels.dispatch import Device
from dantinox.kernels.ops.grouped_matmul.pallas_tpu.gmm import gmm
from dantinox.kernels.ops.grouped_matmul.pallas_tpu.tgmm import tgmm
from dantinox.kernels.ops.moe.biases import add_tiles
from dantinox.kernels.ops.moe.swiglu import Activation, swiglu, swiglu_bwd
from dantinox.kernels.ops.moe.vjp import UpBiases

Array = jax.Array


class TpuExpertsKernels(NamedTuple):
    """See `vjp.ExpertsKernels`."""

    device: Device

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
    ) -> Sequence[Array]:
        """Return h [R, F]; with `save_residuals` gate and up too, biases included."""
        out_kinds = ("matrix",) * (3 if save_residuals else 1)
        has_bias = [b is not None for b in biases]

        def epilogue(gate: Array, up: Array, *biases: Array) -> tuple[Array, ...]:
            gate, up = add_tiles((gate, up), has_bias, biases)
            return (swiglu(gate, up, activation), gate, up)[: len(out_kinds)]

        return gmm(
            [x],
            [w_gate, w_up],
            group_sizes,
            self.device,
            epilogue=epilogue,
            group_vectors=[b.astype(jnp.float32) for b in biases if b is not None],
            out_kinds=out_kinds,
            name="experts_up",
        )

    def down_proj(self, h: Array, w_down: Array, router_weights: Array, group_sizes: Array) -> Array:
        """Return y [R, M]."""

        def epilogue(y: Array, router_weight: Array) -> tuple[Array]:
            return (y * router_weight,)

        (y,) = gmm(
            [h],
            [w_down],
            group_sizes,
            self.device,
            epilogue=epilogue,
            row_vectors=[router_weights[None]],
            name="experts_down",
        )
        return y

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
    ) -> Sequence[Array]:
        """Return dgate, dup, weighted h [R, F] and the gradients of the router's weights [R]."""
        dgate, dup, weighted_h, drouter_weights = gmm(
            [dy],
            [w_down],
            group_sizes,
            self.device,
            transposed=True,
            epilogue=functools.partial(swiglu_bwd, activation=activation),
            matrices=[gate, up],
            row_vectors=[router_weights[None]],
            out_kinds=("matrix", "matrix", "matrix", "row_sum"),
            name="experts_dh",
        )
        return dgate, dup, weighted_h, drouter_weights[0]

    def input_grad(self, dgate: Array, dup: Array, w_gate: Array, w_up: Array, group_sizes: Array) -> Array:
        """Return dx [R, M]."""
        options = {"transposed": True, "sum_products": True, "name": "experts_dx"}
        return gmm([dgate, dup], [w_gate, w_up], group_sizes, self.device, **options)[0]

    def weight_grad(self, x: Array, dys: Sequence[Array], group_sizes: Array, name: str) -> Sequence[Array]:
        """Return x^T dy per group, [E, columns of x, columns of dy], for each dy."""
        return tgmm(x, dys, group_sizes, self.device, name=name)
