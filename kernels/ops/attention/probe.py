"""The problems on which "auto" checks a kernel of attention before it first chooses it; see `first_use.py`."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from dantinox.kernels.first_use import Result, output_and_gradients

TOLERANCES = {"float32": 1e-4, "bfloat16": 2.0**-5, "float16": 2.0**-8}


def run(
    attention: Callable[..., Any],
    implementation: str,
    dtypes: tuple[str, ...] = ("float32", "bfloat16"),
    D: int = 128,
    *,
    tf32: bool = False,
) -> dict[str, Result]:
    """Return the output and the gradients of windowed, gated, packed attention by dtype; with `tf32` in TF32 too."""
    T, H, K = 600, 4, 2  # several blocks of queries and of keys
    rng = np.random.default_rng(0)
    shapes = {"q": (1, T, H, D), "k": (1, T, K, D), "v": (1, T, K, D), "gate": (1, T, H, 1)}
    inputs = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    ids = np.repeat(np.arange(3, dtype=np.int32), T // 3)[None]
    f = functools.partial(attention, window=150, segment_ids=ids, implementation=implementation)
    tolerances = {dtype: TOLERANCES[dtype] for dtype in dtypes}
    return output_and_gradients(f, inputs, rng.standard_normal((1, T, H, D)), tolerances, tf32=tf32)
