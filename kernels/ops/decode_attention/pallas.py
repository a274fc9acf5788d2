"""The Pallas decode attention of TPUs and CPUs; CPUs have a separate kernel."""

import functools

import jax
import jax.numpy as jnp

from dantinox.kernels.dispatch import current_device
from dantinox.kernels.ops.decode_attention.gradient import without_gradient
from dantinox.kernels.ops.decode_attention.kv_cache import KVCache, append_token, append_tokens
from dantinox.kernels.ops.decode_attention.pallas_cpu import kernel as cpu_kernel
from dantinox.kernels.ops.decode_attention.pallas_tpu import kernel as tpu_kernel
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
    C = cache.k.shape[2]
    max_visible = C if window is None else min(C, int(window))
    backend = cpu_kernel if current_device().platform == "cpu" else tpu_kernel
    q, k, v, cache, gate, sinks = without_gradient((q, k, v, cache, gate, sinks), "pallas")
    kernel = functools.partial(backend.decode_attention, max_visible=max_visible, scale=scale, softcap=softcap)
    return call_invariant(kernel, q, k, v, cache, gate=gate, sinks=sinks)
