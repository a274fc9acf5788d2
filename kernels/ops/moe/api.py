"""The public mixture of experts: argument checks and the choice of an implementation."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from dantinox.kernels import dispatch, first_use, integers, validation
from dantinox.kernels.call import call_implementation
from dantinox.kernels.ops.grouped_matmul.api import pallas_not_auto
from dantinox.kernels.ops.grouped_matmul.pallas_tpu import limits as tpu_limits
from dantinox.kernels.ops.moe import pallas, probe, xla
from dantinox.kernels.ops.moe.swiglu import Activation

Array = jax.Array


def moe_mlp(
    x: Float[Array, "N M"],
    w_gate: Float[Array, "E M F"],
    w_up: Float[Array, "E M F"],
    w_down: Float[Array, "E F M"],
    expert_ids: Int[Array, "N k"],
    expert_weights: Float[Array, "N k"],
    *,
    b_gate: Float[Array, "E F"] | None = None,
    b_up: Float[Array, "E F"] | None = None,
    b_down: Float[Array, "E M"] | None = None,
    activation: Activation = "swiglu",
    implementation: str = "auto",
) -> Float[Array, "N M"]:
    """Compute y[n] = sum_j expert_weights[n, j] * (silu(x[n] w_gate[e]) * (x[n] w_up[e])) w_down[e].

    e is expert_ids[n, j]. Dropless; the cost grows with the N * k routed rows, not with E. Differentiable in all but
    the ids. Matrices and biases of experts without tokens may hold anything, NaN included; a NaN in a token reaches its
    own output and the gradients of its experts only.

    The biases b_gate[e] and b_up[e] are added to the two products of x[n], and b_down[e] to the output of each expert
    before it is weighted. ("swiglu_clamped", limit, alpha) puts g' * sigmoid(alpha * g') * (u' + 1) in place of
    silu(g) * u, with g' = min(g, limit) and u' = u clipped to [-limit, limit], as OpenAI's gpt-oss does with a limit of
    7 and an alpha of 1.702. The derivative of a clamp is 1 up to its limit, that included, and 0 beyond it.

    Args:
        x: tokens [N, M].
        w_gate: gate projections [E, M, F] in x's dtype.
        w_up: up projections [E, M, F] in x's dtype.
        w_down: down projections [E, F, M] in x's dtype.
        expert_ids: experts of each token [N, k] of any integer dtype; an id outside [0, E) contributes nothing.
        expert_weights: weight of each choice [N, k], of any floating dtype.
        b_gate: biases of the gates [E, F] in x's dtype. None: none.
        b_up: biases of the up projections [E, F] in x's dtype. None: none.
        b_down: biases of the down projections [E, M] in x's dtype. None: none.
        activation: "swiglu", or ("swiglu_clamped", limit, alpha) of positive numbers.
        implementation: auto, reference, xla, pallas or triton.

    Returns:
        [N, M] in x's dtype.

    Raises:
        ValueError: an argument's shape, dtype or value is not allowed.
        NotImplementedError: the named implementation cannot run here.
    """
    x, w_gate = validation.as_array("x", x, "NM"), validation.as_array("w_gate", w_gate, "EMF")
    w_up, w_down = validation.as_array("w_up", w_up, "EMF"), validation.as_array("w_down", w_down, "EFM")
    ids = integers.as_integers("expert_ids", expert_ids, "Nk")
    expert_weights = validation.as_array("expert_weights", expert_weights, "Nk")
    b_gate, b_up, b_down = (
        b if b is None else validation.as_array(name, b, axes)
        for name, b, axes in (("b_gate", b_gate, "EF"), ("b_up", b_up, "EF"), ("b_down", b_down, "EM"))
    )
    validation.check_floating(x=x, w_gate=w_gate, w_up=w_up, w_down=w_down, b_gate=b_gate, b_up=b_up, b_down=b_down)
    validation.check_floating(expert_weights=expert_weights)
    (N, M), (E, _, F) = x.shape, w_gate.shape
    k = ids.shape[1]
    validation.check_shape("w_gate", w_gate, (E, M, F))
    validation.check_shape("w_up", w_up, (E, M, F))
    validation.check_shape("w_down", w_down, (E, F, M))
    validation.check_shape("expert_ids", ids, (N, k))
    validation.check_shape("expert_weights", expert_weights, (N, k))
    options: dict[str, Any] = {}
    for name, b, width in (("b_gate", b_gate, F), ("b_up", b_up, F), ("b_down", b_down, M)):
        if b is not None:
            validation.check_shape(name, b, (E, width))
            options[name] = b
    activation = validation.check_moe_activation(activation)
    if activation != "swiglu":
        options["activation"] = activation
    if E < 1:
        raise ValueError(f"w_gate has shape {w_gate.shape}; allowed: 1 expert or more")
    if k < 1:
        raise ValueError(f"expert_ids has shape {ids.shape}; allowed: 1 expert per token or more")
    function = OPERATION.select(implementation, x, w_gate)
    if 0 in (N, M) or (F == 0 and b_down is None):
        return jnp.zeros_like(x)
    if F == 0:  # b_down remains
        function = _reference
    elif options and function not in _BUILT_IN:
        function = _refuse_options(function)
    ids = integers.expert_ids_within(ids, E)
    weights = jnp.where(ids < E, expert_weights, jnp.zeros_like(expert_weights))
    return call_implementation(
        "moe_mlp", function, lambda x_spec, *_: x_spec, x, w_gate, w_up, w_down, ids, weights, **options
    )


@functools.cache
def _refuse_options(function: Callable[..., Array]) -> Callable[..., Array]:
    """Return an implementation from elsewhere that says so if it takes no biases or no other activation."""

    def moe_mlp(*args: Array, **options: Any) -> Array:
        try:
            return function(*args, **options)
        except TypeError as error:
            missing = next((name for name in options if f"argument '{name}'" in str(error)), None)
            if missing is None:
                raise
        raise NotImplementedError(f"moe_mlp: this implementation takes no {missing}; implementation='xla' runs here")

    return moe_mlp


def _reference(*args: Any, **options: Any) -> Array:
    from dantinox.reference import moe_mlp as specification

    return specification(*args, **options)


def _pallas(*args: Any, **options: Any) -> Array:
    if dispatch.on_gpu():
        from dantinox.kernels.ops.moe.pallas_sm90 import vjp as sm90

        return sm90.moe_mlp(*args, **options)
    return pallas.moe_mlp(*args, **options)


def _pallas_unsupported_inputs(x: Array, w_gate: Array) -> str | None:
    if reason := dispatch.symbolic_unsupported(x, w_gate):
        return reason
    if dispatch.on_gpu():
        from dantinox.kernels.ops.moe.pallas_sm90 import vjp as sm90

        return sm90.unsupported_inputs(x.dtype, *w_gate.shape[1:], weight="w_gate")
    if dispatch.on_tpu() and (reason := tpu_limits.unsupported_reason(x.dtype, *w_gate.shape[1:])):
        return reason
    return dispatch.float32_accumulation_unsupported(x.dtype)


def _pallas_not_auto(x: Array, w_gate: Array) -> str | None:
    return pallas_not_auto("moe_mlp", _PROBE, _gpu_probe(x.dtype.name), x.dtype.name)


def _triton_unsupported_inputs(x: Array, w_gate: Array) -> str | None:
    return dispatch.symbolic_unsupported(x, w_gate) or dispatch.float32_accumulation_unsupported(x.dtype)


def _triton_not_auto(x: Array, w_gate: Array) -> str | None:
    return first_use.disagreement("moe_mlp", _gpu_probe(x.dtype.name), "triton", x.dtype.name)


@functools.cache
def _gpu_probe(dtype: str) -> first_use.Probe:
    """Return the probe of one dtype, which determines the tiles of a GPU's kernels."""
    return functools.partial(probe.run, moe_mlp, dtypes=(dtype,), tf32=True)


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
            not_auto=_pallas_not_auto,
        ),
        dispatch.Implementation(
            "triton",
            dispatch.lazy("dantinox.kernels.ops.moe.triton.vjp:moe_mlp"),
            unsupported_device=dispatch.triton_unsupported_device,
            unsupported_inputs=_triton_unsupported_inputs,
            not_auto=_triton_not_auto,
        ),
    ),
)
_BUILT_IN = frozenset(implementation.function for implementation in OPERATION.implementations)
