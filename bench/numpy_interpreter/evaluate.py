"""Walk a jaxpr with NumPy values. Each equation becomes a Python function once; a kernel step is a list of calls."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal

from bench.numpy_interpreter import primitives
from bench.numpy_interpreter.indexing import gather, scatter
from bench.numpy_interpreter.variables import not_watching, watched

Rule = Callable[[dict[str, Any], Any], Callable[..., Any]]
# Primitive -> rule; a rule makes (params, equation) a function of the operands, which returns one value or a tuple.
RULES: dict[str, Rule] = {}
# (place in the grid, its sizes, name) of the kernels that run, the innermost last.
RUNNING: list[tuple[tuple[int, ...], tuple[int, ...], str]] = []


class NoRuleError(NotImplementedError):
    """The evaluator has no rule for a primitive."""


def trace(f: Callable[..., Any], *args: Any) -> Callable[..., Any]:
    """F as a function of NumPy arrays with the shapes and dtypes of `args`; it returns a pytree of NumPy arrays.

    Raises:
        NoRuleError: naming a primitive that has no rule here.
    """
    # Under jit, the constants that f makes are part of the program too.
    jaxpr, shape = jax.make_jaxpr(jax.jit(f), return_shape=True)(*args)
    program, tree = Program(jaxpr), jax.tree.structure(shape)

    def evaluate(*args: Any) -> Any:
        with np.errstate(all="ignore"):
            results = program(*(np.asarray(x) for x in jax.tree.leaves(args)))
        return jax.tree.unflatten(tree, results)

    return evaluate


def run(f: Callable[..., Any], *args: Any) -> Any:
    """f(*args), evaluated once."""
    return trace(f, *args)(*args)


class Program:
    """A jaxpr, closed or open, as a function of its operands: constants first where it is open."""

    def __init__(self, jaxpr: Any) -> None:
        self.consts = [np.asarray(c) for c in getattr(jaxpr, "consts", ())]
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        places: dict[Any, int] = {}
        self.literals: list[tuple[int, np.ndarray]] = []

        def place(v: Any) -> int:
            if isinstance(v, Literal):
                self.literals.append((len(places), np.asarray(v.val, v.aval.dtype)))
                v = object()
            return places.setdefault(v, len(places))

        self.binders = [place(v) for v in (*getattr(jaxpr, "constvars", ()), *jaxpr.invars)]
        self.steps = []
        for e in jaxpr.eqns:
            made = RULES.get(e.primitive.name, _unknown)(e.params, e)
            made = watched(made, e, RUNNING) if primitives.in_kernel() else made
            self.steps.append((made, [place(v) for v in e.invars], [place(v) for v in e.outvars]))
        self.results = [place(v) for v in jaxpr.outvars]
        self.size = len(places)

    def __call__(self, *operands: Any) -> list[Any]:
        """Evaluate the equations in order; returns the results."""
        values: list[Any] = [None] * self.size
        for at, value in self.literals:
            values[at] = value
        for at, value in zip(self.binders, (*self.consts, *operands), strict=True):
            values[at] = value
        for f, ins, outs in self.steps:
            got = f(*[values[i] for i in ins])
            if type(got) not in (tuple, list):
                got = (got,)
            for at, value in zip(outs, got, strict=True):
                values[at] = value
        return [values[i] for i in self.results]


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a rule under these names."""

    def register(make: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, make))
        return make

    return register


for _name, _f in primitives.ELEMENTWISE.items():
    RULES[_name] = lambda params, e, f=_f: f
for _name, _make in (primitives.SHAPED | {"gather": gather, "scatter": scatter, "scatter-add": scatter}).items():
    RULES[_name] = lambda params, e, make=_make: make(params, e.invars, e.outvars)


def _unknown(params: dict[str, Any], e: Any) -> Callable[..., Any]:
    def refuse(*_: Any) -> None:  # only where it is reached: it may belong to another platform
        raise NoRuleError(f"no rule for {e.primitive.name}")

    return refuse


@rule("platform_index")
def _platform_index(params: dict[str, Any], e: Any) -> Callable[..., Any]:
    chosen = [platforms is None or "cpu" in platforms for platforms in params["platforms"]].index(True)
    return lambda: np.int32(chosen)


@rule(
    "jit",
    "pjit",
    "eval_jaxpr",
    "closed_call",
    "core_call",
    "checkpoint",
    "remat2",
    "custom_jvp_call",
    "custom_vjp_call",
    "custom_vmap_call",
)
def _call(params: dict[str, Any], e: Any) -> Callable[..., Any]:
    shared = e.primitive.name in ("jit", "pjit") and primitives.in_kernel()
    with not_watching() if shared else contextlib.nullcontext():
        return Program(next(params[name] for name in ("jaxpr", "call_jaxpr", "call") if name in params))


@rule("call_hi_primitive")
def _hi_primitive(params: dict[str, Any], e: Any) -> Callable[..., Any]:
    """Operations that JAX 0.12 keeps whole, such as jnp.nonzero: evaluate what they expand to."""
    primitive = params["_prim"]

    def expand(*operands: Any) -> Any:
        return primitive.expand(*jax.tree.unflatten(primitive.in_tree, operands))

    return Program(jax.make_jaxpr(expand)(*(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in e.invars)))


@rule("cond")
def _cond(params: dict[str, Any], e: Any) -> Callable[..., Any]:
    branches = [Program(b) for b in params["branches"]]
    return lambda index, *xs: branches[min(max(int(index), 0), len(branches) - 1)](*xs)


@rule("while")
def _while(params: dict[str, Any], e: Any) -> Callable[..., Any]:
    cond, body = Program(params["cond_jaxpr"]), Program(params["body_jaxpr"])
    n, m = params["cond_nconsts"], params["body_nconsts"]

    def loop(*xs: Any) -> Sequence[Any]:
        values = xs[n + m :]
        while cond(*xs[:n], *values)[0]:
            values = body(*xs[n : n + m], *values)
        return list(values)

    return loop


@rule("scan")
def _scan(params: dict[str, Any], e: Any) -> Callable[..., Any]:
    body = Program(params["jaxpr"])
    n, m, _ = map(len, params["ft_in"].unpack())  # constants, carried, scanned over

    def loop(*xs: Any) -> Sequence[Any]:
        consts, carry, over = xs[:n], list(xs[n : n + m]), xs[n + m :]
        stacked = [np.empty(v.aval.shape, v.aval.dtype) for v in e.outvars[m:]]
        steps = range(params["length"])
        for i in reversed(steps) if params["reverse"] else steps:
            out = body(*consts, *carry, *(x[i] for x in over))
            carry = out[:m]
            for whole, y in zip(stacked, out[m:]):
                whole[i] = y
        return [*carry, *stacked]

    return loop
