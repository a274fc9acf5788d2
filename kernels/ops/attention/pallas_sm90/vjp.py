"""Attention on Hopper: what the kernels take, and the derivative around the two directions.

The forward kernel leaves two residuals, the output without its gate and the log-sum-exp of each row, and only where
gradients are wanted. Before the backward kernel, one pass over do and o in plain jnp, which XLA fuses:

    do' = do * sigmoid(gate)      dgate = sum(do * o') * sigmoid'(gate)      delta = sum(do' * o')      o' without gate
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from dantinox.kernels.ops.attention.pallas_sm90 import bwd, fwd
from dantinox.kernels.ops.attention.pallas_sm90.common import Static
from dantinox.kernels.ops.attention.segment_ids import zero_unattended_keys
from dantinox.kernels.vma import match_vma

Array = jax.Array
Segments = tuple[Array, Array]
DTYPES = (jnp.bfloat16, jnp.float16)


def refusal(dtype: jnp.dtype, D: int) -> str | None:
    """Why the kernels cannot take these arrays; None where they can."""
    if dtype not in DTYPES:
        return f"q has dtype {jnp.dtype(dtype)} and Hopper's tensor cores take bfloat16 and float16 here"
    if D not in fwd.TILES:
        return f"q has head dim {D} and it has tiles for {', '.join(map(str, fwd.TILES))}"
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
    """See `dantinox.kernels.attention`, where arguments are checked; with `interpret` the kernels run on the CPU.

    Raises:
        NotImplementedError: a dtype or head dim that the kernels do not take.
    """
    if (why := refusal(q.dtype, q.shape[-1])) is not None:
        raise NotImplementedError(f"attention: implementation='pallas' cannot run here: {why}")
    (B, T, H, D), (S, K) = q.shape, k.shape[1:3]
    if 0 in (B, T, S, H, D):
        return jnp.zeros_like(q)
    k, v, segment_ids = zero_unattended_keys(k, v, segment_ids, T=T, causal=causal, window=window)
    S = k.shape[1]
    if segment_ids is not None:
        segment_ids = segment_ids[0].astype(jnp.int32), segment_ids[1].astype(jnp.int32)
    static = Static(T, S, H // K, causal, window, float(scale), softcap, interpret)
    return _attend(q, k, v, gate, segment_ids, static)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q: Array, k: Array, v: Array, gate: Array | None, segments: Segments | None, static: Static) -> Array:
    return _forward(q, k, v, gate, segments, static, residuals=False)["o"]


def _attend_forward(q, k, v, gate, segments, static):
    out = _forward(q, k, v, gate, segments, static, residuals=True)
    return out["o"], (q, k, v, gate, segments, out.get("ungated", out["o"]), out["lse"])


def _attend_backward(static: Static, kept: tuple, do: Array) -> tuple:
    q, k, v, gate, segments, ungated, lse = kept
    do, dgate, delta = before_backward(do, ungated, gate)
    dq, dk, dv = bwd.backward(q, k, v, do, lse, delta, segments, static)
    return match_vma(dq, q), match_vma(dk, k), match_vma(dv, v), dgate, None


_attend.defvjp(_attend_forward, _attend_backward)


def _forward(q, k, v, gate, segments, static, *, residuals: bool) -> dict[str, Array]:
    """The kernel on lengths that its copies can take, cut back to the true ones."""
    whole = lambda x: x if x is None else jnp.pad(x, ((0, 0), (0, -x.shape[1] % fwd.SIDE), (0, 0), (0, 0)))
    out = fwd.forward(*map(whole, (q, k, v, gate)), segments, static, residuals=residuals)
    cut = lambda name, x: x[..., : static.T] if name == "lse" else x[:, : static.T]
    return {name: match_vma(cut(name, x), q) for name, x in out.items()}


def before_backward(do: Array, ungated: Array, gate: Array | None) -> tuple[Array, Array | None, Array]:
    """(cotangent of the ungated output, dgate, delta [B, H, T])."""
    wide, ungated = do.astype(jnp.float32), ungated.astype(jnp.float32)
    delta = lambda inner: jnp.sum(inner * ungated, axis=-1).swapaxes(1, 2)
    if gate is None:
        return do, None, delta(wide)
    open_ = jax.nn.sigmoid(gate.astype(jnp.float32))
    dgate = wide * ungated
    if gate.shape[-1] == 1:
        dgate = jnp.sum(dgate, axis=-1, keepdims=True)
    dgate = dgate * (open_ * (1 - open_))
    inner = wide * open_
    return inner.astype(do.dtype), dgate.astype(gate.dtype), delta(inner)
