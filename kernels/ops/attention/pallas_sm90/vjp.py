"""Attention on Hopper: the operation and its custom derivative around the forward and backward kernels.

The forward kernel stores two residuals, the output without its gate and the log-sum-exp of each row, and only if
gradients are needed. One pass over do and o in plain jnp, which XLA fuses, precedes the backward kernels:

    do' = do * sigmoid(gate)      dgate = sum(do * o') * sigmoid'(gate)      delta = sum(do' * o')      o' without gate
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from dantinox.kernels.derivatives import first_order
from dantinox.kernels.mosaic_gpu import softcap_unsupported, unsupported_head_dim
from dantinox.kernels.ops.attention.common import split_small_scale, with_equal_head_dims, without_keys
from dantinox.kernels.ops.attention.lse import natural_lse
from dantinox.kernels.ops.attention.pallas_sm90 import bwd, fwd
from dantinox.kernels.ops.attention.pallas_sm90.common import TMA_ROWS, Segments, Sm90AttentionConfig
from dantinox.kernels.ops.attention.pallas_sm90.fwd_kernel import FwdOutputs
from dantinox.kernels.ops.attention.segment_ids import zero_unattended_keys
from dantinox.kernels.vma import call_invariant

Array = jax.Array
Residuals = tuple[Array, Array, Array, Array | None, Segments | None, Array, Array]
DTYPES = (jnp.bfloat16, jnp.float16)


def unsupported_inputs(dtype: jnp.dtype, D: int, softcap: float | None) -> str | None:
    """Return why the kernels do not support these arrays and this soft cap, or None if they do."""
    if dtype not in DTYPES:
        return f"q has dtype {jnp.dtype(dtype)} and Hopper's tensor cores take bfloat16 and float16 here"
    return softcap_unsupported(softcap) or unsupported_head_dim(D)


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
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Array | tuple[Array, Array]:
    """See `dantinox.kernels.attention`, which checks the arguments; with `interpret` the kernels run on the CPU.

    Raises:
        NotImplementedError: the kernels do not support the dtype, the head dim or the soft cap.
    """
    Dv = v.shape[-1]
    q, k, v, gate = with_equal_head_dims(q, k, v, gate)
    if (reason := unsupported_inputs(q.dtype, q.shape[-1], softcap)) is not None:
        raise NotImplementedError(f"attention: implementation='pallas' cannot run here: {reason}")
    T, (S, K) = q.shape[1], k.shape[1:3]
    if 0 in q.shape or S == 0:
        return without_keys(q, Dv, return_lse)
    q, k, scale = split_small_scale(q, k, scale)
    k, v, segment_ids = zero_unattended_keys(k, v, segment_ids, T=T, causal=causal, window=window)
    S = k.shape[1]
    if segment_ids is not None:
        segment_ids = segment_ids[0].astype(jnp.int32), segment_ids[1].astype(jnp.int32)
    config = Sm90AttentionConfig(T, S, q.shape[2] // K, causal, window, float(scale), softcap, interpret)
    o, lse = _attention(q, k, v, gate, segment_ids, config, return_lse)
    return o[..., :Dv] if lse is None else (o[..., :Dv], lse)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attention(
    q: Array,
    k: Array,
    v: Array,
    gate: Array | None,
    segments: Segments | None,
    config: Sm90AttentionConfig,
    return_lse: bool,
) -> tuple[Array, Array | None]:
    """Return the output and, if requested, the log-sum-exp [B, T, H], natural and -inf where a row sees no key."""
    run = functools.partial(padded_forward, config=config, residuals=False, lse=return_lse)
    out = call_invariant(run, q, k, v, gate, segments)
    return out.o, natural_lse(out.lse) if return_lse else None


def _attention_fwd(q, k, v, gate, segments, config, return_lse) -> tuple[tuple[Array, Array | None], Residuals]:
    run = functools.partial(padded_forward, config=config, residuals=True, lse=True)
    out = _call_kernel(run, q, k, v, gate, segments)
    # Rows without a key have an infinite lse, which `jax_debug_infs` would report.
    lse = jnp.minimum(out.lse, jnp.finfo(jnp.float32).max)
    o_ungated = out.o if out.o_ungated is None else out.o_ungated
    return (out.o, natural_lse(lse) if return_lse else None), (q, k, v, gate, segments, o_ungated, lse)


def _attention_bwd(
    config: Sm90AttentionConfig, return_lse: bool, residuals: Residuals, cotangents: tuple[Array, Array | None]
) -> tuple:
    q, k, v, gate, segments, o_ungated, lse = residuals
    do, dlse = cotangents
    do, dgate, delta = bwd_preprocess(do, o_ungated, gate)
    if dlse is not None:
        delta -= dlse.swapaxes(1, 2)  # both reach a score by way of its weight: ds = p (dp - delta + dlse)
    run = functools.partial(bwd.backward, config=config)
    return *_call_kernel(run, q, k, v, do, lse, delta, segments), dgate, None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _call_kernel[R](kernel: Callable[..., R], *args: Any) -> R:
    """Call the forward kernel with residuals or the backward kernels, which have no derivative."""
    return first_order(functools.partial(call_invariant, kernel), "attention")(*args)


def padded_forward(
    q: Array,
    k: Array,
    v: Array,
    gate: Array | None,
    segments: Segments | None,
    config: Sm90AttentionConfig,
    *,
    residuals: bool,
    lse: bool,
) -> FwdOutputs:
    """Run the forward kernel on lengths padded to whole TMA tiles and slice its outputs to T."""

    def pad(x: Array | None) -> Array | None:
        return x if x is None else jnp.pad(x, ((0, 0), (0, -x.shape[1] % TMA_ROWS), (0, 0), (0, 0)))

    out = fwd.forward(pad(q), pad(k), pad(v), pad(gate), segments, config, residuals=residuals, lse=lse)
    return FwdOutputs(
        o=out.o[:, : config.T],
        lse=None if out.lse is None else out.lse[..., : config.T],
        o_ungated=None if out.o_ungated is None else out.o_ungated[:, : config.T],
    )


def bwd_preprocess(do: Array, o_ungated: Array, gate: Array | None) -> tuple[Array, Array | None, Array]:
    """Return (cotangent of the ungated output, dgate, delta [B, H, T])."""
    do_f32, o_ungated = do.astype(jnp.float32), o_ungated.astype(jnp.float32)
    if gate is None:
        return do, None, _delta(do_f32, o_ungated)
    sigmoid_gate = jax.nn.sigmoid(gate.astype(jnp.float32))
    dgate = do_f32 * o_ungated
    if gate.shape[-1] == 1:
        dgate = jnp.sum(dgate, axis=-1, keepdims=True)
    dgate = dgate * (sigmoid_gate * jax.nn.sigmoid(-gate.astype(jnp.float32)))  # 1 - sigmoid would round to zero
    do_ungated = do_f32 * sigmoid_gate
    delta = _delta(do_ungated, o_ungated)
    if do.dtype != jnp.float16:  # the kernels round that to float16, after they have scaled it
        do_ungated = do_ungated.astype(do.dtype)
    return do_ungated, dgate.astype(gate.dtype), delta


def _delta(do: Array, o: Array) -> Array:
    return jnp.sum(do * o, axis=-1).swapaxes(1, 2)
