"""Walk a jaxpr with everything inside it: jit, scan, while, cond, remat, custom_vjp."""

import math
from collections.abc import Iterator
from typing import Any


def equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation of a jaxpr, closed or open, and of every jaxpr among their parameters."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    for equation in jaxpr.eqns:
        yield equation
        yield from _inside(tuple(equation.params.values()))


def _inside(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple | list):
        for item in value:
            yield from _inside(item)
    elif hasattr(getattr(value, "jaxpr", value), "eqns"):
        yield from equations(value)


def largest_intermediate(jaxpr: Any) -> int:
    """Number of elements of the largest intermediate."""
    return max(math.prod(v.aval.shape) for e in equations(jaxpr) for v in e.outvars if hasattr(v.aval, "shape"))


def matmuls(jaxpr: Any) -> list[Any]:
    """Every matrix product: dot_general, and ragged_dot if a branch for another device contains one."""
    return [e for e in equations(jaxpr) if e.primitive.name.startswith(("dot_general", "ragged_dot"))]


def dot_flops(equation: Any) -> int:
    """2 * batch * rows * columns * contracted of one dot_general."""
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
