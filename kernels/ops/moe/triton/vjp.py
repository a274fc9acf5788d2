"""The mixture of experts in Triton: its kernels behind the protocol of `moe/vjp.py`.

XLA moves the rows: it makes one kernel of the gather by expert, and one of the sum of a token's rows, which reads each
row once and writes the sum.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from dantinox.kernels.ops.grouped_matmul.triton.common import TritonGmmConfig
from dantinox.kernels.ops.grouped_matmul.triton.gmm import gmm
from dantinox.kernels.ops.grouped_matmul.triton.tgmm import tgmm
from dantinox.kernels.ops.grouped_matmul.triton.vjp import current_config
from dantinox.kernels.ops.moe.swiglu import Activation
from dantinox.kernels.ops.moe.triton.down_proj_bwd import down_proj_bwd
from dantinox.kernels.ops.moe.triton.up_proj import up_proj
from dantinox.kernels.ops.moe.vjp import KernelsBackend, UpBiases, run_experts
from dantinox.kernels.ops.moe.wide import widen_float16
from dantinox.kernels.triton_call import transformable

Array = jax.Array


class TritonExpertsKernels(NamedTuple):
    """See `vjp.ExpertsKernels`."""

    config: TritonGmmConfig

    def _run(self, kernel: Callable[..., Any], **static: Any) -> Callable[..., Any]:
        return transformable(kernel, "moe_mlp", config=self.config, **static)

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
        run = self._run(up_proj, save_residuals=save_residuals, activation=activation)
        return run(x, w_gate, w_up, group_sizes, biases)

    def down_proj(self, h: Array, w_down: Array, router_weights: Array, group_sizes: Array) -> Array:
        """Return y [R, M]."""
        return self._run(gmm, name="experts_down")((h,), (w_down,), group_sizes, router_weights)

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
        run = self._run(down_proj_bwd, activation=activation)
        return run(dy, w_down, gate, up, router_weights, group_sizes)

    def input_grad(self, dgate: Array, dup: Array, w_gate: Array, w_up: Array, group_sizes: Array) -> Array:
        """Return dx [R, M]."""
        return self._run(gmm, transposed=True, name="experts_dx")((dgate, dup), (w_gate, w_up), group_sizes)

    def weight_grad(self, x: Array, dys: Sequence[Array], group_sizes: Array, name: str) -> Sequence[Array]:
        """Return x^T dy per group, [E, columns of x, columns of dy], for each dy."""
        # One kernel per dy: a tile of both would read as much from L2 per FLOP.
        return [self._run(tgmm, name=name)(x, dy, group_sizes) for dy in dys]


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
    backend = KernelsBackend(TritonExpertsKernels(current_config()), "triton")
    return run_experts(x, w_gate, w_up, w_down, expert_ids, expert_weights, backend, **options)
