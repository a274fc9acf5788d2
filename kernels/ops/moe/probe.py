"""The problems on which "auto" checks a mixture of experts before it first chooses it; see `first_use.py`."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from dantinox.kernels.first_use import Result, output_and_gradients

TOLERANCES = {"float32": 1e-4, "bfloat16": 2.0**-5, "float16": 2.0**-8}  # the gradients pass two products in 16 bits


def run(
    moe_mlp: Callable[..., Any],
    implementation: str,
    dtypes: tuple[str, ...] = ("float32", "bfloat16"),
    *,
    tf32: bool = False,
) -> dict[str, Result]:
    """Return the output and the gradients by dtype, with an expert without tokens and choices of no expert.

    With `tf32` float32 is computed in TF32 too.
    """
    N, M, F, E, k = 300, 256, 384, 5, 2
    rng = np.random.default_rng(0)
    ids = rng.integers(0, E - 1, (N, k))  # the last expert gets no token
    ids[::7, 1] = E  # no expert
    inputs = {
        "x": rng.standard_normal((N, M)),
        "w_gate": rng.standard_normal((E, M, F)) * M**-0.5,
        "w_up": rng.standard_normal((E, M, F)) * M**-0.5,
        "w_down": rng.standard_normal((E, F, M)) * F**-0.5,
        "expert_weights": rng.standard_normal((N, k)),
    }
    f = functools.partial(moe_mlp, expert_ids=ids, implementation=implementation)
    tolerances = {dtype: TOLERANCES[dtype] for dtype in dtypes}
    return output_and_gradients(f, inputs, rng.standard_normal((N, M)), tolerances, tf32=tf32)
