"""Run the grid of a traced kernel: how often does it take each branch, and how often does it run each loop?

Only the control slice is evaluated: the scalars that follow from the place in the grid and from the tables prefetched
into scalar memory, for all places of the grid at once. Everything else, such as a block or scratch memory, is unknown.
A branch whose condition is unknown counts in every step.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import Literal

from bench.aot.tpu.block_transfers import CALLS, UNKNOWN, KernelCall, inner_jaxprs
from bench.numpy_interpreter.evaluate import RULES
from bench.numpy_interpreter.primitives import ELEMENTWISE

# Those of the NumPy evaluator's rules that take an array with a scalar per step where they take a scalar.
SCALAR_PRIMITIVES = {*ELEMENTWISE, "select_n", "convert_element_type", "integer_pow"} - {"optimization_barrier"}
MAX_ITERATIONS = 2**16  # of one loop in one step
TRANSCENDENTAL = frozenset("exp exp2 log log1p expm1 tanh logistic sqrt rsqrt div pow integer_pow sin cos erf".split())
Lanes = np.ndarray  # the steps of the grid that an equation is evaluated for, as flat indices
Path = tuple[Any, ...]


class UnknownStepsError(NotImplementedError):
    """What a step runs depends on loaded data."""


@dataclass(eq=False)
class Part:
    """A part of a kernel that steps may skip or repeat.

    Attributes:
        name: name of the function that `pl.when` or the loop calls.
        loop: whether it is the body of a loop.
        count: how often it is executed, over all steps.
        known: whether the count is exact; an upper bound otherwise.
        has_matmul: whether it multiplies matrices, in its own parts too; None: unknown.
        has_transcendental: whether it uses the transcendental unit, in its own parts too; None: unknown.
        is_transfer: whether it only copies a block.
        has_region: whether the schedule surely has a region for it.
        parts: the parts in it, in the order of the program.
    """

    name: str
    loop: bool = False
    count: int = 0
    known: bool = True
    has_matmul: bool | None = None
    has_transcendental: bool | None = None
    is_transfer: bool = False
    has_region: bool = False
    parts: list["Part"] = field(default_factory=list)


class _Table(NamedTuple):
    """A prefetched array."""

    values: np.ndarray


def run_grid(call: KernelCall) -> Part:
    """Count the parts of a kernel's body over all steps of its grid.

    Args:
        call: the kernel.

    Returns:
        The body; its count is the number of steps.

    Raises:
        UnknownStepsError: loaded data decides the number of iterations of a loop.
    """
    steps = math.prod(call.grid)
    tables = [_Table(np.asarray(table)) for table in call.tables]
    unknown = [UNKNOWN] * (len(call.body.invars) - len(tables))
    body = Part("body", count=steps)
    with np.errstate(all="ignore"):
        _Run(call).evaluate(call.body, [*tables, *unknown], np.arange(steps), body, ())
    return body


class _Run:
    """The evaluation of one kernel."""

    def __init__(self, call: KernelCall) -> None:
        self.grid = call.grid
        batched = call.grid_mapping.vmapped_dims  # axes that `vmap` added, which the body does not see
        self.axes = [axis for axis in range(len(call.grid)) if axis not in batched]
        self.found: dict[Path, Part] = {}

    def part(self, parent: Part, path: Path, jaxpr: Any, *, loop: bool) -> tuple[Part, bool]:
        """Return the part at a path of the program, and whether it is new."""
        new = path not in self.found
        if new:
            units = _units(jaxpr)
            part = Part(_name(jaxpr), loop, 0, parent.known, *units)
            self.found[path] = part
            parent.parts.append(part)
        return self.found[path], new

    def evaluate(self, jaxpr: Any, operands: Sequence[Any], lanes: Lanes, parent: Part, path: Path) -> list[Any]:
        """Evaluate a jaxpr for some steps as far as its operands are known, and count its parts."""
        inner = getattr(jaxpr, "jaxpr", jaxpr)
        consts = [_constant(const) for const in getattr(jaxpr, "consts", ())]
        values = dict(zip((*inner.constvars, *inner.invars), (*consts, *operands), strict=True))

        def read(variable: Any) -> Any:
            return _constant(variable.val) if isinstance(variable, Literal) else values[variable]

        for equation in inner.eqns:
            inputs = [read(variable) for variable in equation.invars]
            results = self.equation(equation, inputs, lanes, parent, (*path, id(equation)))
            values |= zip(equation.outvars, results, strict=True)
        return [read(variable) for variable in inner.outvars]

    def equation(self, equation: Any, inputs: list[Any], lanes: Lanes, parent: Part, path: Path) -> Sequence[Any]:
        name, params = equation.primitive.name, equation.params
        unknown = [UNKNOWN] * len(equation.outvars)
        if name == "program_id":
            return [np.unravel_index(lanes, self.grid)[self.axes[params["axis"]]].astype(np.int32)]
        if name == "num_programs":
            return [np.int32(self.grid[self.axes[params["axis"]]])]
        if name == "cond":
            return self.cond(params["branches"], inputs[0], inputs[1:], len(unknown), lanes, parent, path)
        if name == "while":
            return self.while_loop(params, inputs, lanes, parent, path)
        if name == "scan":
            return self.scan(params, inputs, lanes, parent, path)
        if name == "run_scoped":
            jaxpr = params["jaxpr"]
            operands = [*inputs, *[UNKNOWN] * (len(jaxpr.invars) - len(inputs))]
            return self.evaluate(jaxpr, operands, lanes, parent, path)
        if name in CALLS or name == "custom_vjp_call":
            jaxpr = next(params[key] for key in ("jaxpr", "call_jaxpr") if key in params)
            return self.evaluate(jaxpr, inputs, lanes, parent, path)
        if name == "get":
            return [_load(params, inputs)]
        if name in ("swap", "addupdate") and isinstance(inputs[0], _Table):
            raise UnknownStepsError("the kernel writes to its tables")
        scalar = name in SCALAR_PRIMITIVES and all(getattr(v.aval, "shape", None) == () for v in equation.outvars)
        if scalar and not any(value is UNKNOWN or isinstance(value, _Table) for value in inputs):
            return [RULES[name](params, equation)(*inputs)]
        if any(_has_control(jaxpr) for jaxpr in inner_jaxprs(params)):
            raise UnknownStepsError(f"{name} has branches or loops in it")
        return unknown

    def cond(
        self,
        branches: Sequence[Any],
        index: Any,
        operands: list[Any],
        num_results: int,
        lanes: Lanes,
        parent: Part,
        path: Path,
    ) -> list[Any]:
        """Count the branches in the order of the compiled program: all but the first, then the first."""
        known = index is not UNKNOWN
        nonzero = np.broadcast_to(np.asarray(index) > 0, lanes.shape) if known else np.ones(lanes.shape, bool)
        outcomes = []
        for side, rest, taken in (
            ("nonzero", branches[1:], nonzero),
            ("zero", branches[:1], ~nonzero if known else nonzero),
        ):
            at, key = np.flatnonzero(taken), (*path, side)
            chosen = [_select(value, at, lanes) for value in operands]
            inner, inner_parent = lanes[at], parent
            if any(getattr(branch, "jaxpr", branch).eqns for branch in rest):
                inner_parent, _ = self.part(parent, key, rest[-1], loop=False)
                inner_parent.count += len(at)
                inner_parent.known &= known
            if len(rest) > 1:
                position = UNKNOWN if not known else _select(np.asarray(index) - 1, at, lanes)
                results = self.cond(rest, position, chosen, num_results, inner, inner_parent, key)
            else:
                results = self.evaluate(rest[0], chosen, inner, inner_parent, key)
            outcomes.append((at, results))
        if not known:
            return [UNKNOWN] * num_results
        return [_merge([(at, results[n]) for at, results in outcomes], lanes) for n in range(num_results)]

    def while_loop(
        self, params: dict[str, Any], inputs: list[Any], lanes: Lanes, parent: Part, path: Path
    ) -> list[Any]:
        """Count a loop, and the steps that enter it."""
        n, m = params["cond_nconsts"], params["body_nconsts"]
        cond_consts, body_consts, carry = inputs[:n], inputs[n : n + m], inputs[n + m :]
        cond, body = params["cond_jaxpr"], params["body_jaxpr"]
        entered, new = self.part(parent, (*path, "entered"), body, loop=False)
        loop, _ = self.part(entered, (*path, "loop"), body, loop=True)

        def run(jaxpr: Any, consts: list[Any], carry: list[Any], at: Lanes, part: Part, key: str) -> list[Any]:
            chosen = [_select(value, at, lanes) for value in consts]
            return self.evaluate(jaxpr, [*chosen, *carry], lanes[at], part, (*path, key))

        if new:  # find its parts, even if no step runs it
            none = np.arange(0)
            run(body, body_consts, [_select(value, none, lanes) for value in carry], none, loop, "body")
        final = [
            value if value is UNKNOWN or isinstance(value, _Table) else np.array(np.broadcast_to(value, lanes.shape))
            for value in carry
        ]
        at, carry = np.arange(len(lanes)), list(final)
        for iteration in itertools.count():
            (more,) = run(cond, cond_consts, carry, at, parent, "cond")
            if more is UNKNOWN or iteration > MAX_ITERATIONS:
                raise UnknownStepsError(f"loaded data decides how often the loop {loop.name} runs")
            keep = np.flatnonzero(np.broadcast_to(more, at.shape))
            carry = [_select(value, keep, at) for value in carry]
            at = at[keep]
            if not len(at):
                return final
            entered.count += len(at) if iteration == 0 else 0
            loop.count += len(at)
            carry = run(body, body_consts, carry, at, loop, "body")
            for position, value in enumerate(carry):
                if value is UNKNOWN:
                    final[position] = UNKNOWN
                elif isinstance(final[position], np.ndarray):
                    final[position][at] = value

    def scan(self, params: dict[str, Any], inputs: list[Any], lanes: Lanes, parent: Part, path: Path) -> list[Any]:
        """Count a loop with a fixed number of iterations."""
        num_consts, num_carry, num_over = map(len, params["ft_in"].unpack())
        jaxpr, length, unroll = params["jaxpr"], params["length"], max(1, min(params["unroll"], params["length"]))
        inner = jaxpr.jaxpr
        loop = parent
        if unroll < length:
            loop, _ = self.part(parent, (*path, "loop"), jaxpr, loop=True)
            loop.count += len(lanes) * (length // unroll)
        consts, carry = inputs[:num_consts], inputs[num_consts : num_consts + num_carry]
        num_stacked = len(inner.outvars) - num_carry
        scalar_results = any(getattr(v.aval, "shape", None) == () for v in inner.outvars[:num_carry])
        if not (_has_control(jaxpr) or scalar_results):
            return [UNKNOWN] * len(inner.outvars)
        for iteration in range(length):
            over = [UNKNOWN] * num_over
            key = (*path, iteration % unroll)
            carry = self.evaluate(jaxpr, [*consts, *carry, *over], lanes, loop, key)[:num_carry]
            if not _has_control(jaxpr) and all(value is UNKNOWN for value in carry):
                break
        return [*carry, *[UNKNOWN] * num_stacked]


def _constant(value: Any) -> Any:
    """A literal or a constant of a jaxpr: a scalar, or unknown."""
    return np.asarray(value)[()] if np.ndim(value) == 0 else UNKNOWN


def _select(value: Any, at: np.ndarray, lanes: Lanes) -> Any:
    """The values of some of the lanes."""
    if value is UNKNOWN or isinstance(value, _Table) or np.ndim(value) == 0:
        return value
    return value[at]


def _merge(outcomes: Sequence[tuple[np.ndarray, Any]], lanes: Lanes) -> Any:
    """Put together the results of two branches."""
    outcomes = [(at, value) for at, value in outcomes if len(at)]
    if any(value is UNKNOWN or isinstance(value, _Table) for _, value in outcomes) or not outcomes:
        return UNKNOWN
    merged = np.empty(lanes.shape, np.asarray(outcomes[0][1]).dtype)
    for at, value in outcomes:
        merged[at] = value
    return merged


def _load(params: dict[str, Any], inputs: Sequence[Any]) -> Any:
    """Read one element of a table in each lane."""
    table, *leaves = inputs
    if not isinstance(table, _Table):
        return UNKNOWN
    transforms = jax.tree.unflatten(params["tree"], leaves)
    if len(transforms) != 1:
        return UNKNOWN
    indices = transforms[0].indices
    if any(index is UNKNOWN or hasattr(index, "stride") for index in indices):
        return UNKNOWN
    return table.values[tuple(np.clip(i, 0, size - 1) for i, size in zip(indices, table.values.shape, strict=True))]


def _name(jaxpr: Any) -> str:
    """Name of the function that a jaxpr was traced from."""
    info = getattr(jaxpr, "jaxpr", jaxpr).debug_info
    return info.func_src_info.split(" at ")[0].rpartition(".")[2] if info is not None else ""


def _equations(jaxpr: Any) -> Iterator[Any]:
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield equation
        for inner in inner_jaxprs(equation.params):
            yield from _equations(inner)


def _units(jaxpr: Any) -> tuple[bool, bool]:
    """Whether a jaxpr uses the matrix unit, and whether it uses the transcendental unit."""
    equations = list(_equations(jaxpr))
    names = {e.primitive.name for e in equations if not e.outvars or _is_float(e.outvars[0].aval)}
    return any(e.primitive.name == "dot_general" for e in equations), bool(names & TRANSCENDENTAL)


def _is_float(aval: Any) -> bool:
    return jax.numpy.issubdtype(getattr(aval, "dtype", np.int32), np.floating)


def _has_control(jaxpr: Any) -> bool:
    """Whether a jaxpr has branches or loops in it."""
    return any(equation.primitive.name in ("cond", "while", "scan") for equation in _equations(jaxpr))
