"""The rows of `kernels.specs` as test parameters: their arrays, and what waits for the long run."""

from typing import Any

import numpy as np
import pytest

from kernels import specs
from tests.parity import rule

Drawn = tuple[dict[str, np.ndarray], dict[str, Any], np.ndarray]


def judged(op: str) -> list[Any]:
    """(row, dtype) parameters of every row that the tests run, the long ones marked slow."""
    found = [*specs.rows(op, "parity"), *specs.rows(op, "long")]
    marks = lambda row, dtype: pytest.mark.slow if _waits(row, dtype) else ()
    pairs = [(row, dtype) for row in found for dtype in row.dtypes]
    return [pytest.param(*pair, id=f"{pair[0].name}-{pair[1]}", marks=marks(*pair)) for pair in pairs]


def _waits(row: specs.Spec, dtype: str) -> bool:
    if "long" in row.purposes:
        return True
    if isinstance(row, specs.Attention):
        return dtype == "bfloat16" and row.T * row.S >= 2**18
    return isinstance(row, specs.Decode) and dtype == "float16"


def row(kind: type[specs.Spec], **sizes: Any) -> Any:
    """A row that is in no table."""
    return kind(name="", purposes=(), machines=(), **sizes)


def attention(T: int, S: int, **sizes: Any) -> specs.Attention:
    """A row of attention that is in no table."""
    return row(specs.Attention, T=T, S=S, **sizes)


def draw(row: specs.Spec, seed: int = 0) -> Drawn:
    """(the differentiable arguments in float64, the integer ones, the output's cotangent)."""
    rng = np.random.default_rng(seed)
    inputs = {name: rng.standard_normal(shape) for name, shape in row.shapes().items()}
    return inputs, row.aux(seed), rng.standard_normal(row.out_shape())


def options(row: specs.Spec) -> rule.Options:
    """The static arguments, as `rule.program` takes them."""
    return tuple(row.options().items())
