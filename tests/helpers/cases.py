"""The workloads as test parameters, and their arrays."""

from typing import Any

import numpy as np
import pytest

from dantinox.kernels import workloads
from tests.helpers import tolerance

DrawnArrays = tuple[dict[str, np.ndarray], dict[str, Any], np.ndarray]


def workload_parameters(op: str) -> list[Any]:
    """(workload, dtype) parameters of the suites "parity" and "long", with slow ones marked."""
    return [
        pytest.param(row, dtype, id=f"{row.name}-{dtype}", marks=pytest.mark.slow if _is_slow(row, dtype) else ())
        for row in (*workloads.select(op, "parity"), *workloads.select(op, "long"))
        for dtype in row.dtypes
    ]


def _is_slow(row: workloads.Workload, dtype: str) -> bool:
    if "long" in row.suites:
        return True
    if isinstance(row, workloads.Attention):
        return dtype == "bfloat16" and row.T * row.S >= 2**18
    return isinstance(row, workloads.Decode) and dtype == "float16"


def make_workload(kind: type[workloads.Workload], **sizes: Any) -> Any:
    """Make a workload that no suite contains."""
    return kind(name="", suites=(), devices=(), **sizes)


def attention(T: int, S: int, **sizes: Any) -> workloads.Attention:
    """Make an attention workload that no suite contains."""
    return make_workload(workloads.Attention, T=T, S=S, **sizes)


def draw(row: workloads.Workload, seed: int = 0) -> DrawnArrays:
    """Returns (the differentiable inputs in float64, the integer inputs, the cotangent of the output)."""
    rng = np.random.default_rng(seed)
    inputs = {name: rng.standard_normal(shape) for name, shape in row.shapes().items()}
    return inputs, row.integer_inputs(seed), rng.standard_normal(row.out_shape())


def options(row: workloads.Workload) -> tolerance.Options:
    """The static arguments, as `tolerance.program` takes them."""
    return tuple(row.options().items())
