"""The public mixture of experts: argument checks and the choice of an implementation."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from dantinox.kernels import dispatch, integers, validation
from dantinox.kernels.call import call_implementation
from dantinox.kernels.ops.grouped_matmul.api import pallas_not_auto
from dantinox.kernels.ops.grouped_matmul.pallas_tpu import limits as tpu_limits
from dantinox.kernels.ops.moe import pallas, probe, xla

Array = jax.Array


def moe_mlp(
    x: Float[Array, "N M"],
    w_gate: Float[Array, "E M F"],
    w_up: Float[Array, "E M F"],
    w_down: Float[Array, "E F M"],
    expert_ids: Int[Array, "N k"],
    expert_weights: Float[Array, "N k"],
    *,
    implementation: str = "auto",
) -> Float[Array, "N M"]:
    """Compute y[n] = sum_j expert_weights[n, j] * (silu(x[n] w_gate[e]) * (x[n] w_up[e])) w_down[e].

    e is expert_ids[n, j]. Dropless; the cost grows with the N * k routed rows, not with E. Differentiable in all but
    the ids. Matrices of experts without tokens may hold anything, NaN included; a NaN in a token reaches its own output
    and the gradients of its experts only.

    Args:
        x: tokens [N, M].
        w_gate: gate projections [E, M, F] in x's dtype.
        w_up: up projections [E, M, F] in x's dtype.
        w_down: down projections [E, F, M] in x's dtype.
        expert_ids: experts of each token [N, k] of any integer dtype; an id outside [0, E) contributes nothing.
        expert_weights: weight of each choice [N, k], of any floating dtype.
        implementation: auto, reference, xla, pallas or triton.

    Returns:
        [N, M] in x's dtype.

    Raises:
        ValueError: an argument's shape or dtype is not allowed.
        NotImplementedError: the named implementation cannot run here.
    """
    x, w_gate = validation.as_array("x", x, "NM"), validation.as_array("w_gate", w_gate, "EMF")
    w_up, w_down = validation.as_array("w_up", w_up, "EMF"), validation.as_array("w_down", w_down, "EFM")
    ids = integers.as_integers("expert_ids", expert_ids, "Nk")
    expert_weights = validation.as_array("expert_weights", expert_weights, "Nk")
    validation.check_floating(x=x, w_gate=w_gate, w_up=w_up, w_down=w_down)
    validation.check_floating(expert_weights=expert_weights)
    (N, M), (E, _, F) = x.shape, w_gate.shape
    k = ids.shape[1]
    validation.check_shape("w_gate", w_gate, (E, M, F))
    validation.check_shape("w_up", w_up, (E, M, F))
    validation.check_shape("w_down", w_down, (E, F, M))
    validation.check_shape("expert_ids", ids, (N, k))
    validation.check_shape("expert_weights", expert_weights, (N, k))
    if E < 1:
        raise ValueError(f"w_gate has shape {w_gate.shape}; allowed: 1 expert or more")
    if k < 1:
        raise ValueError(f"expert_ids has shape {ids.shape}; allowed: 1 expert per token or more")
    function = OPERATION.select(implementation, x, w_gate)
    if 0 in (N, M, F):
        return jnp.zeros_like(x)
    ids = integers.expert_ids_within(ids, E)
    weights = jnp.where(ids < E, expert_weights, jnp.zeros_like(expert_weights))
    return call_implementation("moe_mlp", function, lambda x_spec, *_: x_spec, x, w_gate, w_up, w_down, ids, weights)


def _reference(*args: Any) -> Array:
    from dantinox.reference import moe_mlp as specification

    return specification(*args)


def _pallas(*args: Any) -> Array:
    if dispatch.on_gpu():
        from dantinox.kernels.ops.moe.pallas_sm90 import vjp as sm90

        return sm90.moe_mlp(*args)
    return pallas.moe_mlp(*args)


def _triton(*args: Any) -> Array:
    from dantinox.kernels.ops.moe import triton

    return triton.moe_mlp(*args)


def _pallas_unsupported_inputs(x: Array, w_gate: Array) -> str | None:
    if reason := dispatch.symbolic_unsupported(x, w_gate):
        return reason
    if dispatch.on_gpu():
        from dantinox.kernels.ops.moe.pallas_sm90 import vjp as sm90

        return sm90.unsupported_inputs(x.dtype, *w_gate.shape[1:], weight="w_gate")
    if dispatch.on_tpu() and (reason := tpu_limits.unsupported_reason(x.dtype, *w_gate.shape[1:])):
        return reason
    return dispatch.float32_accumulation_unsupported(x.dtype)


def _triton_not_auto(*_: Any) -> str:
    return "it has not run on a GPU yet; pass implementation='triton' to use it"


_PROBE = functools.partial(probe.run, moe_mlp)
OPERATION = dispatch.Operation(
    "moe_mlp",
    (
        dispatch.Implementation("reference", _reference),
        dispatch.Implementation("xla", xla.moe_mlp),
        dispatch.Implementation(
            "pallas",
            _pallas,
            unsupported_device=functools.partial(dispatch.pallas_unsupported_device, "moe_mlp"),
            unsupported_inputs=_pallas_unsupported_inputs,
            not_auto=lambda *_: pallas_not_auto("moe_mlp", _PROBE),
        ),
        dispatch.Implementation(
            "triton", _triton, unsupported_device=dispatch.triton_unsupported_device, not_auto=_triton_not_auto
        ),
    ),
)
