"""Sliding-window, gated, grouped-query attention."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from dantinox.kernels import dispatch, validation
from dantinox.kernels.ops.attention import pallas, xla
from dantinox.kernels.ops.attention.pallas_cpu import block_sizes as cpu_block_sizes

Array = jax.Array


def attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    *,
    gate: Float[Array, "B T H #D"] | None = None,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    segment_ids: tuple[Int[Array, "B T"], Int[Array, "B S"]] | Int[Array, "B T"] | None = None,
    implementation: str = "auto",
) -> Float[Array, "B T H D"]:
    """Compute o = sigmoid(gate) * softmax(cap(scale * q k^T) + mask) v, differentiable in q, k, v and gate.

    Args:
        q: queries [B, T, H, D].
        k: keys [B, S, K, D]; H is a multiple of K.
        v: values [B, S, K, D]; q, k and v have one floating dtype.
        gate: logits [B, T, H, D] or [B, T, H, 1] in q's dtype, or None.
        causal: whether a query sees no later key; query t is at position S - T + t of the keys (bottom-right).
        window: number of keys that a query sees, its own included: 0 <= pos_q - pos_k < window; needs causal. None: no
            limit.
        scale: factor on the scores; None: D**-0.5.
        softcap: caps the scores s at softcap * tanh(s / softcap); None: no cap.
        segment_ids: (q_ids [B, T], kv_ids [B, S]) int32, or one [B, T] array if T == S; a query sees only keys of its
            own segment. None: one segment.
        implementation: auto, reference, xla, pallas or triton.

    Returns:
        [B, T, H, D] in q's dtype; zeros, with zero gradients, for a query that sees no key.

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
    S, K = k.shape[1], k.shape[2]
    validation.check_shape("k", k, (B, S, K, D))
    validation.check_shape("v", v, (B, S, K, D))
    validation.check_heads(H, K)
    if gate is not None:
        validation.check_shape("gate", gate, (B, T, H, D), (B, T, H, 1))
    validation.check_window(window, causal)
    validation.check_scalars(scale=scale, softcap=softcap)
    segment_ids = _check_segment_ids(segment_ids, B, T, S)

    if window is not None:
        window = min(int(window), max(S, 1))  # a longer window shows no more keys

    function = OPERATION.select(implementation, q, k, window)
    if 0 in (B, T, H, D):
        return q
    return function(
        q,
        k,
        v,
        gate=gate,
        causal=causal,
        window=window,
        scale=D**-0.5 if scale is None else scale,
        softcap=softcap,
        segment_ids=segment_ids,
    )


def _check_segment_ids(
    segment_ids: tuple[Array, Array] | Array | None, B: int, T: int, S: int
) -> tuple[Array, Array] | None:
    if segment_ids is None:
        return None
    if not isinstance(segment_ids, tuple | list):
        segment_ids = jnp.asarray(segment_ids)
        if T != S:
            raise ValueError(f"segment_ids is one array but T is {T} and S is {S}; allowed: (q_ids, kv_ids)")
        segment_ids = (segment_ids, segment_ids)
    if len(segment_ids) != 2:
        raise ValueError(f"segment_ids holds {len(segment_ids)} arrays; allowed: (q_ids [B, T], kv_ids [B, S])")
    q_ids, kv_ids = (jnp.asarray(ids) for ids in segment_ids)
    for name, ids, length in (("q_ids", q_ids, T), ("kv_ids", kv_ids, S)):
        validation.check_shape(f"segment_ids {name}", ids, (B, length))
        validation.check_integer(f"segment_ids {name}", ids)
    return q_ids, kv_ids


def _reference(*args: Any, **options: Any) -> Array:
    from dantinox.reference import attention as specification

    return specification(*args, **options)


def _pallas(*args: Any, **options: Any) -> Array:
    if dispatch.on_gpu():
        from dantinox.kernels.ops.attention.pallas_sm90 import vjp as sm90

        return sm90.attention(*args, **options)
    return pallas.attention(*args, **options)


def _pallas_unsupported_inputs(q: Array, k: Array, window: int | None) -> str | None:
    if dispatch.on_gpu():
        from dantinox.kernels.ops.attention.pallas_sm90 import vjp as sm90

        return sm90.unsupported_inputs(q.dtype, q.shape[-1])
    return dispatch.float32_accumulation_unsupported(q.dtype)


def _pallas_not_auto(q: Array, k: Array, window: int | None) -> str | None:
    if dispatch.on_gpu():
        return "the Hopper kernels have not run on a GPU yet; pass implementation='pallas' to use them"
    B, T, H, _ = q.shape
    if dispatch.current_device().platform == "cpu" and cpu_block_sizes.xla_is_faster(B, T, k.shape[1], H, window):
        return "interpreted, it is slow at these sizes"
    return None


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
        dispatch.Implementation.missing("triton", "attention has no Triton kernel yet"),
    ),
)
