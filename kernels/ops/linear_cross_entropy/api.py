"""The public linear cross-entropy: argument checks and the choice of an implementation."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Float, Int

from dantinox.kernels import dispatch, integers, validation
from dantinox.kernels.call import call_implementation
from dantinox.kernels.ops.linear_cross_entropy import xla

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
    function = OPERATION.select(implementation, h, w)
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


OPERATION = dispatch.Operation(
    "linear_cross_entropy",
    (
        dispatch.Implementation("reference", _reference),
        dispatch.Implementation("xla", xla.linear_cross_entropy),
        dispatch.Implementation.missing("pallas", "linear_cross_entropy has no Pallas kernel yet"),
        dispatch.Implementation.missing("triton", "linear_cross_entropy has no Triton kernel yet"),
    ),
)
