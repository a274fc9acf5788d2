"""Compare an implementation of an operation with the reference: programs, expected results, assertions."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import numpy_interpreter
from bench.verification import wrong_places
from bench.verification.error_bound import ROW_AXIS, Arrays, bound_violations, to_float64
from bench.verification.fast_compile import FAST_COMPILE_OPTIONS
from dantinox import kernels
from dantinox.kernels.dispatch import Device, target_device

Options = tuple[tuple[str, Any], ...]
Arguments = tuple[Arrays, Arrays, jax.Array]  # the differentiable inputs, the integer inputs, the cotangent


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
    Of attention with `return_lse`, the output is that of `join_lse`.
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
            result = operation(**inputs, **aux, **dict(options), implementation=implementation)
        return join_lse(*result) if isinstance(result, tuple) else result

    def run(inputs: Arrays, aux: Arrays, dout: jax.Array | None) -> dict[str, jax.Array]:
        return output_and_gradients(lambda inputs: call(inputs, aux), inputs, dout)

    fast = fast_compile or implementation == "reference"
    return jax.jit(run, compiler_options=FAST_COMPILE_OPTIONS if fast else None)


def join_lse(o: jax.Array, lse: jax.Array) -> jax.Array:
    """Make one array [..., Dv + 1] of attention's results, to take one cotangent; 0 where no key gives a lse."""
    return jnp.concatenate([o, jnp.where(lse > -jnp.inf, lse, 0)[..., None]], axis=-1)


def output_and_gradients(
    f: Callable[[Arrays], jax.Array], inputs: Arrays, dout: jax.Array | None
) -> dict[str, jax.Array]:
    """Compute the output of f and the gradients of its inputs, by name; with dout None the output alone."""
    if dout is None:
        return {"o": f(inputs)}
    o, pull = jax.vjp(f, inputs)
    return {"o": o} | {f"d{name}": gradient for name, gradient in pull(dout.astype(o.dtype))[0].items()}


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
