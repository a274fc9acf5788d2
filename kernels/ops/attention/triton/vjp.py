"""The Triton attention with its derivative."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dantinox.kernels import dispatch
from dantinox.kernels.derivatives import first_order
from dantinox.kernels.ops.attention.common import split_small_scale, with_equal_head_dims, without_keys
from dantinox.kernels.ops.attention.lse import natural_lse
from dantinox.kernels.ops.attention.segment_ids import zero_unattended_keys
from dantinox.kernels.ops.attention.triton.bwd import backward
from dantinox.kernels.ops.attention.triton.common import TritonAttentionConfig
from dantinox.kernels.ops.attention.triton.fwd import Segments, forward
from dantinox.kernels.triton_call import fold_vmap
from dantinox.kernels.triton_math import float32_precision
from dantinox.kernels.vma import call_invariant

Array = jax.Array
Residuals = tuple[Array, Array, Array, Array | None, Segments | None, Array, Array]


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    gate: Array | None,
    causal: bool,
    window: int | None,
    scale: float,
    softcap: float | None,
    segment_ids: Segments | None,
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:
    """See `dantinox.kernels.attention`, which checks the arguments."""
    T, S, Dv = q.shape[1], k.shape[1], v.shape[3]
    if S == 0:
        return without_keys(q, Dv, return_lse)
    q, k, v, gate = with_equal_head_dims(q, k, v, gate)
    q, k, scale = split_small_scale(q, k, scale)
    k, v, segment_ids = zero_unattended_keys(k, v, segment_ids, T=T, causal=causal, window=window)
    if segment_ids is not None:
        segment_ids = segment_ids[0].astype(jnp.int32), segment_ids[1].astype(jnp.int32)
    capability = dispatch.compute_capability()
    assert capability is not None  # `dispatch.triton_unsupported_device` has seen it
    config = TritonAttentionConfig(causal, window, float(scale), softcap, float32_precision(), capability)
    o, lse = _attention(q, k, v, gate, segment_ids, config)
    o = o[..., :Dv]
    return (o, lse) if return_lse else o


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(
    q: Array, k: Array, v: Array, gate: Array | None, segments: Segments | None, config: TritonAttentionConfig
) -> tuple[Array, Array]:
    """Return the output and the log-sum-exp [B, T, H], natural and -inf where a row sees no key."""
    o, lse = _run(forward, config)(q, k, v, gate, segments)
    return o, natural_lse(lse)


def _attention_fwd(
    q: Array, k: Array, v: Array, gate: Array | None, segments: Segments | None, config: TritonAttentionConfig
) -> tuple[tuple[Array, Array], Residuals]:
    o, lse = first_order(_run(forward, config), "attention", "triton")(q, k, v, gate, segments)
    return (o, natural_lse(lse)), (q, k, v, gate, segments, o, lse)


def _attention_bwd(config: TritonAttentionConfig, residuals: Residuals, cotangents: tuple[Array, Array]) -> tuple:
    q, k, v, gate, segments, o, lse = residuals
    do, dlse = cotangents
    do, dgate, delta = _bwd_preprocess(do, o, gate)
    delta -= dlse.swapaxes(1, 2)  # both reach a score by way of its weight: ds = p (dp - delta + dlse)
    run = first_order(_run(backward, config), "attention", "triton")
    return *run(q, k, v, do, lse, delta, segments), dgate, None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _run(kernel: Callable[..., Any], config: TritonAttentionConfig) -> Callable[..., Any]:
    """Return a kernel's call that knows `vmap` and `shard_map`."""
    return functools.partial(call_invariant, fold_vmap(functools.partial(kernel, config=config)))


def _bwd_preprocess(do: Array, o: Array, gate: Array | None) -> tuple[Array, Array | None, Array]:
    """Return (cotangent of the ungated output, dgate, delta [B, H, T]) from the gated output o."""
    wide_do = do.astype(jnp.float32)
    do_o = wide_do * o.astype(jnp.float32)
    delta = jnp.sum(do_o, axis=-1).swapaxes(1, 2)
    if gate is None:
        return do, None, delta
    logits = gate.astype(jnp.float32)
    dgate = do_o * jax.nn.sigmoid(-logits)  # o has the factor sigmoid(gate); 1 - sigmoid would round to zero
    if gate.shape[-1] == 1:
        dgate = jnp.sum(dgate, axis=-1, keepdims=True)
    do = wide_do * jax.nn.sigmoid(logits)
    return do if o.dtype == jnp.float16 else do.astype(o.dtype), dgate.astype(gate.dtype), delta
