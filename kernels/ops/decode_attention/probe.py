"""The problems on which "auto" checks the Pallas decode attention before it first chooses it; see `first_use.py`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dantinox.kernels.first_use import Result
from dantinox.kernels.ops.decode_attention.kv_cache import KVCache

TOLERANCES = {"float32": 1e-4, "bfloat16": 2.0**-6}


def run(decode_attention: Callable[..., Any], implementation: str) -> dict[str, Result]:
    """Return the output and the cache of one step by dtype and head dim: short, full and wrapped ring buffers."""
    results: dict[str, Result] = {}
    B, H, K, C = 4, 4, 2, 1024
    rng = np.random.default_rng(0)
    for dtype, tolerance in TOLERANCES.items():
        for D in (64, 128):  # with the tokens and with the head dim in lanes
            shapes = ((B, H, D), (B, K, D), (B, K, D), (B, K, C, D), (B, K, C, D))
            q, k, v, cache_k, cache_v = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
            cache = KVCache(cache_k, cache_v, jnp.asarray([0, 700, C, 5 * C + 100], jnp.int32))
            step = jax.jit(
                lambda q, k, v, cache: decode_attention(q, k, v, cache, window=600, implementation=implementation)
            )
            o, cache = step(q, k, v, cache)
            results[f"o ({dtype}, D = {D})"] = Result(o, tolerance)
            results |= {f"{name} ({dtype}, D = {D})": Result(getattr(cache, name), 0) for name in ("k", "v", "length")}
    return results
