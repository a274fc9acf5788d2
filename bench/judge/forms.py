"""The forms of a kernel and how each runs without its device.

CPU      what runs on this CPU, evaluated in NumPy where that is possible, else compiled
TPU      the Pallas kernel for a TPU in the NumPy evaluator: scratch memory and padding hold NaN
Hopper   the Mosaic GPU kernel in JAX's simulator, with race detection
Triton   the Triton kernel in Triton's interpreter
"""

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from bench import numpy_interpreter
from bench.judge.cases import Case, Problem
from bench.verification.fast_compile import jit_fast_compile
from dantinox import kernels
from dantinox.kernels import workloads
from dantinox.kernels.dispatch import Device, target_device

Results = dict[str, np.ndarray]
DEVICES = {
    "CPU": Device("cpu", "cpu"),
    "TPU": Device("tpu", "TPU v6 lite"),
    "Hopper": Device("gpu", "NVIDIA H100 80GB HBM3"),
    "Triton": Device("gpu", "NVIDIA A100-SXM4-80GB"),
}
PRIMITIVES = {"Hopper": ("mpmd_map", "core_map"), "Triton": ("triton_kernel_call",)}


class NoKernelError(Exception):
    """The implementation has no kernel in this form; the message says what it has."""


class NoGradientError(Exception):
    """The implementation cannot be differentiated; the message says why."""


def program(op: str, implementation: str, workload: workloads.Workload, gradients: bool) -> Callable[..., Any]:
    """Return a function of (inputs, aux, cotangent) that computes the results of a case by name."""
    operation, options = getattr(kernels, op), workload.options()

    def decode(inputs: dict[str, Any], aux: dict[str, Any], _: Any) -> dict[str, Any]:
        o, cache = operation(**inputs, cache=aux["cache"], **options, implementation=implementation)
        arrays = {f"cache {name}": x for name, x in cache._asdict().items() if x is not None and name != "length"}
        return {"o": o, **arrays, "length": cache.length}

    def differentiable(inputs: dict[str, Any], aux: dict[str, Any], cotangent: Any) -> dict[str, Any]:
        def call(inputs: dict[str, Any]) -> Any:
            return operation(**inputs, **aux, **options, implementation=implementation)

        if not gradients:
            return {"o": call(inputs)}
        o, pull = jax.vjp(call, inputs)
        return {"o": o} | {f"d{name}": gradient for name, gradient in pull(cotangent.astype(o.dtype))[0].items()}

    return decode if op == "decode_attention" else differentiable


def arguments(case: Case, problem: Problem, *, clean: bool = False) -> tuple[Any, ...]:
    """Return the arguments of `program`: those that a kernel gets, or the clean ones of the reference."""
    aux = problem.aux
    if case.workload.op == "decode_attention":
        aux = {"cache": aux["clean cache" if clean else "cache"]}
    return problem.clean if clean else problem.inputs, aux, problem.cotangent


def run(op: str, implementation: str, form: str, case: Case, problem: Problem, *, gradients: bool = True) -> Results:
    """Run a case in a form.

    Raises:
        NotImplementedError: the implementation refuses the case; the message says why.
        NoKernelError: it has no kernel in this form.
        NoGradientError: it cannot be differentiated.
    """
    gradients = gradients and op != "decode_attention"
    args = arguments(case, problem)
    f = program(op, implementation, case.workload, gradients)
    with target_device(*DEVICES[form]):
        if form == "Triton":  # in this process `triton.jit` makes kernels that only its interpreter takes
            return _evaluate_in_triton(f, args)
        try:
            jaxpr = jax.make_jaxpr(lambda *args: f(*args))(*args)
        except NotImplementedError:
            raise
        except Exception as error:
            if gradients and _runs_forward(op, implementation, case, args):
                raise NoGradientError(_first_line(error)) from error
            raise
        if form != "CPU":
            require_kernel(form, jaxpr)
        # The passes of a TPU's matrix unit take time; the cases of single features show their precision.
        exact = numpy_interpreter.exact_products() if case.is_pair else contextlib.nullcontext()
        with exact, _interpreted_hopper_kernels(op):
            return _EVALUATORS[form](f, args)


HOPPER_MODULES = {
    "attention": "attention.pallas_sm90.vjp",
    "grouped_matmul": "grouped_matmul.pallas_sm90.vjp",
    "moe_mlp": "moe.pallas_sm90.vjp",
    "decode_attention": "decode_attention.pallas_sm90.kernel",
    "linear_cross_entropy": "linear_cross_entropy.pallas_sm90.vjp",
}


def _interpreted_hopper_kernels(op: str) -> contextlib.AbstractContextManager[Any]:
    """Our own Hopper kernels have a variant for the simulator, which cannot multiply from registers.

    Their persistent kernels get two thread blocks in place of one per SM: each takes seconds to simulate, idle or not.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    module = importlib.import_module(f"dantinox.kernels.ops.{HOPPER_MODULES[op]}")
    options: dict[str, Any] = {"interpret": plgpu.InterpretGPUParams(detect_races=True)}
    if op in ("grouped_matmul", "moe_mlp", "linear_cross_entropy"):
        options["blocks"] = 2
    function = functools.partial(getattr(module, op), **options)
    return mock.patch.object(module, op, function)


def _runs_forward(op: str, implementation: str, case: Case, args: tuple[Any, ...]) -> bool:
    try:
        jax.eval_shape(program(op, implementation, case.workload, False), *args)
    except Exception:
        return False
    return True


def _evaluate_on_cpu(f: Callable[..., Any], args: tuple[Any, ...]) -> Results:
    """The NumPy evaluator, or a compiled program where it lacks a rule."""
    try:
        return numpy_interpreter.run(f, *args)
    except numpy_interpreter.NoRuleError:
        return jax.tree.map(np.asarray, jax.jit(f)(*args))


def _evaluate_on_tpu(f: Callable[..., Any], args: tuple[Any, ...]) -> Results:
    """The NumPy evaluator, or JAX's slower simulator for kernels that copy by themselves."""
    try:
        return numpy_interpreter.run(f, *args)
    except numpy_interpreter.NoRuleError:
        from bench.verification import race_detector

        return _checked(race_detector.on_tpu(f, *args, cores=1))


def _evaluate_on_hopper(f: Callable[..., Any], args: tuple[Any, ...]) -> Results:
    from bench.verification import race_detector

    return _checked(race_detector.on_gpu(f, *args, memories=("nan",)))


def _evaluate_in_triton(f: Callable[..., Any], args: tuple[Any, ...]) -> Results:
    from bench.judge import triton_interpreter

    with jax.default_matmul_precision("highest"):  # float32 operands may be rounded to TF32 otherwise
        return triton_interpreter.run(f, args)


def _checked(findings: Any) -> Results:
    if findings.clean:
        return findings.result
    if findings.out_of_bounds:
        raise IndexError(findings.out_of_bounds)
    raise RuntimeError("a race" if findings.races else "the result depends on memory that was never written")


_EVALUATORS = {
    "CPU": _evaluate_on_cpu,
    "TPU": _evaluate_on_tpu,
    "Hopper": _evaluate_on_hopper,
}


def require_kernel(form: str, jaxpr: Any) -> None:
    """Raise NoKernelError if a program has no kernel in a form."""
    found = {_kind(equation) for equation in _equations(jaxpr.jaxpr)} - {None}
    if form not in found:
        others = " and ".join(sorted(found)) or "no kernel, only JAX operations"
        raise NoKernelError(f"traced for {DEVICES[form].kind}, it has {others}")


def _kind(equation: Any) -> str | None:
    """Tell which form an equation is a kernel of, or None."""
    name = equation.primitive.name
    if name == "pallas_call":
        if equation.params.get("interpret"):
            return "an interpreted kernel"
        backend = str(equation.params.get("backend") or "")
        return "Hopper" if "gpu" in backend or "triton" in backend else "TPU"
    return next((form for form, names in PRIMITIVES.items() if name in names), None)


def _equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _equations(inner)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]


def expected(op: str, case: Case, problem: Problem, *, gradients: bool = True) -> tuple[Results, Results]:
    """Return (results of the reference in the case's dtype, those in float64), both in NumPy but for 16 bits."""
    gradients = gradients and op != "decode_attention"
    f = program(op, "reference", case.workload, gradients)
    args = arguments(case, problem, clean=True)
    with target_device(*DEVICES["CPU"]):
        if case.dtype == "float32":
            plain = numpy_interpreter.run(f, *args)
        else:
            plain = jax.tree.map(np.asarray, jit_fast_compile(f)(*args))
        with jax.enable_x64(True):
            exact = numpy_interpreter.run(f, *jax.tree.map_with_path(_widen, args))
        if op == "decode_attention":  # stored exactly; the other slots keep their contents
            stored = numpy_interpreter.run(f, *arguments(case, problem))
            exact |= {name: x for name, x in stored.items() if name != "o"}
            plain |= {name: x for name, x in stored.items() if name != "o"}
    return plain, exact


def _widen(path: Any, x: Any) -> Any:
    x = np.asarray(x)
    is_scale = "scale" in jax.tree_util.keystr(path)  # float32 by definition
    wide = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize > 1 and not is_scale
    return x.astype(np.float64) if wide else x
