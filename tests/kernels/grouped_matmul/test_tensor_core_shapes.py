"""The Pallas grouped matmul and mixture of experts at sizes of tensor cores: outputs and all gradients.

The tests also run the output alone: without gradients the mixture of experts stores no residuals, and is another
program. On a GPU they run the compiled Hopper kernels at every tile width, large cases before small ones; elsewhere all
but one case each are marked slow. The workloads have shapes that the Hopper kernels do not support.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench.verification.fast_compile import jit_fast_compile
from dantinox import kernels
from dantinox.kernels import workloads
from dantinox.kernels.ops.grouped_matmul.pallas_sm90 import vjp
from tests.helpers import cases, tolerance

ON_GPU = jax.default_backend() == "gpu"
UNSUPPORTED = kernels.implementations("grouped_matmul")["pallas"]
pytestmark = pytest.mark.skipif(UNSUPPORTED is not None, reason=str(UNSUPPORTED))
slow_off_gpu = () if ON_GPU else pytest.mark.slow


def groups(*sizes: int, N: int = 0, M: int = 64, F: int = 64) -> workloads.GroupedMatmul:
    return cases.make_workload(workloads.GroupedMatmul, N=N or sum(sizes), M=M, F=F, E=len(sizes), sizes=sizes)


def spread(N: int, E: int, M: int, F: int, skew: str) -> workloads.GroupedMatmul:
    return cases.make_workload(workloads.GroupedMatmul, N=N, M=M, F=F, E=E, skew=skew)


def experts(N: int, E: int, k: int, M: int, F: int, skew: str) -> workloads.MoE:
    return cases.make_workload(workloads.MoE, N=N, M=M, F=F, E=E, k=k, skew=skew)


GROUPS = [
    (groups(3, 0, 73, 51, N=129, M=192, F=320), None),
    (groups(3, 0, 73, 51, N=129, M=192, F=320), 256),
    (groups(0, 200, M=128, F=320), 128),
    (groups(300, 0, 0, M=192, F=128), 192),
    (groups(128, 64, 64, N=264), 64),
    (groups(0, 0, 0, N=200, F=192), None),
    (groups(1, 2, 3, 4, 5, 6, 7, 8, 9, N=63), 128),
    (groups(63, 65, 130, 2, M=256, F=512), 256),
    (groups(1, M=512, F=1024), None),
]
EXPERTS = [
    (experts(75, 4, 2, 64, 320, "one"), None),
    (experts(75, 4, 2, 64, 320, "one"), 256),
    (experts(65, 3, 2, 128, 64, "uniform"), 128),
    (experts(150, 6, 1, 192, 128, "empty"), 256),
    (experts(20, 9, 3, 64, 256, "zipf"), None),
]
# Several tiles for each of 132 blocks, several panels of them, rings that turn many times; no more groups than the
# reference, which asks each, compiles in time.
LARGE_GROUPS = [
    *((spread(8192, 8, 512, 2048, "zipf"), width) for width in (256, 192, 128, 64)),
    (spread(9000, 24, 448, 832, "zipf"), None),
]
LARGE_EXPERTS = [*((experts(4096, 6, 2, 512, 1088, "zipf"), width) for width in (256, 128))]


def parameters(small: list[Any], large: list[Any]) -> list[Any]:
    """Parameters (case, width, dtype, wanted); what is expected is computed once for neighbours of one case."""
    tiles = [(*case, "bfloat16") for case in [*(large if ON_GPU else []), *small]]
    tiles += [(*case, "float16") for case in small[1:3]]
    each = [(*tile, wanted) for tile in tiles for wanted in ("gradients", "output alone")]
    name = lambda case, width, dtype, wanted: f"{case.label()}, {width or 'chosen'}-{dtype}-{wanted}"
    return [pytest.param(*one, id=name(*one), marks=() if n < 2 else slow_off_gpu) for n, one in enumerate(each)]


def program(op: str, width: int | None) -> Callable[..., dict[str, jax.Array]]:
    """Makes a jitted `output_and_gradients` of an operation; only Hopper's tiles have a width."""
    if ON_GPU:
        operation = functools.partial(getattr(vjp, op), width=width)
    else:
        operation = functools.partial(getattr(kernels, op), implementation="pallas")
    return jit_fast_compile(
        lambda inputs, aux, dout: tolerance.output_and_gradients(lambda x: operation(**x, **aux), inputs, dout)
    )


def draw_scaled(case: workloads.Workload) -> cases.DrawnArrays:
    """Matrices of the size that keeps products near 1, as in a network."""
    inputs, aux, dout = cases.draw(case)
    inputs = {name: x / math.sqrt(x.shape[1]) if name.startswith("w") else x for name, x in inputs.items()}
    return inputs, {name: jnp.asarray(x) for name, x in aux.items()}, dout


@functools.lru_cache(maxsize=1)
def expected(case: workloads.Workload, dtype: str) -> tuple[tolerance.Arguments, tolerance.Arrays, tolerance.Arrays]:
    """Returns (the arguments, the results of plain jnp, those of the reference)."""
    inputs, aux, dout = draw_scaled(case)
    given = tolerance.round_inputs(inputs, dout, dtype, aux=aux, keep_float32=("expert_weights",))
    return given, *tolerance.expected_outputs(case.op, given)


def run_and_compare(
    case: workloads.Workload, width: int | None, dtype: str, wanted: str
) -> tuple[tolerance.Arrays, tolerance.Arrays]:
    """Returns (the results of the kernels, compared with the reference; the integer inputs)."""
    (inputs, aux, dout), plain, oracle = expected(case, dtype)
    mine = program(case.op, width)(inputs, aux, dout if wanted == "gradients" else None)
    tolerance.assert_outputs_match(mine, plain, oracle if wanted == "gradients" else {"o": oracle["o"]}, dtype)
    return mine, aux


@pytest.mark.parametrize(("case", "width", "dtype", "wanted"), parameters(GROUPS, LARGE_GROUPS))
@pytest.mark.sampled(2)
def test_grouped_matmul_matches_reference_at_tensor_core_sizes(case, width, dtype, wanted):
    mine, aux = run_and_compare(case, width, dtype, wanted)
    sizes = np.asarray(aux["group_sizes"])
    assert not np.any(tolerance.to_float64(mine["o"])[sizes.sum() :]), "rows past the sum are zeros"
    if wanted == "gradients":
        assert not np.any(tolerance.to_float64(mine["dw"])[sizes == 0]), "a group without rows has no gradient"


@pytest.mark.parametrize(("case", "width", "dtype", "wanted"), parameters(EXPERTS, LARGE_EXPERTS))
@pytest.mark.sampled(2)
def test_mixture_of_experts_matches_reference_at_tensor_core_sizes(case, width, dtype, wanted):
    mine, aux = run_and_compare(case, width, dtype, wanted)
    idle = [e for e in range(case.E) if e not in np.asarray(aux["expert_ids"])]
    for name in ("dw_gate", "dw_up", "dw_down") if wanted == "gradients" else ():
        assert not np.any(tolerance.to_float64(mine[name])[idle]), f"{name} of an expert without tokens"


@pytest.mark.parametrize(
    "case",
    [groups(50, 0, 21, N=80), pytest.param(groups(500, 0, 1311, 77, N=2000, M=256, F=512), marks=slow_off_gpu)],
    ids=lambda case: case.label(),
)
def test_unassigned_rows_do_not_affect_results_at_tensor_core_sizes(case):
    """NaN in rows past the sum and in matrices without rows changes no bit."""
    inputs, aux, dout = draw_scaled(case)
    inputs, dout = {name: jnp.asarray(x, "bfloat16") for name, x in inputs.items()}, jnp.asarray(dout, "bfloat16")
    past = (jnp.arange(case.N) >= sum(case.sizes))[:, None]
    poisoned = {"x": jnp.where(past, jnp.nan, inputs["x"]), "w": inputs["w"].at[1].set(jnp.nan)}
    run = program("grouped_matmul", None)
    once, again = (run(inputs, aux, dout) for _ in range(2))
    tolerance.assert_bit_equal(once, again)
    tolerance.assert_bit_equal(once, run(poisoned, aux, jnp.where(past, jnp.nan, dout)))
