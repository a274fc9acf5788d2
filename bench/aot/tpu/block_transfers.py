"""Count the bytes that a TPU kernel moves to and from memory, from its block specs and its grid.

The integer arguments of a traced program are evaluated as far as they decide anything: the size of each kernel's grid
and the tables prefetched into scalar memory. The kernel's index maps are evaluated for every step, by the rule of
Pallas's pipeline: a block is fetched if it differs from that of the step before, and a result's block is written if
that of the next step differs. Only the part of a block inside the array counts. The tables do not count.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import Literal

MAX_EVALUATED = 2**24  # elements: larger values are not evaluated, and whatever decides a grid is smaller
UNKNOWN = object()  # a value that depends on other arguments
CALLS = ("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat2", "custom_jvp_call", "custom_vjp_call")


class KernelCall(NamedTuple):
    """A call of a kernel in a program.

    Attributes:
        name: the functions, scopes and transformations around it, then its own name.
        grid_mapping: Pallas's grid mapping.
        body: its jaxpr.
        grid: the size of each axis.
        tables: the arrays prefetched into scalar memory.
    """

    name: str
    grid_mapping: Any
    body: Any
    grid: tuple[int, ...]
    tables: tuple[Any, ...]


def kernel_calls(jaxpr: Any, values: Mapping[int, Any]) -> list[KernelCall]:
    """Find the kernel calls of a closed jaxpr, in order.

    Args:
        jaxpr: the program.
        values: the values of some of its arguments, by position.

    Raises:
        NotImplementedError: other arguments decide the size of a grid, the content of a table, or whether a kernel
            runs.
    """
    found: list[KernelCall] = []
    _evaluate(jaxpr, [values.get(n, UNKNOWN) for n in range(len(jaxpr.jaxpr.invars))], found, "")
    return found


def bytes_moved(call: KernelCall) -> int | None:
    """Count the bytes that a kernel moves; None for a kernel with DMAs of its own."""
    if _contains(call.body, "dma_start"):
        return None
    return sum(count for _, count in bytes_by_operand(call))


def bytes_by_operand(call: KernelCall) -> list[tuple[tuple[int, ...], int]]:
    """Return (shape, bytes moved) of each operand and result that Pallas moves, in order: the operands come first."""
    if math.prod(call.grid) == 0:
        return []
    return [(block.mapping.array_aval.shape, block.bytes) for block in moved_blocks(call)]


class MovedBlocks(NamedTuple):
    """The blocks of one operand or result.

    Attributes:
        mapping: its block mapping.
        is_output: whether it is a result.
        moves: how often a block is loaded or stored.
        bytes: bytes of all of them.
    """

    mapping: Any
    is_output: bool
    moves: int
    bytes: int

    @property
    def is_strided(self) -> bool:
        """Whether a block is several pieces of the array."""
        sizes, shape = _block_sizes(self.mapping), self.mapping.array_aval.shape
        first = next((n for n, size in enumerate(sizes) if size > 1), len(sizes))
        return any(size < whole for size, whole in zip(sizes[first + 1 :], shape[first + 1 :]))


def moved_blocks(call: KernelCall) -> list[MovedBlocks]:
    """Return the blocks of each operand and result that Pallas moves, in order: the operands come first."""
    steps = np.indices(call.grid, np.int32).reshape(len(call.grid), math.prod(call.grid))
    num_inputs = call.grid_mapping.num_inputs
    mappings = [(mapping, n >= num_inputs) for n, mapping in enumerate(call.grid_mapping.block_mappings)]
    return [_moved(*pair, steps, call.tables) for pair in mappings if _space(pair[0]) not in ("any", "hbm")]


def _moved(mapping: Any, is_output: bool, steps: np.ndarray, tables: Sequence[Any]) -> MovedBlocks:
    """Count the moves of one operand or result.

    Args:
        mapping: its block mapping.
        is_output: whether it is a result.
        steps: the grid index of every step, [axes of the grid, steps].
        tables: the prefetched arrays.
    """

    def start_indices(*step: Any) -> Any:
        return mapping.compute_start_indices_interpret(step, *tables)

    evaluate = jax.vmap(start_indices) if len(steps) else start_indices
    starts = np.stack([np.broadcast_to(start, steps.shape[1:]) for start in evaluate(*steps)])
    sizes = np.array(_block_sizes(mapping))[:, None]
    shape = np.array(mapping.array_aval.shape)[:, None]
    changed = np.append(True, (starts[:, 1:] != starts[:, :-1]).any(axis=0))
    inside = np.clip(shape - starts[:, changed], 0, sizes).astype(np.int64)
    num_bytes = int(inside.prod(axis=0).sum()) * mapping.array_aval.dtype.itemsize
    return MovedBlocks(mapping, is_output, int(changed.sum()), num_bytes)


def _block_sizes(mapping: Any) -> list[int]:
    return [getattr(side, "block_size", 1) for side in mapping.block_shape]


def _space(mapping: Any) -> str:
    space = mapping.transformed_block_aval.memory_space
    return getattr(space, "value", str(space))


def _evaluate(jaxpr: Any, operands: Sequence[Any], found: list[KernelCall], scope: str) -> list[Any]:
    """Evaluate a closed jaxpr as far as its operands are known, and append its kernel calls to `found`."""
    inner = jaxpr.jaxpr
    values = dict(zip((*inner.constvars, *inner.invars), (*jaxpr.consts, *operands), strict=True))

    def read(variable: Any) -> Any:
        return variable.val if isinstance(variable, Literal) else values[variable]

    for equation in inner.eqns:
        inputs = [read(variable) for variable in equation.invars]
        results = _evaluate_equation(equation, inputs, found, f"{scope}/{equation.source_info.name_stack}")
        values |= zip(equation.outvars, results, strict=True)
    return [read(variable) for variable in inner.outvars]


def _evaluate_equation(equation: Any, inputs: Sequence[Any], found: list[KernelCall], scope: str) -> Sequence[Any]:
    name, params = equation.primitive.name, equation.params
    unknown = [UNKNOWN] * len(equation.outvars)
    if name == "pallas_call":
        found.append(_kernel_call(params, inputs, scope))
        return unknown
    jaxprs = list(inner_jaxprs(params))
    has_kernel = any(_contains(jaxpr, "pallas_call") for jaxpr in jaxprs)
    small = all(getattr(v.aval, "size", MAX_EVALUATED + 1) <= MAX_EVALUATED for v in equation.outvars)
    if small and _all_known(inputs) and not has_kernel:
        results = equation.primitive.bind(*inputs, **equation.primitive.get_bind_params(params))
        return results if equation.primitive.multiple_results else [results]
    if name in CALLS:
        return _evaluate(jaxprs[0], inputs, found, f"{scope}/{params.get('name', '')}")
    if name == "cond" and inputs[0] is not UNKNOWN:
        branch = min(max(int(inputs[0]), 0), len(jaxprs) - 1)
        return _evaluate(jaxprs[branch], inputs[1:], found, scope)
    if has_kernel:
        raise NotImplementedError(f"{scope}: {name} with a kernel in it")
    return unknown


def _kernel_call(params: Mapping[str, Any], inputs: Sequence[Any], scope: str) -> KernelCall:
    grid_mapping, name = params["grid_mapping"], f"{scope}/{params['name'] or ''}"
    num_bounds = grid_mapping.num_dynamic_grid_bounds
    bounds, tables = inputs[:num_bounds], inputs[num_bounds : num_bounds + grid_mapping.num_index_operands]
    if not _all_known((*bounds, *tables)):
        raise NotImplementedError(f"{name}: its grid depends on unknown values")
    dynamic = iter(bounds)
    grid = tuple(int(size if isinstance(size, int) else next(dynamic)) for size in grid_mapping.grid)
    return KernelCall(name, grid_mapping, params["jaxpr"], grid, tuple(tables))


def _all_known(values: Sequence[Any]) -> bool:
    return not any(value is UNKNOWN for value in values)


def inner_jaxprs(params: Mapping[str, Any]) -> Iterator[Any]:
    """Yield the jaxprs among an equation's parameters."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if hasattr(getattr(item, "jaxpr", item), "eqns"):
                yield item


def _contains(jaxpr: Any, primitive: str) -> bool:
    """Whether a jaxpr contains a primitive, at any depth."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if equation.primitive.name == primitive:
            return True
        if any(_contains(inner, primitive) for inner in inner_jaxprs(equation.params)):
            return True
    return False
