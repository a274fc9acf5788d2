"""One decode step: write the new token into the KV cache and attend to the visible tokens, in place."""

import importlib
from types import ModuleType

import jax
import jax.numpy as jnp

from dantinox.kernels import validation
from dantinox.kernels.dispatch import on_gpu, select_implementation, unsupported_reason
from dantinox.kernels.ops.decode_attention import pallas, xla
from dantinox.kernels.ops.decode_attention.kv_cache import QMAX, KVCache
from dantinox.kernels.ops.decode_attention.pallas_cpu import kernel as cpu_kernel

Array = jax.Array

__all__ = ["KVCache", "decode_attention"]


def decode_attention(
    q: Array,
    k: Array,
    v: Array,
    cache: KVCache,
    *,
    gate: Array | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    implementation: str = "auto",
) -> tuple[Array, KVCache]:
    """Append one token per sequence at slot length % C, then attend to the last min(length + 1, C, window) tokens.

    Under `jit` with the cache donated, no implementation copies the cache.

    Args:
        q: [B, H, D]; k and v: [B, K, D]; one floating dtype.
        cache: `KVCache`, k and v [B, K, C, D], length [B] int32. An int8 or float8_e4m3fn cache also has k_scale and
            v_scale [B, K, C] float32; the new token is quantized before this step attends to it, as later steps will
            see it.
        gate: logits [B, H, D] or [B, H, 1], or None.
        window: number of keys that the query attends to, its own included; None or more than C means all C slots.
        scale: factor on the scores; None means D**-0.5.
        softcap: caps the scores s at softcap * tanh(s / softcap).
        implementation: auto, reference, xla, pallas or triton.

    Returns:
        (o [B, H, D] in q's dtype, the updated cache with length + 1).

    Raises:
        ValueError: an argument's shape, dtype or value is not allowed.
        NotImplementedError: the named implementation cannot run here.
    """
    q, k, v = validation.as_array("q", q, "BHD"), validation.as_array("k", k, "BKD"), validation.as_array("v", v, "BKD")
    gate = None if gate is None else validation.as_array("gate", gate, "BHD")
    validation.check_floating(q=q, k=k, v=v, gate=gate)
    if not all(hasattr(cache, name) for name in KVCache._fields):
        raise ValueError(f"cache is a {type(cache).__name__}; allowed: dantinox.kernels.KVCache")
    cache_k, cache_v = validation.as_array("cache.k", cache.k, "BKCD"), validation.as_array("cache.v", cache.v, "BKCD")
    length = validation.as_array("cache.length", cache.length, "B")
    B, H, D = q.shape
    K, C = k.shape[1], cache_k.shape[2]
    validation.check_shape("k", k, (B, K, D))
    validation.check_shape("v", v, (B, K, D))
    validation.check_heads(H, K)
    validation.check_shape("cache.k", cache_k, (B, K, C, D))
    validation.check_shape("cache.v", cache_v, (B, K, C, D))
    scales = _check_scales(cache, cache_k, cache_v)
    validation.check_shape("cache.length", length, (B,))
    validation.check_integer("cache.length", length)
    if C < 1:
        raise ValueError("cache has 0 slots; allowed: 1 or more")
    if gate is not None:
        validation.check_shape("gate", gate, (B, H, D), (B, H, 1))
    validation.check_window(window, causal=True)
    validation.check_scalars(scale=scale, softcap=softcap)

    cache = KVCache(cache_k, cache_v, length, *scales)
    table = _table()
    if not isinstance(table["pallas"], str) and (reason := _pallas_unsupported_reason(q, cache)):
        table["pallas"] = reason
    not_auto = {}
    if on_gpu():
        not_auto["pallas"] = "Hopper's kernel has not run on a GPU yet; name it"
    elif cpu_kernel.xla_is_faster(C):
        not_auto["pallas"] = "interpreted, it is slow at these sizes"
    run = select_implementation("decode_attention", implementation, table, not_auto)
    return run(q, k, v, cache, gate=gate, window=window, scale=D**-0.5 if scale is None else scale, softcap=softcap)


def _check_scales(cache: KVCache, k: Array, v: Array) -> tuple[Array | None, Array | None]:
    """Returns the checked scales of an 8-bit cache, or Nones."""
    eight_bits = k.dtype in QMAX or v.dtype in QMAX
    if not eight_bits:
        validation.check_floating(**{"cache.k": k, "cache.v": v})
    elif k.dtype != v.dtype:
        raise ValueError(f"cache.v has dtype {v.dtype}; allowed: {k.dtype}, the dtype of cache.k")
    scales = []
    for name in ("k_scale", "v_scale"):
        scale = getattr(cache, name, None)
        if eight_bits and scale is None:
            raise ValueError(f"cache.{name} is None; allowed with a cache of {k.dtype}: float32 {k.shape[:3]}")
        if not eight_bits and scale is not None:
            raise ValueError(f"cache.{name} is given; allowed with a cache of {k.dtype}: None")
        if scale is not None:
            scale = validation.as_array(f"cache.{name}", scale, "BKC")
            validation.check_shape(f"cache.{name}", scale, k.shape[:3])
            if scale.dtype != jnp.float32:
                raise ValueError(f"cache.{name} has dtype {scale.dtype}; allowed: float32")
        scales.append(scale)
    return scales[0], scales[1]


def _table() -> dict:
    def reference(*args, **kwargs):
        from dantinox.reference import decode_attention as specification

        return specification(*args, **kwargs)

    return {
        "reference": reference,
        "xla": xla.decode_attention,
        "pallas": unsupported_reason("decode_attention", "pallas")
        or (_sm90_kernel() if on_gpu() else pallas).decode_attention,
        "triton": unsupported_reason("decode_attention", "triton"),
    }


def _sm90_kernel() -> ModuleType:
    return importlib.import_module("dantinox.kernels.ops.decode_attention.pallas_sm90.kernel")


def _pallas_unsupported_reason(q: Array, cache: KVCache) -> str | None:
    """Returns why this device's Pallas kernel does not support these arrays, or None if it does."""
    if on_gpu():
        return _sm90_kernel().unsupported_reason(q, cache)
    return "q has dtype float64 and it adds up in float32" if q.dtype == jnp.float64 else None
