"""The error bound that every implementation must keep.

    error(kernel) <= 2 x error(the same formula in plain jnp, at the kernel's dtype) + one ulp

Errors are the largest absolute difference from the reference in float64, for the output and for every gradient. The
ulp is that of the largest exact value, or of 1 if that is smaller. The bound is flash-attention's
(hopper/test_flash_attn.py): the error is at most a factor of plain PyTorch's, plus an absolute term.

One exception: a gradient that is exactly zero (of the queries, with a window of one key) is a difference of equal sums
of some D products, rounded in an arbitrary direction. Its error may be `CANCELLATION_ULPS` float32 ulps in any dtype,
because kernels accumulate in float32.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import wrong_places
from dantinox import kernels
from dantinox.kernels.dispatch import Device, target_device
from tests import numpy_interpreter

CANCELLATION_ULPS = 32
# XLA compiles fast and optimizes little.
FAST_CPU_OPTIONS = {"xla_backend_optimization_level": 0, "xla_cpu_parallel_codegen_split_count": 1}
FAST_COMPILE_OPTIONS = FAST_CPU_OPTIONS if jax.default_backend() == "cpu" else None
Arrays = Mapping[str, Any]
Options = tuple[tuple[str, Any], ...]
Arguments = tuple[Arrays, Arrays, jax.Array]  # the differentiable inputs, the integer inputs, the cotangent
# The axis of rows, by the rank of an array: [N, M]; [E, M, F] and [B, H, D]; [B, T, H, D].
ROW_AXIS = {2: 0, 3: 1, 4: 1}


def jit_fast_compile(f: Callable[..., Any]) -> Callable[..., Any]:
    """Jit a function that runs once, so that compiling fast matters more than running fast."""
    return jax.jit(f, compiler_options=FAST_COMPILE_OPTIONS)


def runnable_implementations(op: str) -> list[str]:
    """The implementations that can run on this device, without the reference."""
    return [name for name, why in kernels.implementations(op).items() if why is None and name != "reference"]


@contextlib.contextmanager
def skip_if_unsupported(implementation: str) -> Iterator[None]:
    """Skip the test if a custom implementation, or a Pallas GPU kernel, raises NotImplementedError."""
    try:
        yield
    except NotImplementedError as refusal:
        if implementation in kernels.IMPLEMENTATION_NAMES and (implementation, jax.default_backend()) != (
            "pallas",
            "gpu",
        ):
            raise
        pytest.skip(str(refusal))


@functools.cache
def program(
    op: str, implementation: str, options: Options = (), fast_compile: bool = True
) -> Callable[..., dict[str, jax.Array]]:
    """Make a jitted (inputs, aux, dout) -> {"o": output, "dNAME": gradient of each input}.

    With dout None the program computes the output alone, in which case kernels store no residuals and may be others.
    The program skips the test if it asks for what a custom implementation does not support.

    Args:
        op: name of the operation.
        implementation: its implementation.
        options: its static arguments.
        fast_compile: compile fast and optimize little, as the reference always is: most programs run once, on small
            inputs.
    """
    operation = getattr(kernels, op)

    def call(inputs: Arrays, aux: Arrays) -> jax.Array:
        with skip_if_unsupported(implementation):
            return operation(**inputs, **aux, **dict(options), implementation=implementation)

    def run(inputs: Arrays, aux: Arrays, dout: jax.Array | None) -> dict[str, jax.Array]:
        return output_and_gradients(lambda inputs: call(inputs, aux), inputs, dout)

    fast = fast_compile or implementation == "reference"
    return jax.jit(run, compiler_options=FAST_COMPILE_OPTIONS if fast else None)


def output_and_gradients(
    f: Callable[[Arrays], jax.Array], inputs: Arrays, dout: jax.Array | None
) -> dict[str, jax.Array]:
    """Compute the output of f and the gradients of its inputs, by name; with dout None the output alone."""
    if dout is None:
        return {"o": f(inputs)}
    o, pull = jax.vjp(f, inputs)
    return {"o": o} | {f"d{name}": gradient for name, gradient in pull(dout)[0].items()}


INTERPRETED_DEVICES = {"CPU": Device("cpu", "cpu"), "TPU": Device("tpu", "TPU v6 lite")}


def kernel_variants(implementation: str, compiled: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """The programs to test for one that runs once or twice, by name.

    This is the jitted program itself; for Pallas on a CPU it is the kernel for CPUs and the kernel for TPUs instead,
    both evaluated in NumPy.
    """
    if implementation != "pallas" or jax.default_backend() != "cpu":
        return {implementation: compiled}
    return {
        f"pallas for a {name}": functools.partial(_evaluate_in_numpy, compiled, device)
        for name, device in INTERPRETED_DEVICES.items()
    }


def reference_float64(op: str, options: Options, *args: Any) -> dict[str, Any]:
    """Run the reference in float64; on a CPU in NumPy, which does not compile."""
    compiled = program(op, "reference", options)
    if jax.default_backend() != "cpu":
        return compiled(*args)
    return _evaluate_in_numpy(compiled, INTERPRETED_DEVICES["CPU"], *args)


def _evaluate_in_numpy(compiled: Callable[..., Any], device: Device, *args: Any) -> Any:
    leaves, tree = jax.tree.flatten(args)
    return _trace_for_numpy(compiled, device, tree, tuple((np.shape(x), x.dtype) for x in leaves))(*args)


@functools.cache
def _trace_for_numpy(
    compiled: Callable[..., Any], device: Device, tree: Any, shapes: tuple[Any, ...]
) -> Callable[..., Any]:
    args = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(*shape) for shape in shapes])
    with target_device(*device):
        return numpy_interpreter.trace(compiled.__wrapped__, *args)


def clear_programs() -> None:
    """Drop every cached program: thousands would fill the memory."""
    program.cache_clear()
    _trace_for_numpy.cache_clear()
    jax.clear_caches()


def assert_matches_reference(
    op: str,
    implementation: str,
    inputs: Arrays,
    dout: np.ndarray,
    dtype: Any,
    *,
    aux: Arrays | None = None,
    keep_float32: tuple[str, ...] = (),
    options: Options = (),
    fast_compile: bool = True,
    run: Callable[..., dict[str, jax.Array]] | None = None,
) -> dict[str, jax.Array]:
    """Compare an implementation's output and every gradient with the reference, within the error bound.

    Args:
        op: name of the operation.
        implementation: its implementation.
        inputs: the differentiable inputs in float64; they are rounded to `dtype` here.
        dout: cotangent of the output.
        dtype: dtype of the implementation's inputs.
        aux: integer inputs.
        keep_float32: names of inputs that are rounded to float32 instead of `dtype`.
        options: static arguments.
        fast_compile: see `program`.
        run: computes the results instead of the implementation's `program`.

    Returns:
        The results of the implementation, by name.

    Raises:
        AssertionError: one line per array that is wrong.
    """
    arguments = round_inputs(inputs, dout, dtype, aux=aux, keep_float32=keep_float32)
    actual = (run or program(op, implementation, options, fast_compile))(*arguments)
    assert_outputs_match(actual, *expected_outputs(op, arguments, options), dtype)
    return actual


def round_inputs(
    inputs: Arrays, dout: np.ndarray, dtype: Any, *, aux: Arrays | None = None, keep_float32: tuple[str, ...] = ()
) -> Arguments:
    """Make the arguments of a program, rounded as `assert_matches_reference` rounds them."""
    floats = {name: jnp.asarray(x, jnp.float32 if name in keep_float32 else dtype) for name, x in inputs.items()}
    return floats, aux or {}, jnp.asarray(dout, dtype)


def expected_outputs(op: str, arguments: Arguments, options: Options = ()) -> tuple[Arrays, Arrays]:
    """Returns (the results of plain jnp in the dtype of the arguments, those of the reference in float64)."""
    inputs, aux, dout = arguments
    plain = program(op, "reference", options)(inputs, aux, dout)
    with jax.enable_x64(True):
        exact_inputs = {name: jnp.asarray(to_float64(x)) for name, x in inputs.items()}
        return plain, reference_float64(op, options, exact_inputs, aux, jnp.asarray(to_float64(dout)))


def assert_outputs_match(actual: Arrays, plain: Arrays, oracle: Arrays, dtype: Any) -> None:
    """Check dtypes (those of `plain`), shapes (those of `oracle`) and errors of arrays by name."""

    def kind(x: Any, shape: tuple[int, ...]) -> str:
        return f"{x.dtype}{list(shape)}"

    wrong = []
    for name, x in actual.items():
        if name in oracle and kind(x, x.shape) != (expected := kind(plain[name], oracle[name].shape)):
            wrong.append(f"{name}: {kind(x, x.shape)}, not {expected}")
    if wrong:
        raise AssertionError("\n".join(wrong))
    assert_within_bound(actual, plain, oracle, dtype)


def assert_within_bound(actual: Arrays, plain: Arrays, oracle: Arrays, dtype: Any) -> None:
    """Check the error bound on arrays by name; the message has one line per wrong array that says where it is wrong."""
    if wrong := bound_violations(actual, plain, oracle, dtype):
        raise AssertionError("\n".join(wrong))


def bound_violations(actual: Arrays, plain: Arrays, oracle: Arrays, dtype: Any) -> list[str]:
    """One line per array that exceeds the error bound."""
    lines = {name: _violation(name, actual.get(name), plain[name], exact, dtype) for name, exact in oracle.items()}
    return [f"{name}: {line}" for name, line in lines.items() if line]


def error_terms(name: str, plain: Any, exact: np.ndarray, dtype: Any) -> tuple[float, float]:
    """Return (the error of plain jnp, the ulp-sized term) of the bound of one array."""
    largest = np.abs(exact).max(initial=0)
    ulp = float(jnp.finfo(dtype).eps) * max(1.0, largest)
    if name != "o" and largest < 1e-12:
        ulp = CANCELLATION_ULPS * float(jnp.finfo(jnp.float32).eps)
    return float(np.abs(to_float64(plain) - exact).max(initial=0)), ulp


def _violation(name: str, actual: Any, plain: Any, exact: Any, dtype: Any) -> str:
    exact = to_float64(exact)
    if actual is None:
        return "missing"
    if not np.isfinite(exact).all():
        return "the oracle itself is not finite"
    plain_error, ulp = error_terms(name, plain, exact, dtype)
    if np.abs(to_float64(actual) - exact).max(initial=0) <= 2 * plain_error + ulp:  # false for NaN
        return ""
    where = wrong_places.describe(to_float64(actual), exact, 2 * plain_error + ulp, ROW_AXIS.get(exact.ndim))
    return f"{where}; plain jnp {plain_error:.3g}, ulp {ulp:.3g}"


def to_float64(x: Any) -> np.ndarray:
    """`x` as a NumPy array in float64."""
    return np.asarray(x).astype(np.float64)


def assert_bit_equal(a: Arrays, b: Arrays) -> None:
    """Check that both hold the same arrays, bit for bit, and no NaN or infinity."""
    lines = {name: _bit_difference(np.asarray(a[name]), np.asarray(b[name])) for name in a}
    if wrong := [f"{name}: {line}" for name, line in lines.items() if line]:
        raise AssertionError("\n".join(wrong))


def _bit_difference(x: np.ndarray, y: np.ndarray) -> str:
    if not all(np.isfinite(to_float64(values)).all() for values in (x, y)):
        return "not finite"
    return wrong_places.different_bits(x, y, ROW_AXIS.get(x.ndim))


def directional_derivative(f: Callable[..., np.ndarray], inputs: Arrays, direction: Arrays, dout: np.ndarray) -> float:
    """d/de sum(dout * f(inputs + e * direction)) at e = 0, by central difference in float64."""
    e = 1e-5
    ends = [np.sum(dout * f(**{n: x + sign * e * direction[n] for n, x in inputs.items()})) for sign in (1, -1)]
    return float(ends[0] - ends[1]) / (2 * e)
