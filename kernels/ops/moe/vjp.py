"""The mixture of experts with its derivative, for every backend with kernels for its products.

The rows are sorted by expert, stably. p is the router's weight of a row.

    forward    h = silu(gate) up,  gate = x w_gate,  up = x w_up    one pass over x, both weights in one step
               y = p (h w_down)                                     p in the epilogue
               out[n] = sum of the token's k rows of y              a gather and a sum: no atomics, one order of adding
    backward   dh = dy w_down^T;  dp = sum of dh h over F;  dup = p dh silu(gate);  dgate = p dh up silu'(gate);  p h
               dx = dgate w_gate^T + dup w_up^T                     one sum
               dw_gate, dw_up = x^T dgate, x^T dup                  one pass over x
               dw_down = (p h)^T dy

gate and up are residuals, in x's dtype: in bfloat16, 8 bytes written and read per hidden feature of a row against 4 M
FLOPs to recompute them. Keeping them is faster from M = 480 on at 240 FLOPs per byte and from M = 1150 on at 560,
and experts are wider. h is recomputed from them, and the sorted rows of x and dy are gathered again, because they are k
times as large as x. Because y's rows are scaled by p, the gradient of p needs h, which is available, and not the rows
of h w_down, which would have to be kept.

Biases of gate and up are part of both, so the backward pass needs them for nothing; their gradients are the sums of
each expert's rows of dgate and dup. Those of the down projection are added to `out`, after the kernels. Another
activation replaces silu(gate) up and its derivatives, see `swiglu.py`.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from dantinox.kernels.derivatives import first_order
from dantinox.kernels.ops.moe.biases import add_weighted_biases
from dantinox.kernels.ops.moe.routing import Routing, permute_router_weights, sort_by_expert, unpermute_and_sum
from dantinox.kernels.ops.moe.swiglu import Activation
from dantinox.kernels.vma import match_vma

Array = jax.Array
UpBiases = tuple[Array | None, Array | None]  # b_gate and b_up
ONES_COLUMNS = 64  # of ones^T dy, the sums of rows: a width that every backend's product takes


class ExpertWeights(NamedTuple):
    """w_gate, w_up [E, M, F], w_down [E, F, M] and b_gate, b_up [E, F] or None, or their gradients."""

    w_gate: Array
    w_up: Array
    w_down: Array
    b_gate: Array | None = None
    b_up: Array | None = None


class ExpertsOutput(NamedTuple):
    """y [R, M], and the residuals gate and up [R, F] if the backward pass needs them."""

    y: Array
    gate: Array | None = None
    up: Array | None = None


class ExpertsGrads(NamedTuple):
    """dx [R, M], the gradients of the weights, and those of the router's weights [R]."""

    dx: Array
    dws: ExpertWeights
    drouter_weights: Array


class ExpertsBackend(Protocol):
    """Runs the experts of R rows sorted by expert: `group_sizes` [E] rows of each, `router_weights` [R] float32."""

    @property
    def implementation(self) -> str:
        """The name by which callers know it."""

    def forward(
        self,
        x: Array,
        ws: ExpertWeights,
        router_weights: Array,
        group_sizes: Array,
        *,
        save_residuals: bool,
        activation: Activation,
    ) -> ExpertsOutput:
        """Return y; with `save_residuals` gate and up too."""

    def backward(
        self,
        x: Array,
        dy: Array,
        ws: ExpertWeights,
        router_weights: Array,
        group_sizes: Array,
        gate: Array,
        up: Array,
        *,
        activation: Activation,
    ) -> ExpertsGrads:
        """Return the gradients for dy [R, M]."""

    def sum_rows(self, ys: Sequence[Array], group_sizes: Array) -> list[Array]:
        """Sum the rows of each expert, [E, F], for each of ys [R, F]."""


class ExpertsKernels(Protocol):
    """The products of the experts on an accelerator, one kernel each."""

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

    def down_proj(self, h: Array, w_down: Array, router_weights: Array, group_sizes: Array) -> Array:
        """Return y [R, M]."""

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

    def input_grad(self, dgate: Array, dup: Array, w_gate: Array, w_up: Array, group_sizes: Array) -> Array:
        """Return dx [R, M]."""

    def weight_grad(self, x: Array, dys: Sequence[Array], group_sizes: Array, name: str) -> Sequence[Array]:
        """Return x^T dy per group, [E, columns of x, columns of dy], for each dy."""


class KernelsBackend(NamedTuple):
    """A backend that runs one kernel per product."""

    kernels: ExpertsKernels
    implementation: str = "pallas"

    def forward(
        self,
        x: Array,
        ws: ExpertWeights,
        router_weights: Array,
        group_sizes: Array,
        *,
        save_residuals: bool,
        activation: Activation,
    ) -> ExpertsOutput:
        """Return y; with `save_residuals` gate and up too."""
        h, *residuals = self.kernels.up_proj(
            x,
            ws.w_gate,
            ws.w_up,
            group_sizes,
            save_residuals=save_residuals,
            biases=(ws.b_gate, ws.b_up),
            activation=activation,
        )
        return ExpertsOutput(self.kernels.down_proj(h, ws.w_down, router_weights, group_sizes), *residuals)

    def backward(
        self,
        x: Array,
        dy: Array,
        ws: ExpertWeights,
        router_weights: Array,
        group_sizes: Array,
        gate: Array,
        up: Array,
        *,
        activation: Activation,
    ) -> ExpertsGrads:
        """Return the gradients for dy [R, M]."""
        dgate, dup, weighted_h, drouter_weights = self.kernels.down_proj_bwd(
            dy, ws.w_down, gate, up, router_weights, group_sizes, activation=activation
        )
        dx = self.kernels.input_grad(dgate, dup, ws.w_gate, ws.w_up, group_sizes)
        dw_gate, dw_up = self.kernels.weight_grad(x, [dgate, dup], group_sizes, "experts_dw_up")
        (dw_down,) = self.kernels.weight_grad(weighted_h, [dy], group_sizes, "experts_dw_down")
        dbs = self.bias_grads(ws, dgate, dup, group_sizes)
        return ExpertsGrads(dx, ExpertWeights(dw_gate, dw_up, dw_down, *dbs), drouter_weights)

    def bias_grads(self, ws: ExpertWeights, dgate: Array, dup: Array, group_sizes: Array) -> list[Array | None]:
        """Return the gradients of b_gate and b_up, None for one that is None."""
        has_bias = [b is not None for b in (ws.b_gate, ws.b_up)]
        if not any(has_bias):
            return [None, None]
        sums = iter(self.sum_rows([dy for dy, has in zip((dgate, dup), has_bias, strict=True) if has], group_sizes))
        return [next(sums) if has else None for has in has_bias]

    def sum_rows(self, ys: Sequence[Array], group_sizes: Array) -> list[Array]:
        """Sum the rows of each expert, [E, F], for each of ys [R, F]."""
        # One more product, of as many FLOPs as 64 columns of x take in that of dw.
        ones = match_vma(jnp.ones((ys[0].shape[0], ONES_COLUMNS), ys[0].dtype), ys[0])
        return [sums[:, 0] for sums in self.kernels.weight_grad(ones, ys, group_sizes, "experts_db")]


def run_experts(
    x: Array,
    w_gate: Array,
    w_up: Array,
    w_down: Array,
    expert_ids: Array,
    expert_weights: Array,
    backend: ExpertsBackend,
    *,
    b_gate: Array | None = None,
    b_up: Array | None = None,
    b_down: Array | None = None,
    activation: Activation = "swiglu",
) -> Array:
    """Compute `dantinox.kernels.moe_mlp` with the given backend, which must be hashable."""
    permutation, inverse_permutation, group_sizes = sort_by_expert(expert_ids, w_gate.shape[0])
    routing = Routing(permutation, inverse_permutation.reshape(expert_ids.shape), group_sizes)
    ws = ExpertWeights(w_gate, w_up, w_down, b_gate, b_up)
    y = _experts(x, ws, expert_weights, routing, backend, activation)
    return add_weighted_biases(y, b_down, expert_ids, expert_weights, routing, backend.sum_rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _experts(
    x: Array,
    ws: ExpertWeights,
    router_weights: Array,
    routing: Routing,
    backend: ExpertsBackend,
    activation: Activation,
) -> Array:
    """Return the output [N, M] for router_weights [N, k]."""
    return _forward(x, ws, router_weights, routing, backend, activation, save_residuals=False)[0]


class _Residuals(NamedTuple):
    x: Array
    ws: ExpertWeights
    router_weights: Array
    routing: Routing
    gate: Array
    up: Array


def _experts_fwd(
    x: Array,
    ws: ExpertWeights,
    router_weights: Array,
    routing: Routing,
    backend: ExpertsBackend,
    activation: Activation,
) -> tuple[Array, _Residuals]:
    out, gate, up = _forward(x, ws, router_weights, routing, backend, activation, save_residuals=True)
    return out, _Residuals(x, ws, router_weights, routing, gate, up)


def _forward(
    x: Array,
    ws: ExpertWeights,
    router_weights: Array,
    routing: Routing,
    backend: ExpertsBackend,
    activation: Activation,
    *,
    save_residuals: bool,
) -> tuple[Array, Array | None, Array | None]:
    rows = x[routing.permutation // router_weights.shape[1]]
    row_weights = permute_router_weights(router_weights, routing.permutation)
    options = {"save_residuals": save_residuals, "activation": activation}
    forward = first_order(functools.partial(backend.forward, **options), "moe_mlp", backend.implementation)
    y, gate, up = forward(rows, ws, row_weights, routing.group_sizes)
    return unpermute_and_sum(y, routing.inverse_permutation), gate, up


def _experts_bwd(backend: ExpertsBackend, activation: Activation, residuals: _Residuals, dout: Array) -> tuple:
    x, ws, router_weights, routing, gate, up = residuals
    permutation, inverse_permutation, group_sizes = routing
    token = permutation // router_weights.shape[1]
    x, dy, row_weights = x[token], dout[token], permute_router_weights(router_weights, permutation)
    run = functools.partial(backend.backward, activation=activation)
    backward = first_order(run, "moe_mlp", backend.implementation)
    dx, dws, drouter_weights = backward(x, dy, ws, row_weights, group_sizes, gate, up)
    dx = unpermute_and_sum(dx, inverse_permutation)
    drouter_weights = drouter_weights[inverse_permutation].astype(router_weights.dtype)
    return dx, dws, drouter_weights, None


_experts.defvjp(_experts_fwd, _experts_bwd)
