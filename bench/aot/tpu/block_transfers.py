"""Bytes that a TPU kernel moves to and from memory, by its own block specs and by what its grid depends on.

The integer arguments of a traced program are evaluated as far as they decide anything: the size of each kernel's grid
and the tables prefetched into scalar memory. The grid is walked by the kernel's index maps, under the rule of Pallas's
pipeline: a block is fetched where it is another one than in the step before, and a result's block is written where the
next step's is another one. Of a block that hangs over an array's end counts what lies inside. The tables do not count.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import Literal

KNOWN = 2**24  # elements that a value may have to be evaluated: what decides a grid is smaller
UNKNOWN = object()  # a value that depends on other arguments
CALLS = ("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat2", "custom_jvp_call", "custom_vjp_call")


class Call(NamedTuple):
    """A kernel in a program.

    Attributes:
        name: its own, after those of the functions, scopes and transformations around it.
        grids: its grid mapping. body: its jaxpr. sizes: of the grid. tables: what is prefetched.
    """

    name: str
    grids: Any
    body: Any
    sizes: tuple[int, ...]
    tables: tuple[Any, ...]


def calls(jaxpr: Any, known: Mapping[int, Any]) -> list[Call]:
    """The kernels of a closed jaxpr in order, given the values of some of its arguments by their places.

    Raises:
        NotImplementedError: other arguments decide how large a grid is, what a table holds, or whether a kernel runs.
    """
    found: list[Call] = []
    _evaluate(jaxpr, [known.get(n, UNKNOWN) for n in range(len(jaxpr.jaxpr.invars))], found, "")
    return found


def moved(call: Call) -> int | None:
    """Bytes that a kernel moves; None where it copies by itself."""
    if _holds(call.body, "dma_start"):
        return None
    if math.prod(call.sizes) == 0:
        return 0
    places = np.indices(call.sizes, np.int32).reshape(len(call.sizes), -1)
    blocked = [each for each in call.grids.block_mappings if _space(each) not in ("any", "hbm")]
    return sum(_moved(each, places, call.tables) for each in blocked)


def _moved(mapping: Any, places: np.ndarray, tables: Sequence[Any]) -> int:
    """Of one operand or result, over all steps."""
    find = lambda *place: mapping.compute_start_indices_interpret(place, *tables)
    starts = np.stack([np.broadcast_to(each, places.shape[1:]) for each in jax.vmap(find)(*places)])
    sizes = np.array([getattr(side, "block_size", 1) for side in mapping.block_shape])[:, None]
    shape = np.array(mapping.array_aval.shape)[:, None]
    other = np.append(True, (starts[:, 1:] != starts[:, :-1]).any(axis=0))
    inside = np.clip(shape - starts[:, other], 0, sizes).astype(np.int64)
    return int(inside.prod(axis=0).sum()) * mapping.array_aval.dtype.itemsize


def _space(mapping: Any) -> str:
    space = mapping.transformed_block_aval.memory_space
    return getattr(space, "value", str(space))


def _evaluate(jaxpr: Any, operands: Sequence[Any], found: list[Call], around: str) -> list[Any]:
    """The results of a closed jaxpr, as far as they are known; appends the kernels in it."""
    inner = jaxpr.jaxpr
    values = dict(zip((*inner.constvars, *inner.invars), (*jaxpr.consts, *operands), strict=True))
    read = lambda v: v.val if isinstance(v, Literal) else values[v]
    for e in inner.eqns:
        results = _results(e, [read(v) for v in e.invars], found, f"{around}/{e.source_info.name_stack}")
        values |= zip(e.outvars, results, strict=True)
    return [read(v) for v in inner.outvars]


def _results(e: Any, ins: Sequence[Any], found: list[Call], scope: str) -> Sequence[Any]:
    nothing = [UNKNOWN] * len(e.outvars)
    if e.primitive.name == "pallas_call":
        found.append(_call(e, ins, scope))
        return nothing
    inside = list(_jaxprs(e.params))
    runs = any(_holds(each, "pallas_call") for each in inside)
    small = all(getattr(v.aval, "size", KNOWN + 1) <= KNOWN for v in e.outvars)
    if small and _known(ins) and not runs:
        results = e.primitive.bind(*ins, **e.primitive.get_bind_params(e.params))
        return results if e.primitive.multiple_results else [results]
    if e.primitive.name in CALLS:
        return _evaluate(inside[0], ins, found, f"{scope}/{e.params.get('name', '')}")
    if e.primitive.name == "cond" and ins[0] is not UNKNOWN:
        return _evaluate(inside[min(max(int(ins[0]), 0), len(inside) - 1)], ins[1:], found, scope)
    if runs:
        raise NotImplementedError(f"{scope}: {e.primitive.name} with a kernel in it")
    return nothing


def _call(e: Any, ins: Sequence[Any], scope: str) -> Call:
    grids, name = e.params["grid_mapping"], f"{scope}/{e.params['name'] or ''}"
    first = grids.num_dynamic_grid_bounds
    bounds, tables = ins[:first], ins[first : first + grids.num_index_operands]
    if not _known((*bounds, *tables)):
        raise NotImplementedError(f"{name}: its grid depends on what is not known")
    left = iter(bounds)
    sizes = tuple(int(size if isinstance(size, int) else next(left)) for size in grids.grid)
    return Call(name, grids, e.params["jaxpr"], sizes, tuple(tables))


def _known(values: Sequence[Any]) -> bool:
    return not any(value is UNKNOWN for value in values)


def _jaxprs(params: Mapping[str, Any]) -> Iterator[Any]:
    """The jaxprs among an equation's parameters."""
    for value in params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            if hasattr(getattr(each, "jaxpr", each), "eqns"):
                yield each


def _holds(jaxpr: Any, primitive: str) -> bool:
    """Whether the primitive is anywhere in it."""
    equations = getattr(jaxpr, "jaxpr", jaxpr).eqns
    return any(
        e.primitive.name == primitive or any(_holds(each, primitive) for each in _jaxprs(e.params)) for e in equations
    )
