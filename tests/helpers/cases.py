"""The rows of `dantinox.kernels.workloads` as test parameters: their arrays, and what waits for the long run."""

from typing import Any

import numpy as np
import pytest

from dantinox.kernels import workloads
from tests.helpers import tolerance

Drawn = tuple[dict[str, np.ndarray], dict[str, Any], np.ndarray]


def judged(op: str) -> list[Any]:
    """(row, dtype) parameters of every row that the tests run, the long ones marked slow."""
    found = [*workloads.select(op, "parity"), *workloads.select(op, "long")]
    marks = lambda row, dtype: pytest.mark.slow if _waits(row, dtype) else ()
    pairs = [(row, dtype) for row in found for dtype in row.dtypes]
    return [pytest.param(*pair, id=f"{pair[0].name}-{pair[1]}", marks=marks(*pair)) for pair in pairs]


def _waits(row: workloads.Workload, dtype: str) -> bool:
    if "long" in row.suites:
        return True
    if isinstance(row, workloads.Attention):
        return dtype == "bfloat16" and row.T * row.S >= 2**18
    return isinstance(row, workloads.Decode) and dtype == "float16"


def row(kind: type[workloads.Workload], **sizes: Any) -> Any:
    """A row that is in no table."""
    return kind(name="", suites=(), devices=(), **sizes)


def attention(T: int, S: int, **sizes: Any) -> workloads.Attention:
    """A row of attention that is in no table."""
    return row(workloads.Attention, T=T, S=S, **sizes)


def draw(row: workloads.Workload, seed: int = 0) -> Drawn:
    """(the differentiable arguments in float64, the integer ones, the output's cotangent)."""
    rng = np.random.default_rng(seed)
    inputs = {name: rng.standard_normal(shape) for name, shape in row.shapes().items()}
    return inputs, row.integer_inputs(seed), rng.standard_normal(row.out_shape())


def options(row: workloads.Workload) -> tolerance.Options:
    """The static arguments, as `tolerance.program` takes them."""
    return tuple(row.options().items())
