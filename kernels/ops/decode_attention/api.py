"""One decode step: write the new tokens into the KV cache and attend to the visible tokens, in place."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from dantinox.kernels import dispatch, first_use, integers, validation
from dantinox.kernels.call import call_implementation
from dantinox.kernels.ops.decode_attention import pallas, probe, xla
from dantinox.kernels.ops.decode_attention.kv_cache import QMAX, KVCache
from dantinox.kernels.ops.decode_attention.pallas_cpu import kernel as cpu_kernel
from dantinox.kernels.ops.decode_attention.pallas_tpu import limits as tpu_limits

Array = jax.Array
MAX_TRITON_HEAD_DIM = 256

__all__ = ["KVCache", "decode_attention"]


def decode_attention(
    q: Float[Array, "B *T H D"],
    k: Float[Array, "B *T K D"],
    v: Float[Array, "B *T K D"],
    cache: KVCache,
    *,
    gate: Float[Array, "B *T H #D"] | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Float[Array, "H"] | None = None,
    implementation: str = "auto",
) -> tuple[Float[Array, "B *T H D"], KVCache]:
    """Append one token per sequence, or T, and attend to the last min(length + 1, C, window) tokens of each.

    With T tokens, such as those of a draft or of a chunk of a prompt, all are appended, at slots (length + t) % C, then
    query t attends to the last min(length + t + 1, C, window) tokens up to its own. Tokens that the new ones overwrite
    are gone: no query sees a position up to length + T - 1 - C. So a ring buffer that wraps needs a window, and
    C >= window + T - 1 slots; without a window, length + T may not exceed C.

    Under `jit` with the cache donated, no implementation copies the cache. Slots that no query sees may hold anything,
    NaN included. `rewind` takes tokens back.

    Args:
        q: query of the new token [B, H, D], or of T new tokens [B, T, H, D].
        k: key of the new token [B, K, D], or [B, T, K, D]; H is a multiple of K.
        v: value of the new token [B, K, D], or [B, T, K, D]; q, k and v have one floating dtype.
        cache: `KVCache`, k and v [B, K, C, D], length [B] int32. An int8 or float8_e4m3fn cache also has k_scale and
            v_scale [B, K, C] float32; a new token is quantized before this step attends to it, so this step reads the
            values that later steps read.
        gate: logits [B, H, D] or [B, H, 1] in q's dtype, with T after B if q has it, or None.
        window: number of keys that a query sees, its own included; None: all C slots, as with one token and a window of
            more than C.
        scale: factor on the scores; None: D**-0.5.
        softcap: caps the scores s at softcap * tanh(s / softcap); None: no cap.
        sinks: logits [H] in float32 or q's dtype: each joins the softmax of its head as one more key without a value.
            They are neither scaled nor capped. None: no sinks.
        implementation: auto, reference, xla, pallas or triton.

    Returns:
        (o in q's shape and dtype, the updated cache with length + T, or + 1).

    Raises:
        ValueError: an argument's shape, dtype or value is not allowed. Under `jit`, where length has no value yet,
            tokens that overwrite visible ones without a window go unseen.
        NotImplementedError: the named implementation cannot run here.

    Source of the sinks: OpenAI, gpt-oss (2025), after Xiao et al., Efficient Streaming Language Models (2023).
    """
    axes = "BT" if _rank(k) == 4 else "B"
    q, k, v = (validation.as_array(*x) for x in (("q", q, f"{axes}HD"), ("k", k, f"{axes}KD"), ("v", v, f"{axes}KD")))
    gate = None if gate is None else validation.as_array("gate", gate, f"{axes}HD")
    validation.check_floating(q=q, k=k, v=v, gate=gate)
    if not all(hasattr(cache, name) for name in KVCache._fields):
        raise ValueError(f"cache is a {type(cache).__name__}; allowed: dantinox.kernels.KVCache")
    cache_k, cache_v = validation.as_array("cache.k", cache.k, "BKCD"), validation.as_array("cache.v", cache.v, "BKCD")
    length = integers.as_integers("cache.length", cache.length, "B")
    B, *tokens, H, D = q.shape
    T, K, C = tokens[0] if tokens else None, k.shape[-2], cache_k.shape[2]
    validation.check_shape("k", k, (B, *tokens, K, D))
    validation.check_shape("v", v, (B, *tokens, K, D))
    validation.check_heads(H, K)
    validation.check_shape("cache.k", cache_k, (B, K, C, D))
    validation.check_shape("cache.v", cache_v, (B, K, C, D))
    scales = _check_scales(cache, cache_k, cache_v)
    validation.check_shape("cache.length", length, (B,))
    if C < 1:
        raise ValueError("cache has 0 slots; allowed: 1 or more")
    if gate is not None:
        validation.check_shape("gate", gate, (B, *tokens, H, D), (B, *tokens, H, 1))
    window = validation.check_window(window, causal=True)
    scale, softcap = validation.check_scale(scale, D), validation.check_softcap(softcap)
    options = {}
    if sinks is not None:
        sinks = validation.check_sinks(sinks, H, q.dtype)
        options["sinks"] = sinks.astype(jnp.float64 if q.dtype == jnp.float64 else jnp.float32)
    if T is not None:
        _check_tokens(T, C, window, length)

    cache = KVCache(cache_k, cache_v, integers.ring_positions(length, C, 1 if T is None else T), *scales)
    one_of_many = T == 1
    if one_of_many:
        q, k, v = (x[:, 0] for x in (q, k, v))
        gate = None if gate is None else gate[:, 0]
    function = OPERATION.select(implementation, q, cache, sinks)
    o, cache = call_implementation(
        "decode_attention",
        function,
        functools.partial(_out_specs, has_scales=scales[0] is not None),
        q,
        k,
        v,
        cache,
        gate=gate,
        window=window,
        scale=scale,
        softcap=softcap,
        **options,
    )
    new_length = jnp.asarray(length) + (1 if T is None else T)
    return o[:, None] if one_of_many else o, cache._replace(length=new_length)


def _rank(x: Any) -> int:
    """Return the number of axes of an argument, or 0 if it is not an array."""
    try:
        return np.ndim(x)
    except ValueError:  # lists of unequal lengths
        return 0


def _out_specs(
    q: Any, k: Any, v: Any, cache_k: Any, cache_v: Any, length: Any, *rest: Any, has_scales: bool
) -> tuple[Any, KVCache]:
    """Return the partition specs of the output and of the cache, which are those of q and of the given cache."""
    k_scale, v_scale = rest[:2] if has_scales else (None, None)
    return q, KVCache(cache_k, cache_v, length, k_scale, v_scale)


def _check_tokens(T: int, C: int, window: int | None, length: integers.Integers) -> None:
    """Check that a ring buffer of C slots takes T tokens and keeps what the first of them sees."""
    if not (isinstance(T, int) and isinstance(C, int)):  # symbolic
        return
    if not 1 <= T <= C:
        raise ValueError(f"q has {T} tokens; allowed: 1 to {C}, the slots of the cache")
    if T == 1:
        return
    if window is not None:
        if window + T - 1 > C:
            raise ValueError(
                f"cache has {C} slots; allowed with a window of {window} and {T} tokens: {window + T - 1} or more"
            )
        return
    lengths = integers.concrete_value(length)
    if lengths is not None and lengths.size and int(lengths.max()) > C - T:
        raise ValueError(
            f"cache.length holds {int(lengths.max())}; allowed with {T} tokens, {C} slots and no window: 0 to {C - T}"
        )


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


def _pallas_unsupported_inputs(q: Array, cache: KVCache, sinks: Array | None = None) -> str | None:
    if reason := dispatch.symbolic_unsupported(q, cache.k):
        return reason
    if dispatch.on_gpu():
        from dantinox.kernels.ops.decode_attention.pallas_sm90 import limits

        return limits.unsupported_reason(q, cache)
    if dispatch.on_tpu() and (reason := tpu_limits.unsupported_reason(q, cache)):
        return reason
    return dispatch.float32_accumulation_unsupported(q.dtype)


def _pallas_not_auto(q: Array, cache: KVCache, sinks: Array | None = None) -> str | None:
    if dispatch.on_gpu():
        return _gpu_disagreement("pallas", q, cache)
    if dispatch.current_device().platform == "cpu" and cpu_kernel.xla_is_faster(cache.k.shape[2]):
        return "interpreted, it is slow at these sizes"
    if dispatch.on_tpu():
        return first_use.disagreement("decode_attention", _PROBE)
    return None


def _triton_unsupported_inputs(q: Array, cache: KVCache, sinks: Array | None = None) -> str | None:
    if reason := dispatch.symbolic_unsupported(q, cache.k):
        return reason
    if reason := dispatch.float32_accumulation_unsupported(q.dtype):
        return reason
    for name, ring_buffer in (("cache.k", cache.k), ("cache.v", cache.v)):
        if ring_buffer.dtype == jnp.float64:
            return f"{name} is float64 and its Triton kernels multiply at most float32"
    D = q.shape[-1]
    return f"D is {D}; its Triton kernels take at most {MAX_TRITON_HEAD_DIM}" if D > MAX_TRITON_HEAD_DIM else None


def _triton_not_auto(q: Array, cache: KVCache, sinks: Array | None = None) -> str | None:
    return _gpu_disagreement("triton", q, cache)


def _gpu_disagreement(implementation: str, q: Array, cache: KVCache) -> str | None:
    dtype, D, cache_dtype = q.dtype.name, q.shape[-1], cache.k.dtype.name
    subject = f"{dtype}, D {D}, cache {cache_dtype}"
    return first_use.disagreement("decode_attention", _gpu_probe(dtype, D, cache_dtype), implementation, subject)


@functools.cache
def _gpu_probe(dtype: str, D: int, cache_dtype: str) -> first_use.Probe:
    """Return the probe of what determines the tiles and the conversions of a GPU's kernels."""
    kind = {"dtypes": (dtype,), "head_dims": (D,), "cache_dtype": cache_dtype, "tf32": True}
    return functools.partial(probe.run, decode_attention, **kind)


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
        dispatch.Implementation(
            "triton",
            dispatch.lazy("dantinox.kernels.ops.decode_attention.triton.decode_step:decode_attention"),
            unsupported_device=dispatch.triton_unsupported_device,
            unsupported_inputs=_triton_unsupported_inputs,
            not_auto=_triton_not_auto,
        ),
    ),
)
