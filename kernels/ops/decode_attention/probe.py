"""The problems on which "auto" checks a decode attention before it first chooses it; see `first_use.py`."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dantinox.kernels.first_use import Result
from dantinox.kernels.ops.decode_attention.kv_cache import KVCache, quantize

TOLERANCES = {"float32": 1e-4, "bfloat16": 2.0**-6, "float16": 2.0**-8}
TF32_TOLERANCE = 2.0**-8
CACHE_TOLERANCES = {"int8": 2.0**-6, "float8_e4m3fn": 2.0**-3}  # one step: a quotient may be rounded another way
SCALE_TOLERANCE = 1e-6


def run(
    decode_attention: Callable[..., Any],
    implementation: str,
    dtypes: tuple[str, ...] = ("float32", "bfloat16"),
    head_dims: tuple[int, ...] = (64, 128),
    *,
    cache_dtype: str | None = None,
    tf32: bool = False,
) -> dict[str, Result]:
    """Return the output and the cache of a step by dtype, head dim and number of tokens; with `tf32` in TF32 too.

    The ring buffers, of `cache_dtype` if it is given, are empty, part-filled, full and wrapped. Several tokens come
    with sinks.
    """
    results: dict[str, Result] = {}
    B, H, K, C = 4, 4, 2, 1024
    rng = np.random.default_rng(0)
    # On a TPU, with the tokens and with the head dim in lanes.
    for dtype, D, T in itertools.product(dtypes, head_dims, (1, 4)):
        tokens = (B,) if T == 1 else (B, T)
        shapes = ((*tokens, H, D), (*tokens, K, D), (*tokens, K, D), (B, K, C, D), (B, K, C, D))
        q, k, v, *rings = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
        (cache_k, k_scale), (cache_v, v_scale) = (quantize(x, jnp.dtype(cache_dtype or dtype)) for x in rings)
        length = jnp.asarray([0, 700, C - T + 1, 5 * C + 100], jnp.int32)
        cache = KVCache(cache_k, cache_v, length, k_scale, v_scale)
        options: dict[str, Any] = {"window": 600, "implementation": implementation}
        if T > 1:
            options["sinks"] = jnp.linspace(-2.0, 2.0, H)
        f = functools.partial(decode_attention, **options)
        o, new_cache = jax.jit(f)(q, k, v, cache)
        name = f"{dtype}, D = {D}, T = {T}"
        results[f"o ({name})"] = Result(o, TOLERANCES[dtype])
        of_ring = CACHE_TOLERANCES.get(cache_k.dtype.name, 0)
        allowed = {"k": of_ring, "v": of_ring, "length": 0, "k_scale": SCALE_TOLERANCE, "v_scale": SCALE_TOLERANCE}
        arrays = {field: x for field, x in new_cache._asdict().items() if x is not None}
        results |= {f"{field} ({name})": Result(x, allowed[field]) for field, x in arrays.items()}
        if tf32 and dtype == "float32":
            with jax.default_matmul_precision("default"):
                results[f"o ({name}) in TF32"] = Result(jax.jit(f)(q, k, v, cache)[0], TF32_TOLERANCE)
    return results
