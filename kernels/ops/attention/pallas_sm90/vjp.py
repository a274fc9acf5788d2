"""Attention on Hopper: the operation and its custom derivative around the forward and backward kernels.

The forward kernel stores two residuals, the output without its gate and the log-sum-exp of each row, and only if
gradients are needed. One pass over do and o in plain jnp, which XLA fuses, precedes the backward kernels:

    do' = do * sigmoid(gate)      dgate = sum(do * o') * sigmoid'(gate)      delta = sum(do' * o')      o' without gate
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from dantinox.kernels.ops.attention.pallas_sm90 import bwd, fwd
from dantinox.kernels.ops.attention.pallas_sm90.common import TMA_ROWS, Segments, Sm90AttentionConfig
from dantinox.kernels.ops.attention.pallas_sm90.fwd_kernel import FWD_BLOCK_SIZES, FwdOutputs
from dantinox.kernels.ops.attention.segment_ids import zero_unattended_keys
from dantinox.kernels.vma import match_vma

Array = jax.Array
Residuals = tuple[Array, Array, Array, Array | None, Segments | None, Array, Array]
DTYPES = (jnp.bfloat16, jnp.float16)


def unsupported_inputs(dtype: jnp.dtype, D: int) -> str | None:
    """Return why the kernels do not support these arrays, or None if they do."""
    if dtype not in DTYPES:
        return f"q has dtype {jnp.dtype(dtype)} and Hopper's tensor cores take bfloat16 and float16 here"
    if D not in FWD_BLOCK_SIZES:
        return f"q has head dim {D} and it has tiles for {', '.join(map(str, FWD_BLOCK_SIZES))}"
    return None


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
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Array:
    """See `dantinox.kernels.attention`, which checks the arguments; with `interpret` the kernels run on the CPU.

    Raises:
        NotImplementedError: the kernels do not support the dtype or head dim.
    """
    if (reason := unsupported_inputs(q.dtype, q.shape[-1])) is not None:
        raise NotImplementedError(f"attention: implementation='pallas' cannot run here: {reason}")
    (B, T, H, D), (S, K) = q.shape, k.shape[1:3]
    if 0 in (B, T, S, H, D):
        return jnp.zeros_like(q)
    k, v, segment_ids = zero_unattended_keys(k, v, segment_ids, T=T, causal=causal, window=window)
    S = k.shape[1]
    if segment_ids is not None:
        segment_ids = segment_ids[0].astype(jnp.int32), segment_ids[1].astype(jnp.int32)
    config = Sm90AttentionConfig(T, S, H // K, causal, window, float(scale), softcap, interpret)
    return _attention(q, k, v, gate, segment_ids, config)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(
    q: Array, k: Array, v: Array, gate: Array | None, segments: Segments | None, config: Sm90AttentionConfig
) -> Array:
    return padded_forward(q, k, v, gate, segments, config, residuals=False).o


def _attention_fwd(q, k, v, gate, segments, config) -> tuple[Array, Residuals]:
    out = padded_forward(q, k, v, gate, segments, config, residuals=True)
    return out.o, (q, k, v, gate, segments, out.o if out.o_ungated is None else out.o_ungated, out.lse)


def _attention_bwd(config: Sm90AttentionConfig, residuals: Residuals, do: Array) -> tuple:
    q, k, v, gate, segments, o_ungated, lse = residuals
    do, dgate, delta = bwd_preprocess(do, o_ungated, gate)
    dq, dk, dv = bwd.backward(q, k, v, do, lse, delta, segments, config)
    return match_vma(dq, q), match_vma(dk, k), match_vma(dv, v), dgate, None


_attention.defvjp(_attention_fwd, _attention_bwd)


def padded_forward(
    q: Array,
    k: Array,
    v: Array,
    gate: Array | None,
    segments: Segments | None,
    config: Sm90AttentionConfig,
    *,
    residuals: bool,
) -> FwdOutputs:
    """Run the forward kernel on lengths padded to whole TMA tiles and slice its outputs to T."""

    def pad(x: Array | None) -> Array | None:
        return x if x is None else jnp.pad(x, ((0, 0), (0, -x.shape[1] % TMA_ROWS), (0, 0), (0, 0)))

    out = fwd.forward(pad(q), pad(k), pad(v), pad(gate), segments, config, residuals=residuals)
    return FwdOutputs(
        o=match_vma(out.o[:, : config.T], q),
        lse=None if out.lse is None else match_vma(out.lse[..., : config.T], q),
        o_ungated=None if out.o_ungated is None else match_vma(out.o_ungated[:, : config.T], q),
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
    dgate = dgate * (sigmoid_gate * (1 - sigmoid_gate))
    do_ungated = do_f32 * sigmoid_gate
    return do_ungated.astype(do.dtype), dgate.astype(gate.dtype), _delta(do_ungated, o_ungated)


def _delta(do: Array, o: Array) -> Array:
    return jnp.sum(do * o, axis=-1).swapaxes(1, 2)
