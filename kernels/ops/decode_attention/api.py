"""One decode step: write the new token into the KV cache and attend to the visible tokens, in place."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from dantinox.kernels import dispatch, first_use, integers, validation
from dantinox.kernels.call import call_implementation
from dantinox.kernels.ops.decode_attention import pallas, probe, xla
from dantinox.kernels.ops.decode_attention.kv_cache import QMAX, KVCache
from dantinox.kernels.ops.decode_attention.pallas_cpu import kernel as cpu_kernel
from dantinox.kernels.ops.decode_attention.pallas_tpu import limits as tpu_limits

Array = jax.Array

__all__ = ["KVCache", "decode_attention"]


def decode_attention(
    q: Float[Array, "B H D"],
    k: Float[Array, "B K D"],
    v: Float[Array, "B K D"],
    cache: KVCache,
    *,
    gate: Float[Array, "B H #D"] | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    implementation: str = "auto",
) -> tuple[Float[Array, "B H D"], KVCache]:
    """Append one token per sequence at slot length % C, then attend to the last min(length + 1, C, window) tokens.

    Under `jit` with the cache donated, no implementation copies the cache. Slots that the query does not see may hold
    anything, NaN included.

    Args:
        q: query of the new token [B, H, D].
        k: key of the new token [B, K, D]; H is a multiple of K.
        v: value of the new token [B, K, D]; q, k and v have one floating dtype.
        cache: `KVCache`, k and v [B, K, C, D], length [B] int32. An int8 or float8_e4m3fn cache also has k_scale and
            v_scale [B, K, C] float32; the new token is quantized before this step attends to it, so this step reads the
            values that later steps read.
        gate: logits [B, H, D] or [B, H, 1] in q's dtype, or None.
        window: number of keys that the query sees, its own included; None or more than C: all C slots.
        scale: factor on the scores; None: D**-0.5.
        softcap: caps the scores s at softcap * tanh(s / softcap); None: no cap.
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
    length = integers.as_integers("cache.length", cache.length, "B")
    B, H, D = q.shape
    K, C = k.shape[1], cache_k.shape[2]
    validation.check_shape("k", k, (B, K, D))
    validation.check_shape("v", v, (B, K, D))
    validation.check_heads(H, K)
    validation.check_shape("cache.k", cache_k, (B, K, C, D))
    validation.check_shape("cache.v", cache_v, (B, K, C, D))
    scales = _check_scales(cache, cache_k, cache_v)
    validation.check_shape("cache.length", length, (B,))
    if C < 1:
        raise ValueError("cache has 0 slots; allowed: 1 or more")
    if gate is not None:
        validation.check_shape("gate", gate, (B, H, D), (B, H, 1))
    window = validation.check_window(window, causal=True)
    scale, softcap = validation.check_scale(scale, D), validation.check_softcap(softcap)

    cache = KVCache(cache_k, cache_v, integers.ring_positions(length, C), *scales)
    function = OPERATION.select(implementation, q, cache)
    o, cache = call_implementation(
        "decode_attention",
        function,
        _out_specs,
        q,
        k,
        v,
        cache,
        gate=gate,
        window=window,
        scale=scale,
        softcap=softcap,
    )
    return o, cache._replace(length=jnp.asarray(length) + 1)


def _out_specs(q: Any, k: Any, v: Any, cache_k: Any, cache_v: Any, length: Any, *rest: Any) -> tuple[Any, KVCache]:
    """Return the partition specs of the output and of the cache, which are those of q and of the given cache."""
    k_scale, v_scale = rest[:2] if len(rest) >= 2 else (None, None)
    return q, KVCache(cache_k, cache_v, length, k_scale, v_scale)


def _check_scales(cache: KVCache, k: Array, v: Array) -> tuple[Array | None, Array | None]:
    """Return the checked scales of an 8-bit cache, or Nones."""
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


def _reference(*args: Any, **options: Any) -> tuple[Array, KVCache]:
    from dantinox.reference import decode_attention as specification

    return specification(*args, **options)


def _pallas(*args: Any, **options: Any) -> tuple[Array, KVCache]:
    if dispatch.on_gpu():
        from dantinox.kernels.ops.decode_attention.pallas_sm90 import kernel as sm90

        return sm90.decode_attention(*args, **options)
    return pallas.decode_attention(*args, **options)


def _pallas_unsupported_inputs(q: Array, cache: KVCache) -> str | None:
    if reason := dispatch.symbolic_unsupported(q, cache.k):
        return reason
    if dispatch.on_gpu():
        from dantinox.kernels.ops.decode_attention.pallas_sm90 import limits

        return limits.unsupported_reason(q, cache)
    if dispatch.on_tpu() and (reason := tpu_limits.unsupported_reason(q, cache)):
        return reason
    return dispatch.float32_accumulation_unsupported(q.dtype)


def _pallas_not_auto(q: Array, cache: KVCache) -> str | None:
    if dispatch.on_gpu():
        return "the Hopper kernel has not run on a GPU yet; pass implementation='pallas' to use it"
    if dispatch.current_device().platform == "cpu" and cpu_kernel.xla_is_faster(cache.k.shape[2]):
        return "interpreted, it is slow at these sizes"
    if dispatch.on_tpu():
        return first_use.disagreement("decode_attention", _PROBE)
    return None


_PROBE = functools.partial(probe.run, decode_attention)
OPERATION = dispatch.Operation(
    "decode_attention",
    (
        dispatch.Implementation("reference", _reference),
        dispatch.Implementation("xla", xla.decode_attention),
        dispatch.Implementation(
            "pallas",
            _pallas,
            unsupported_device=functools.partial(dispatch.pallas_unsupported_device, "decode_attention"),
            unsupported_inputs=_pallas_unsupported_inputs,
            not_auto=_pallas_not_auto,
        ),
        dispatch.Implementation.missing("triton", "decode_attention has no Triton kernel yet"),
    ),
)
