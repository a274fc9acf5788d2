"""Sliding-window, gated, grouped-query attention."""

import importlib
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dantinox.kernels import validation
from dantinox.kernels.dispatch import on_gpu, select_implementation, unsupported_reason
from dantinox.kernels.ops.attention import pallas, xla
from dantinox.kernels.ops.attention.pallas_cpu import block_sizes as cpu_block_sizes

Array = jax.Array


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    gate: Array | None = None,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    segment_ids: tuple[Array, Array] | Array | None = None,
    implementation: str = "auto",
) -> Array:
    """Computes o = sigmoid(gate) * softmax(cap(scale * q k^T) + mask) v, differentiable in q, k, v and gate.

    Args:
        q: queries [B, T, H, D].
        k: keys [B, S, K, D]; H is a multiple of K.
        v: values [B, S, K, D]; q, k and v have one floating dtype.
        gate: logits [B, T, H, D] or [B, T, H, 1] in q's dtype, or None.
        causal: a query sees no later key; query t sits at key S - T + t (bottom-right).
        window: number of keys a query sees, itself included: 0 <= pos_q - pos_k < window; needs causal.
        scale: factor on the scores; None: D**-0.5.
        softcap: scores s become softcap * tanh(s / softcap).
        segment_ids: (q_ids [B, T], kv_ids [B, S]) int32, or one [B, T] array where T == S; a query sees only keys
            of its own segment.
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

    table = _table()
    if not isinstance(table["pallas"], str) and (reason := _unsupported_inputs(q.dtype, D)) is not None:
        table["pallas"] = reason
    not_auto = {}
    if on_gpu():
        not_auto["pallas"] = "Hopper's kernels have not run on a GPU yet; name them"
    elif cpu_block_sizes.xla_is_faster(B, T, S, H, window):
        not_auto["pallas"] = "interpreted, it is slow at these sizes"
    implementation_fn = select_implementation("attention", implementation, table, not_auto)
    if 0 in (B, T, H, D):
        return q
    return implementation_fn(
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


def _table() -> dict:
    def reference(*args, **kwargs):
        from dantinox.reference import attention as specification

        return specification(*args, **kwargs)

    return {
        "reference": reference,
        "xla": xla.attention,
        "pallas": unsupported_reason("attention", "pallas")
        or (_attention_of("pallas_sm90.vjp") if on_gpu() else pallas.attention),
        "triton": unsupported_reason("attention", "triton"),
    }


def _unsupported_inputs(dtype: jnp.dtype, D: int) -> str | None:
    """Why this device's Pallas kernel does not support these arrays, or None."""
    if on_gpu():
        return importlib.import_module("dantinox.kernels.ops.attention.pallas_sm90.vjp").unsupported_inputs(dtype, D)
    return "q has dtype float64 and it adds up in float32" if dtype == jnp.float64 else None


def _attention_of(module: str) -> Callable[..., Array]:
    """`attention` of a module beside this one, so that one line of the table can add a kernel."""
    return importlib.import_module(f"dantinox.kernels.ops.attention.{module}").attention


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
