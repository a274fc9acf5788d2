"""One decode step by the Triton kernels."""

import functools

import jax
import jax.numpy as jnp

from dantinox.kernels import dispatch
from dantinox.kernels.ops.decode_attention.common import QuantizedToken
from dantinox.kernels.ops.decode_attention.gradient import without_gradient
from dantinox.kernels.ops.decode_attention.kv_cache import KVCache, append_token, append_tokens, quantize
from dantinox.kernels.ops.decode_attention.numbers import split_scale
from dantinox.kernels.ops.decode_attention.triton.combine import combine
from dantinox.kernels.ops.decode_attention.triton.common import TritonDecodeConfig
from dantinox.kernels.ops.decode_attention.triton.kernel import append_and_attend
from dantinox.kernels.triton_call import fold_vmap
from dantinox.kernels.triton_math import float32_precision
from dantinox.kernels.vma import call_invariant

Array = jax.Array


def decode_attention(
    q: Array,
    k: Array,
    v: Array,
    cache: KVCache,
    *,
    gate: Array | None,
    window: int | None,
    scale: float,
    softcap: float | None,
    sinks: Array | None = None,
) -> tuple[Array, KVCache]:
    """See `dantinox.kernels.decode_attention`, which checks the arguments."""
    if 0 in q.shape:
        return jnp.zeros_like(q), (append_token if q.ndim == 3 else append_tokens)(cache, k, v)
    q, k, v, cache, gate, sinks = without_gradient((q, k, v, cache, gate, sinks), "triton")
    if scale == 0:  # no score counts, not even one that is infinite
        q, scale = jnp.zeros_like(q), 1.0
    q, scale = split_scale(q, scale)
    shape = q.shape
    if len(shape) == 3:
        q, k, v = (x[:, None] for x in (q, k, v))
        gate = None if gate is None else gate[:, None]
    (B, T, H, D), (_, K, C, _) = q.shape, cache.k.shape
    capability = dispatch.compute_capability()
    assert capability is not None  # `dispatch.triton_unsupported_device` has seen it
    config = TritonDecodeConfig(
        T=T,
        H=H,
        K=K,
        D=D,
        C=C,
        dtype=q.dtype,
        max_visible=C if window is None else min(C, int(window)),
        scale=float(scale),
        softcap=softcap,
        precision=float32_precision(),
        capability=capability,
    )
    if sinks is not None:
        sinks = jnp.broadcast_to(sinks[None], (B, H))  # `vmap` joins its axis to the first one
    tokens = QuantizedToken(*quantize(k, cache.k.dtype), *quantize(v, cache.v.dtype))
    run = fold_vmap(functools.partial(_append_and_attend, config=config))
    o, cache = call_invariant(run, q, tokens, cache, gate, sinks)
    return o.reshape(shape), cache


def _append_and_attend(
    q: Array,
    tokens: QuantizedToken,
    cache: KVCache,
    gate: Array | None,
    sinks: Array | None,
    config: TritonDecodeConfig,
) -> tuple[Array, KVCache]:
    o, stats, cache = append_and_attend(q, tokens, cache, gate, sinks, config)
    return (o if o.ndim == 4 else combine(o, stats, q, gate, sinks, config)), cache
