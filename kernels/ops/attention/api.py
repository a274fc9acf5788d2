"""Sliding-window, gated, grouped-query attention."""

import functools
from collections.abc import Callable
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Float, Int

from dantinox.kernels import dispatch, first_use, integers, validation
from dantinox.kernels.call import call_implementation
from dantinox.kernels.ops.attention import pallas, probe, xla
from dantinox.kernels.ops.attention.common import with_equal_head_dims
from dantinox.kernels.ops.attention.lse import add_sinks
from dantinox.kernels.ops.attention.pallas_cpu import block_sizes as cpu_block_sizes
from dantinox.kernels.ops.attention.pallas_tpu import limits as tpu_limits

Array = jax.Array
MAX_TRITON_HEAD_DIM = 256


@overload
def attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K Dv"],
    *,
    gate: Float[Array, "B T H #Dv"] | None = None,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    segment_ids: tuple[Int[Array, "B T"], Int[Array, "B S"]] | Int[Array, "B T"] | None = None,
    sinks: Float[Array, "H"] | None = None,
    return_lse: Literal[False] = False,
    implementation: str = "auto",
) -> Float[Array, "B T H Dv"]: ...


@overload
def attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K Dv"],
    *,
    gate: Float[Array, "B T H #Dv"] | None = None,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    segment_ids: tuple[Int[Array, "B T"], Int[Array, "B S"]] | Int[Array, "B T"] | None = None,
    sinks: Float[Array, "H"] | None = None,
    return_lse: Literal[True],
    implementation: str = "auto",
) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B T H"]]: ...


def attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K Dv"],
    *,
    gate: Float[Array, "B T H #Dv"] | None = None,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    segment_ids: tuple[Int[Array, "B T"], Int[Array, "B S"]] | Int[Array, "B T"] | None = None,
    sinks: Float[Array, "H"] | None = None,
    return_lse: bool = False,
    implementation: str = "auto",
) -> Float[Array, "B T H Dv"] | tuple[Float[Array, "B T H Dv"], Float[Array, "B T H"]]:
    """Compute o = sigmoid(gate) * softmax(cap(scale * q k^T) + mask) v, differentiable in all arrays but the ids.

    Results are right wherever they fit the dtype, and the scaled scores and the products of cotangents and values of
    all pairs fit float32. Keys that no query of their sequence sees may hold anything, NaN included. A key that some
    queries see has no effect on the others if it is finite; a NaN or infinity in it may reach every query of its
    sequence and head.

    Args:
        q: queries [B, T, H, D].
        k: keys [B, S, K, D]; H is a multiple of K.
        v: values [B, S, K, Dv]; q, k and v have one floating dtype.
        gate: logits [B, T, H, Dv] or [B, T, H, 1] in q's dtype, or None.
        causal: whether a query sees no later key; query t is at position S - T + t of the keys (bottom-right).
        window: number of keys that a query sees, its own included: 0 <= pos_q - pos_k < window; needs causal. None: no
            limit.
        scale: factor on the scores; None: D**-0.5.
        softcap: caps the scores s at softcap * tanh(s / softcap); None: no cap.
        segment_ids: (q_ids [B, T], kv_ids [B, S]) of any integer dtype, or one [B, T] array if T == S; a query sees
            only keys of its own segment. None: one segment.
        sinks: logits [H] in float32 or q's dtype: each joins the sum of its head's softmax, as the score of a key whose
            value is zero, neither scaled nor capped. None: none.
        return_lse: whether to return the log-sum-exp of the scores too, for `merge_attention`.
        implementation: auto, reference, xla, pallas or triton.

    Returns:
        o [B, T, H, Dv] in q's dtype; zeros, with zero gradients, for a query that sees no key. With `return_lse`,
        (o, lse [B, T, H]): natural logarithms of the sums, sinks included, in float32 (float64 for float64); -inf for a
        query that sees neither a key nor a sink.

    Raises:
        ValueError: an argument's shape, dtype or value is not allowed.
        NotImplementedError: the named implementation cannot run here.
    """
    q, k, v = (
        validation.as_array("q", q, "BTHD"),
        validation.as_array("k", k, "BSKD"),
        validation.as_array("v", v, "BSKD"),
    )
    gate = None if gate is None else validation.as_array("gate", gate, "BTHD")
    validation.check_floating(q=q, k=k, v=v, gate=gate)
    B, T, H, D = q.shape
    S, K, Dv = k.shape[1], k.shape[2], v.shape[3]
    validation.check_shape("k", k, (B, S, K, D))
    validation.check_shape("v", v, (B, S, K, Dv))
    validation.check_heads(H, K)
    if gate is not None:
        validation.check_shape("gate", gate, (B, T, H, Dv), (B, T, H, 1))
    if sinks is not None:
        sinks = validation.check_sinks(sinks, H, q.dtype)
    causal = validation.check_flag("causal", causal)
    return_lse = validation.check_flag("return_lse", return_lse)
    window = validation.check_window(window, causal)
    scale, softcap = validation.check_scale(scale, D), validation.check_softcap(softcap)
    ids = _check_segment_ids(segment_ids, B, T, S)

    if window is not None:  # a longer window shows no more keys
        window = min(window, max(S, 1)) if isinstance(S, int) else min(window, integers.INT32.max)

    function = OPERATION.select(implementation, q, k, v, window, causal, ids is not None, softcap)
    if 0 in (B, T, H):
        o = q if Dv == D else jnp.zeros((B, T, H, Dv), q.dtype)
        return (o, jnp.zeros((B, T, H), jnp.promote_types(q.dtype, jnp.float32))) if return_lse else o
    if 0 in (D, Dv):
        function = xla.attention
    if Dv != D and function not in _BUILT_IN:
        function = _with_one_head_dim(function)
    options: dict[str, Any] = {}
    if sinks is not None or return_lse:
        function, options = _with_lse(function), {"sinks": sinks, "return_lse": return_lse}
    return call_implementation(
        "attention",
        function,
        lambda q_spec, *_: (q_spec, PartitionSpec(*q_spec[:3])) if return_lse else q_spec,
        q,
        k,
        v,
        gate=gate,
        causal=causal,
        window=window,
        scale=scale,
        softcap=softcap,
        segment_ids=ids,
        **options,
    )


@functools.cache
def _with_lse(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return an implementation that takes `sinks` and `return_lse` from one that takes `return_lse`."""

    def attention(*args: Any, sinks: Array | None, return_lse: bool, **options: Any) -> Any:
        if function is _reference:
            return function(*args, sinks=sinks, return_lse=return_lse, **options)
        if function in _BUILT_IN:
            o, lse = function(*args, return_lse=True, **options)
        else:
            o, lse = _call_for_lse(function, *args, **options)
        if sinks is not None:
            o, lse = add_sinks(o, lse, sinks)
        return (o, lse) if return_lse else o

    return attention


def _call_for_lse(function: Callable[..., Any], *args: Any, **options: Any) -> tuple[Array, Array]:
    """Call an implementation from elsewhere, which may return no log-sum-exp."""
    try:
        result = function(*args, return_lse=True, **options)
    except TypeError as error:
        if "return_lse" not in str(error):
            raise
        result = None
    if isinstance(result, tuple) and len(result) == 2:
        return result
    raise NotImplementedError(
        "attention: this implementation has no return_lse=True, which sinks need; implementation='xla' runs here"
    )


@functools.cache
def _with_one_head_dim(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return an implementation that takes values of another head dim from one that does not."""

    def attention(q: Array, k: Array, v: Array, *, gate: Array | None, **options: Any) -> Any:
        Dv = v.shape[-1]
        q, k, v, gate = with_equal_head_dims(q, k, v, gate)
        result = function(q, k, v, gate=gate, **options)
        return (result[0][..., :Dv], result[1]) if isinstance(result, tuple) else result[..., :Dv]

    return attention


def _check_segment_ids(segment_ids: Any, B: int, T: int, S: int) -> tuple[Array, Array] | None:
    if segment_ids is None:
        return None
    if not isinstance(segment_ids, tuple | list):
        if T != S:
            raise ValueError(f"segment_ids is one array but T is {T} and S is {S}; allowed: (q_ids, kv_ids)")
        ids = integers.as_integers("segment_ids q_ids", segment_ids, "BT")
        q_ids, kv_ids = ids, ids
    elif len(segment_ids) != 2:
        raise ValueError(f"segment_ids holds {len(segment_ids)} arrays; allowed: (q_ids [B, T], kv_ids [B, S])")
    else:
        q_ids = integers.as_integers("segment_ids q_ids", segment_ids[0], "BT")
        kv_ids = q_ids
        if segment_ids[1] is not segment_ids[0]:
            kv_ids = integers.as_integers("segment_ids kv_ids", segment_ids[1], "BS")
    validation.check_shape("segment_ids q_ids", q_ids, (B, T))
    validation.check_shape("segment_ids kv_ids", kv_ids, (B, S))
    return integers.comparable_ids(q_ids, kv_ids)


def _reference(*args: Any, **options: Any) -> Any:
    from dantinox.reference import attention as specification

    return specification(*args, **options)


def _pallas(*args: Any, **options: Any) -> Any:
    if dispatch.on_gpu():
        from dantinox.kernels.ops.attention.pallas_sm90 import vjp as sm90

        return sm90.attention(*args, **options)
    return pallas.attention(*args, **options)


def _pallas_unsupported_inputs(
    q: Array, k: Array, v: Array, window: int | None, causal: bool, packed: bool, softcap: float | None
) -> str | None:
    if reason := dispatch.symbolic_unsupported(q, k, v):
        return reason
    if dispatch.on_gpu():
        from dantinox.kernels.ops.attention.pallas_sm90 import vjp as sm90

        return sm90.unsupported_inputs(q.dtype, max(q.shape[-1], v.shape[-1]), softcap)
    if reason := dispatch.float32_accumulation_unsupported(q.dtype):
        return reason
    if dispatch.on_tpu():
        device = dispatch.current_device()
        return tpu_limits.unsupported_reason(q, k, v, device, causal=causal, window=window, packed=packed)
    return None


def _triton_unsupported_inputs(
    q: Array, k: Array, v: Array, window: int | None, causal: bool, packed: bool, softcap: float | None
) -> str | None:
    D = max(q.shape[-1], v.shape[-1])
    if reason := dispatch.symbolic_unsupported(q, k, v) or dispatch.float32_accumulation_unsupported(q.dtype):
        return reason
    return f"D is {D}; its Triton kernels take at most {MAX_TRITON_HEAD_DIM}" if D > MAX_TRITON_HEAD_DIM else None


def _pallas_not_auto(
    q: Array, k: Array, v: Array, window: int | None, causal: bool, packed: bool, softcap: float | None
) -> str | None:
    if dispatch.on_gpu():
        return _gpu_disagreement("pallas", q.dtype.name, max(q.shape[-1], v.shape[-1]))
    B, T, H, _ = q.shape
    if dispatch.current_device().platform == "cpu" and cpu_block_sizes.xla_is_faster(B, T, k.shape[1], H, window):
        return "interpreted, it is slow at these sizes"
    if dispatch.on_tpu():
        return first_use.disagreement("attention", _PROBE)
    return None


def _triton_not_auto(
    q: Array, k: Array, v: Array, window: int | None, causal: bool, packed: bool, softcap: float | None
) -> str | None:
    return _gpu_disagreement("triton", q.dtype.name, max(q.shape[-1], v.shape[-1]))


def _gpu_disagreement(implementation: str, dtype: str, D: int) -> str | None:
    return first_use.disagreement("attention", _gpu_probe(dtype, D), implementation, f"{dtype}, D {D}")


@functools.cache
def _gpu_probe(dtype: str, D: int) -> first_use.Probe:
    """Return the probe of one dtype and head dim, which determine the blocks of a GPU's kernels."""
    return functools.partial(probe.run, attention, dtypes=(dtype,), D=D, tf32=True)


_PROBE = functools.partial(probe.run, attention)
OPERATION = dispatch.Operation(
    "attention",
    (
        dispatch.Implementation("reference", _reference),
        dispatch.Implementation("xla", xla.attention),
        dispatch.Implementation(
            "pallas",
            _pallas,
            unsupported_device=functools.partial(dispatch.pallas_unsupported_device, "attention"),
            unsupported_inputs=_pallas_unsupported_inputs,
            not_auto=_pallas_not_auto,
        ),
        dispatch.Implementation(
            "triton",
            dispatch.lazy("dantinox.kernels.ops.attention.triton.vjp:attention"),
            unsupported_device=dispatch.triton_unsupported_device,
            unsupported_inputs=_triton_unsupported_inputs,
            not_auto=_triton_not_auto,
        ),
    ),
)
_BUILT_IN = frozenset(implementation.function for implementation in OPERATION.implementations)
