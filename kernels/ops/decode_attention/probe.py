"""The problems on which "auto" checks the Pallas decode attention before it first chooses it; see `first_use.py`."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dantinox.kernels.first_use import Result
from dantinox.kernels.ops.decode_attention.kv_cache import KVCache

TOLERANCES = {"float32": 1e-4, "bfloat16": 2.0**-6}


def run(decode_attention: Callable[..., Any], implementation: str) -> dict[str, Result]:
    """Return the output and the cache of a step by dtype, head dim and number of tokens.

    The ring buffers are empty, part-filled, full and wrapped. Several tokens come with sinks.
    """
    results: dict[str, Result] = {}
    B, H, K, C = 4, 4, 2, 1024
    rng = np.random.default_rng(0)
    # With the tokens and with the head dim in lanes.
    for (dtype, tolerance), D, T in itertools.product(TOLERANCES.items(), (64, 128), (1, 4)):
        tokens = (B,) if T == 1 else (B, T)
        shapes = ((*tokens, H, D), (*tokens, K, D), (*tokens, K, D), (B, K, C, D), (B, K, C, D))
        q, k, v, cache_k, cache_v = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
        cache = KVCache(cache_k, cache_v, jnp.asarray([0, 700, C - T + 1, 5 * C + 100], jnp.int32))
        options: dict[str, Any] = {"window": 600, "implementation": implementation}
        if T > 1:
            options["sinks"] = jnp.linspace(-2.0, 2.0, H)
        o, cache = jax.jit(functools.partial(decode_attention, **options))(q, k, v, cache)
        name = f"{dtype}, D = {D}, T = {T}"
        results[f"o ({name})"] = Result(o, tolerance)
        results |= {f"{field} ({name})": Result(getattr(cache, field), 0) for field in ("k", "v", "length")}
    return results
