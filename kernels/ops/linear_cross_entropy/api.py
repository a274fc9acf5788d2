"""The public linear cross-entropy: argument checks and the choice of an implementation."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Float, Int

from dantinox.kernels import dispatch, first_use, integers, validation
from dantinox.kernels.call import call_implementation
from dantinox.kernels.ops.linear_cross_entropy import pallas, probe, xla
from dantinox.kernels.ops.linear_cross_entropy.pallas_tpu import limits as tpu_limits

Array = jax.Array


def linear_cross_entropy(
    h: Float[Array, "N M"],
    w: Float[Array, "V M"],
    targets: Int[Array, "N"],
    *,
    softcap: float | None = None,
    z_loss: float = 0.0,
    implementation: str = "auto",
) -> Float[Array, "N"]:
    """Compute the cross-entropy of each row's logits s = cap(h w^T), without keeping more than a tile of them.

    loss[n] = logsumexp(s[n]) - s[n, targets[n]] + z_loss * logsumexp(s[n])^2. Differentiable in h and w. A row whose
    target is negative takes no part: its loss and its gradient are 0, it may hold anything, NaN included, and it
    reaches no other result.

    Args:
        h: rows [N, M], such as the last hidden states of N tokens.
        w: projection [V, M] to the vocabulary, in h's dtype.
        targets: index of each row's target [N] of any integer dtype; below 0: the row takes no part. In an array on a
            device, a target of V or more takes no part either.
        softcap: bound of the logits, cap(s) = softcap * tanh(s / softcap); None: cap(s) = s.
        z_loss: weight of the squared logsumexp, at least 0.
        implementation: auto, reference, xla, pallas or triton.

    Returns:
        [N] float32 (float64 for float64), in nats.

    Raises:
        ValueError: an argument's shape, dtype or value is not allowed.
        NotImplementedError: the named implementation cannot run here.
    """
    h, w = validation.as_array("h", h, "NM"), validation.as_array("w", w, "VM")
    ids = integers.as_integers("targets", targets, "N")
    validation.check_floating(h=h, w=w)
    (N, M), V = h.shape, w.shape[0]
    validation.check_shape("w", w, (V, M))
    validation.check_shape("targets", ids, (N,))
    softcap, z_loss = validation.check_softcap(softcap), validation.check_z_loss(z_loss)
    ids = integers.targets_within(ids, V)
    function = OPERATION.select(implementation, h, w, softcap)
    if 0 in (N, V):
        return jnp.zeros(N, jnp.promote_types(h.dtype, jnp.float32))
    if M == 0:  # every logit is 0
        h, w = jnp.zeros((N, 1), h.dtype), jnp.zeros((V, 1), w.dtype)
    return call_implementation("linear_cross_entropy", function, _out_specs, h, w, ids, softcap=softcap, z_loss=z_loss)


def _out_specs(h: PartitionSpec, w: PartitionSpec, targets: PartitionSpec) -> PartitionSpec:
    """Return the rows' axes."""
    return PartitionSpec(h[0])


def _reference(*args: Any, **options: Any) -> Array:
    from dantinox.reference import linear_cross_entropy as specification

    return specification(*args, **options)


def _pallas(*args: Any, **options: Any) -> Array:
    if dispatch.on_gpu():
        from dantinox.kernels.ops.linear_cross_entropy.pallas_sm90 import vjp as sm90

        return sm90.linear_cross_entropy(*args, **options)
    return pallas.linear_cross_entropy(*args, **options)


def _pallas_unsupported_inputs(h: Array, w: Array, softcap: float | None) -> str | None:
    if reason := dispatch.symbolic_unsupported(h, w):
        return reason
    if dispatch.on_gpu():
        from dantinox.kernels.ops.linear_cross_entropy.pallas_sm90 import vjp as sm90

        return sm90.unsupported_inputs(h.dtype, softcap)
    if dispatch.on_tpu() and (reason := tpu_limits.unsupported_reason(h.dtype, h.shape[1])):
        return reason
    return dispatch.float32_accumulation_unsupported(h.dtype)


def _pallas_not_auto(h: Array, w: Array, softcap: float | None) -> str | None:
    if dispatch.on_gpu():
        return _gpu_disagreement("pallas", h.dtype.name)
    if dispatch.on_tpu():
        return first_use.disagreement("linear_cross_entropy", _PROBE)
    return "interpreted, it computes the logits twice in the backward pass"


def _triton_unsupported_inputs(h: Array, w: Array, softcap: float | None) -> str | None:
    return dispatch.symbolic_unsupported(h, w) or dispatch.float32_accumulation_unsupported(h.dtype)


def _triton_not_auto(h: Array, w: Array, softcap: float | None) -> str | None:
    return _gpu_disagreement("triton", h.dtype.name)


def _gpu_disagreement(implementation: str, dtype: str) -> str | None:
    return first_use.disagreement("linear_cross_entropy", _gpu_probe(dtype), implementation, dtype)


@functools.cache
def _gpu_probe(dtype: str) -> first_use.Probe:
    """Return the probe of one dtype, which determines the tiles of a GPU's kernels."""
    return functools.partial(probe.run, linear_cross_entropy, dtypes=(dtype,), tf32=True)


_PROBE = functools.partial(probe.run, linear_cross_entropy)
OPERATION = dispatch.Operation(
    "linear_cross_entropy",
    (
        dispatch.Implementation("reference", _reference),
        dispatch.Implementation("xla", xla.linear_cross_entropy),
        dispatch.Implementation(
            "pallas",
            _pallas,
            unsupported_device=functools.partial(dispatch.pallas_unsupported_device, "linear_cross_entropy"),
            unsupported_inputs=_pallas_unsupported_inputs,
            not_auto=_pallas_not_auto,
        ),
        dispatch.Implementation(
            "triton",
            dispatch.lazy("dantinox.kernels.ops.linear_cross_entropy.triton.vjp:linear_cross_entropy"),
            unsupported_device=dispatch.triton_unsupported_device,
            unsupported_inputs=_triton_unsupported_inputs,
            not_auto=_triton_not_auto,
        ),
    ),
)
