"""The mixture of experts on Hopper, on a simulated GPU that watches memory: values, gradients, races, what it takes."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

import kernels
from kernels import dispatch, specs
from kernels.grouped_matmul import hopper, moe, mosaic_gpu_moe, roles
from tests.parity import rows, rule, sanitizer

H100 = "NVIDIA H100 80GB HBM3"
slow = pytest.mark.slow


def row(N: int, E: int, k: int, M: int = 64, F: int = 64, skew: str = "uniform") -> specs.MoE:
    return rows.row(specs.MoE, N=N, M=M, F=F, E=E, k=k, skew=skew)


def drawn(case: specs.MoE) -> rows.Drawn:
    """Matrices of the size that keeps features near 1, as in a network."""
    inputs, aux, dout = rows.draw(case)
    for name, width in (("w_gate", case.M), ("w_up", case.M), ("w_down", case.F)):
        inputs[name] /= math.sqrt(width)
    return inputs, {name: jnp.asarray(x) for name, x in aux.items()}, dout


def both(inputs: dict, aux: dict, dout: jax.Array, **options: Any) -> dict[str, jax.Array]:
    """The output and the gradients, by two blocks."""
    o, pull = jax.vjp(lambda x: hopper.moe_mlp(**x, **aux, blocks=2, **options), inputs)
    return {"o": o} | {f"d{name}": gradient for name, gradient in pull(dout)[0].items()}


def watched(width: int | None, inputs: dict, aux: dict, dout: jax.Array) -> dict[str, jax.Array]:
    """The same on memory full of NaN and on memory full of zeros, every access watched."""
    found = sanitizer.on_gpu(functools.partial(both, width=width), inputs, aux, dout)
    assert found.clean, found
    return found.result


CASES = [
    # An idle expert, tiles of two experts, a last tile past the rows, half a tile of features.
    (row(37, 4, 2, F=192, skew="one"), 256),
    pytest.param(row(1, 3, 2), None, marks=slow),
    pytest.param(row(1, 1, 1), 256, marks=slow),
    pytest.param(row(65, 3, 2, skew="uniform", M=128), 128, marks=slow),
    pytest.param(row(150, 5, 1, skew="zipf"), None, marks=slow),
    pytest.param(row(150, 6, 1, skew="empty", M=192), 256, marks=slow),
    pytest.param(row(140, 1, 1, F=320), 256, marks=slow),  # everything to one expert
    pytest.param(row(20, 9, 3, skew="zipf", M=64, F=256), 256, marks=slow),
]


@pytest.mark.parametrize(
    ("case", "width"), CASES, ids=lambda x: f"{x.N}-{x.E}-{x.k}-{x.M}-{x.F}-{x.skew}" if isinstance(x, specs.MoE) else x
)
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=slow)])
def test_the_output_and_the_gradients_are_the_formula_and_memory_is_in_order(case, width, dtype):
    inputs, aux, dout = drawn(case)
    run = functools.partial(watched, width)
    keep = ("expert_weights",)
    mine = rule.judge("moe_mlp", "hopper", inputs, dout, dtype, aux=aux, run=run, keep=keep)
    idle = [e for e in range(case.E) if e not in np.asarray(aux["expert_ids"])]
    for name in ("dw_gate", "dw_up", "dw_down"):
        assert not np.any(rule.exact(mine[name])[idle]), f"{name} of an expert without tokens"
