"""The public grouped matmul: argument checks and the choice of an implementation."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Float, Int

from dantinox.kernels import dispatch, first_use, integers, validation
from dantinox.kernels.call import call_implementation
from dantinox.kernels.ops.grouped_matmul import pallas, probe, xla
from dantinox.kernels.ops.grouped_matmul.pallas_tpu import limits as tpu_limits

Array = jax.Array


def grouped_matmul(
    x: Float[Array, "N M"],
    w: Float[Array, "E M F"],
    group_sizes: Int[Array, "E"],
    *,
    implementation: str = "auto",
) -> Float[Array, "N F"]:
    """Compute y[n] = x[n] @ w[e] for row n of group e; differentiable in x and w.

    Rows past the sum of the sizes and matrices of empty groups may hold anything, NaN included. A NaN in a row or a
    matrix reaches the results of its group only.

    Args:
        x: rows [N, M], sorted by group.
        w: matrix of each group [E, M, F] in x's dtype.
        group_sizes: rows of each group [E] of any integer dtype, each at least 0, summing to at most N. In an array on
            a device, negative sizes count as 0 and groups end at row N.
        implementation: auto, reference, xla, pallas or triton.

    Returns:
        [N, F] in x's dtype; rows past the sum of the sizes are exactly zero.

    Raises:
        ValueError: an argument's shape, dtype or value is not allowed.
        NotImplementedError: the named implementation cannot run here.
    """
    x, w = validation.as_array("x", x, "NM"), validation.as_array("w", w, "EMF")
    sizes = integers.as_integers("group_sizes", group_sizes, "E")
    validation.check_floating(x=x, w=w)
    E, _, F = w.shape
    validation.check_shape("w", w, (E, x.shape[1], F))
    validation.check_shape("group_sizes", sizes, (E,))
    function = OPERATION.select(implementation, x, w)
    if 0 in (*x.shape, *w.shape):
        return jnp.zeros((x.shape[0], F), x.dtype)
    return call_implementation(
        "grouped_matmul", function, _out_specs, x, w, integers.group_sizes_within(sizes, x.shape[0])
    )


def _out_specs(x: PartitionSpec, w: PartitionSpec, _: PartitionSpec) -> PartitionSpec:
    """Return the rows' axes and the columns', unless they are the same."""
    return PartitionSpec(x[0], w[2] if w[2] != x[0] else None)


def _reference(*args: Any) -> Array:
    from dantinox.reference import grouped_matmul as specification

    return specification(*args)


def _pallas(*args: Any) -> Array:
    if dispatch.on_gpu():
        from dantinox.kernels.ops.grouped_matmul.pallas_sm90 import vjp as sm90

        return sm90.grouped_matmul(*args)
    return pallas.grouped_matmul(*args)


def _pallas_unsupported_inputs(x: Array, w: Array) -> str | None:
    if reason := dispatch.symbolic_unsupported(x, w):
        return reason
    if dispatch.on_gpu():
        from dantinox.kernels.ops.grouped_matmul.pallas_sm90 import vjp as sm90

        return sm90.unsupported_inputs(x.dtype, *w.shape[1:])
    if dispatch.on_tpu() and (reason := tpu_limits.unsupported_reason(x.dtype, *w.shape[1:])):
        return reason
    return dispatch.float32_accumulation_unsupported(x.dtype)


def pallas_not_auto(op: str, check: first_use.Probe, gpu_check: first_use.Probe, dtype: str) -> str | None:
    """Return why "auto" does not take the Pallas kernels of grouped matmul or of the mixture of experts, or None.

    Interpreted, grouped matmul takes 0.75 to 1.0 times as long as `xla.py` and the mixture of experts 0.9 to 1.1 times,
    1.2 for a single token; a mixture with its gradients compiles in 1.2 s instead of 0.7.

    Args:
        op: the operation.
        check: runs the problems on which the kernels are checked on a TPU.
        gpu_check: runs those of a GPU, in one dtype.
        dtype: name of that dtype.
    """
    if dispatch.on_tpu():
        return first_use.disagreement(op, check)
    if dispatch.on_gpu():
        return first_use.disagreement(op, gpu_check, "pallas", dtype)
    return "interpreted, it takes longer to compile"


def _pallas_not_auto(x: Array, w: Array) -> str | None:
    return pallas_not_auto("grouped_matmul", _PROBE, _gpu_probe(x.dtype.name), x.dtype.name)


def _triton_unsupported_inputs(x: Array, w: Array) -> str | None:
    return dispatch.symbolic_unsupported(x, w) or dispatch.float32_accumulation_unsupported(x.dtype)


def _triton_not_auto(x: Array, w: Array) -> str | None:
    return first_use.disagreement("grouped_matmul", _gpu_probe(x.dtype.name), "triton", x.dtype.name)


@functools.cache
def _gpu_probe(dtype: str) -> first_use.Probe:
    """Return the probe of one dtype, which determines the tiles of a GPU's kernels."""
    return functools.partial(probe.run, grouped_matmul, dtypes=(dtype,), tf32=True)


_PROBE = functools.partial(probe.run, grouped_matmul)
OPERATION = dispatch.Operation(
    "grouped_matmul",
    (
        dispatch.Implementation("reference", _reference),
        dispatch.Implementation("xla", xla.grouped_matmul),
        dispatch.Implementation(
            "pallas",
            _pallas,
            unsupported_device=functools.partial(dispatch.pallas_unsupported_device, "grouped_matmul"),
            unsupported_inputs=_pallas_unsupported_inputs,
            not_auto=_pallas_not_auto,
        ),
        dispatch.Implementation(
            "triton",
            dispatch.lazy("dantinox.kernels.ops.grouped_matmul.triton.vjp:grouped_matmul"),
            unsupported_device=dispatch.triton_unsupported_device,
            unsupported_inputs=_triton_unsupported_inputs,
            not_auto=_triton_not_auto,
        ),
    ),
)
