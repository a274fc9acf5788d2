"""A decode step with random inputs, and the output that Python loops compute."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from bench.verification.error_bound import to_float64
from dantinox.kernels import workloads


class Step(NamedTuple):
    """The inputs of one step, in float64, and the output that Python loops compute."""

    inputs: dict[str, np.ndarray]
    cache_k: np.ndarray
    cache_v: np.ndarray
    o: np.ndarray


def draw(case: workloads.Decode, dtype: str = "float32", fill: float = 0, seed: int = 0) -> Step:
    """A cache filled token by token, with `fill` in unused slots; every value is rounded to `dtype`."""
    rng = np.random.default_rng(seed)
    H, K, D, C = case.H, case.K, case.D, case.C
    normal = lambda *shape: to_float64(jnp.asarray(rng.standard_normal(shape), dtype))
    inputs = {name: normal(*shape) for name, shape in case.shapes().items()}
    cache_k, cache_v = (np.full(case.cache_shape(), fill, float) for _ in "kv")
    T, per_token = case.new_tokens, {name: x for name, x in inputs.items() if name != "sinks"}
    if T == 1:
        per_token = {name: x[:, None] for name, x in per_token.items()}
    o = np.zeros(per_token["q"].shape)
    for b, length in enumerate(case.lengths):
        keys, values = normal(length, K, D), normal(length, K, D)
        for p in range(length):
            cache_k[b, :, p % C], cache_v[b, :, p % C] = keys[p], values[p]
        keys, values = [*keys, *per_token["k"][b]], [*values, *per_token["v"][b]]
        for t, h in np.ndindex(T, H):
            last = length + t
            # The T tokens, which are all appended first, overwrite the oldest ones.
            first = max(0, last + 1 - min(C, case.window or C), length + T - C)
            scores = []
            for p in range(first, last + 1):
                score = float(per_token["q"][b, t, h] @ keys[p][h // (H // K)])
                score *= 1 / math.sqrt(D) if case.scale is None else case.scale
                scores.append(score if case.softcap is None else case.softcap * math.tanh(score / case.softcap))
            sink = [inputs["sinks"][h]] if case.sinks else []
            weights = np.exp(np.array(scores + sink) - max(scores + sink))
            for p, w in zip(range(first, last + 1), weights / weights.sum(), strict=False):
                o[b, t, h] += w * values[p][h // (H // K)]
            if case.gate != "none":
                o[b, t, h] /= 1 + np.exp(-per_token["gate"][b, t, h])
    o = o.reshape(case.out_shape())
    return Step(inputs, cache_k, cache_v, o)
