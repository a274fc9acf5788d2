"""The problems on which "auto" checks a grouped matmul before it first chooses it; see `first_use.py`."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from dantinox.kernels.first_use import Result, output_and_gradients

TOLERANCES = {"float32": 1e-4, "bfloat16": 2.0**-6, "float16": 2.0**-8}
GROUP_SIZES = (300, 0, 1, 700, 129)  # several tiles of rows, an empty group, tiles that groups share


def run(
    grouped_matmul: Callable[..., Any],
    implementation: str,
    dtypes: tuple[str, ...] = ("float32", "bfloat16"),
    *,
    tf32: bool = False,
) -> dict[str, Result]:
    """Return the output and the gradients by dtype; with `tf32` in TF32 too. The last rows belong to no group."""
    N, M, F = sum(GROUP_SIZES) + 70, 256, 384
    rng = np.random.default_rng(0)
    inputs = {"x": rng.standard_normal((N, M)), "w": rng.standard_normal((len(GROUP_SIZES), M, F))}
    sizes = jnp.asarray(GROUP_SIZES, jnp.int32)
    f = functools.partial(grouped_matmul, group_sizes=sizes, implementation=implementation)
    tolerances = {dtype: TOLERANCES[dtype] for dtype in dtypes}
    return output_and_gradients(f, inputs, rng.standard_normal((N, F)), tolerances, tf32=tf32)
