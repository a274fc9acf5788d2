"""The problem on which "auto" checks a linear cross-entropy before it first chooses it; see `first_use.py`."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from dantinox.kernels.first_use import Result, output_and_gradients

TOLERANCES = {"float32": 1e-4, "bfloat16": 2.0**-6, "float16": 2.0**-8}


def run(
    linear_cross_entropy: Callable[..., Any],
    implementation: str,
    dtypes: tuple[str, ...] = ("float32", "bfloat16"),
    *,
    tf32: bool = False,
) -> dict[str, Result]:
    """Return loss and gradients by dtype, over several tiles, with rows without part; with `tf32` in TF32 too."""
    N, M, V = 600, 256, 2300
    rng = np.random.default_rng(0)
    inputs = {"h": rng.standard_normal((N, M)), "w": rng.standard_normal((V, M)) / 16}
    targets = jnp.asarray(np.where(np.arange(N) % 5 == 1, -1, rng.integers(0, V, N)), jnp.int32)
    f = functools.partial(
        linear_cross_entropy, targets=targets, softcap=30.0, z_loss=1e-2, implementation=implementation
    )
    tolerances = {dtype: TOLERANCES[dtype] for dtype in dtypes}
    return output_and_gradients(f, inputs, rng.standard_normal(N), tolerances, tf32=tf32)
