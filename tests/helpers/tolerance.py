"""The rule by which every implementation is judged.

    error(kernel) <= 2 x error(the same formula in plain jnp, at the kernel's dtype) + one ulp

Errors are the largest absolute difference from the reference in float64, for the output and for every gradient. The
ulp is that of the largest exact value, or of 1 where that is smaller. One exception: a gradient that is exactly zero
(of the queries, with a window of one key) is a difference of equal sums of some D products, and which way they round is
chance; it may keep `CANCELLED` float32 ulps in any dtype, for kernels accumulate in float32.
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

CANCELLED = 32
# Compile fast rather than well.
FAST = {"xla_backend_optimization_level": 0, "xla_cpu_parallel_codegen_split_count": 1}
HURRY = FAST if jax.default_backend() == "cpu" else None
Arrays = Mapping[str, Any]
Options = tuple[tuple[str, Any], ...]
Given = tuple[Arrays, Arrays, jax.Array]  # the differentiable arguments, the integer ones, the cotangent
# Where the rows of an array are, by its rank: [N, M]; [E, M, F] and [B, H, D]; [B, T, H, D].
ROW_AXIS = {2: 0, 3: 1, 4: 1}


def quick(f: Callable[..., Any]) -> Callable[..., Any]:
    """f jitted, for what runs once."""
    return jax.jit(f, compiler_options=HURRY)


def runnable(op: str) -> list[str]:
    """The implementations to judge on this device: those that can run, but for the reference itself."""
    return [name for name, why in kernels.implementations(op).items() if why is None and name != "reference"]


@contextlib.contextmanager
def refusals_skip(implementation: str) -> Iterator[None]:
    """Skips the test where an implementation of your own refuses, or a Pallas kernel of a GPU, which have limits."""
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
    op: str, implementation: str, options: Options = (), hurry: bool = True
) -> Callable[..., dict[str, jax.Array]]:
    """Jitted (inputs, aux, dout) -> {"o": output, "dNAME": gradient of each input}; with dout None the output alone.

    Without gradients kernels may be others: they keep nothing for the way back.

    With `hurry`, and for the reference, XLA compiles fast rather than well: most programs run once, on little. A test
    is skipped where it asks for what an implementation of your own refuses.
    """
    operation = getattr(kernels, op)

    def call(inputs: Arrays, aux: Arrays) -> jax.Array:
        with refusals_skip(implementation):
            return operation(**inputs, **aux, **dict(options), implementation=implementation)

    def run(inputs: Arrays, aux: Arrays, dout: jax.Array | None) -> dict[str, jax.Array]:
        return both_passes(lambda inputs: call(inputs, aux), inputs, dout)

    return jax.jit(run, compiler_options=HURRY if hurry or implementation == "reference" else None)


def both_passes(f: Callable[[Arrays], jax.Array], inputs: Arrays, dout: jax.Array | None) -> dict[str, jax.Array]:
    """The output of f and the gradients of its inputs, by name; with dout None the output alone."""
    if dout is None:
        return {"o": f(inputs)}
    o, pull = jax.vjp(f, inputs)
    return {"o": o} | {f"d{name}": gradient for name, gradient in pull(dout)[0].items()}


FORMS = {"CPU": Device("cpu", "cpu"), "TPU": Device("tpu", "TPU v6 lite")}


def forms(implementation: str, compiled: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """For what runs once or twice: a jitted program, and of Pallas on this CPU both its forms instead, in NumPy."""
    if implementation != "pallas" or jax.default_backend() != "cpu":
        return {implementation: compiled}
    return {f"pallas for a {name}": functools.partial(_evaluate, compiled, device) for name, device in FORMS.items()}


def exactly(op: str, options: Options, *args: Any) -> dict[str, Any]:
    """What the reference gives in float64; on a CPU in NumPy, which takes no compiling."""
    compiled = program(op, "reference", options)
    return _evaluate(compiled, FORMS["CPU"], *args) if jax.default_backend() == "cpu" else compiled(*args)


def _evaluate(compiled: Callable[..., Any], device: Device, *args: Any) -> Any:
    leaves, tree = jax.tree.flatten(args)
    return _traced(compiled, device, tree, tuple((np.shape(x), x.dtype) for x in leaves))(*args)


@functools.cache
def _traced(compiled: Callable[..., Any], device: Device, tree: Any, shapes: tuple[Any, ...]) -> Callable[..., Any]:
    args = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(*shape) for shape in shapes])
    with target_device(*device):
        return numpy_interpreter.trace(compiled.__wrapped__, *args)


def forget() -> None:
    """Drops every program: thousands would fill the memory."""
    program.cache_clear()
    _traced.cache_clear()
    jax.clear_caches()


def judge(
    op: str,
    implementation: str,
    inputs: Arrays,
    dout: np.ndarray,
    dtype: Any,
    *,
    aux: Arrays | None = None,
    keep: tuple[str, ...] = (),
    options: Options = (),
    hurry: bool = True,
    run: Callable[..., dict[str, jax.Array]] | None = None,
) -> dict[str, jax.Array]:
    """Apply the rule to the output and every gradient; returns what the implementation computed.

    Args:
        inputs: the differentiable arguments, in float64; rounded to `dtype` here, but for those in `keep` (float32).
        dout: cotangent of the output.
        aux: integer arguments. options: static arguments. hurry: see `program`.
        run: computes in the place of the implementation's `program`.
    """
    given = rounded(inputs, dout, dtype, aux=aux, keep=keep)
    mine = (run or program(op, implementation, options, hurry))(*given)
    hold(mine, *expect(op, given, options), dtype)
    return mine


def rounded(
    inputs: Arrays, dout: np.ndarray, dtype: Any, *, aux: Arrays | None = None, keep: tuple[str, ...] = ()
) -> Given:
    """The arguments of a program, as `judge` gives them."""
    floats = {name: jnp.asarray(x, jnp.float32 if name in keep else dtype) for name, x in inputs.items()}
    return floats, aux or {}, jnp.asarray(dout, dtype)


def expect(op: str, given: Given, options: Options = ()) -> tuple[Arrays, Arrays]:
    """(what plain jnp makes of the arguments in their dtype, what the reference makes of them in float64)."""
    inputs, aux, dout = given
    plain = program(op, "reference", options)(inputs, aux, dout)
    with jax.enable_x64(True):
        exact_inputs = {name: jnp.asarray(exact(x)) for name, x in inputs.items()}
        return plain, exactly(op, options, exact_inputs, aux, jnp.asarray(exact(dout)))


def hold(mine: Arrays, plain: Arrays, oracle: Arrays, dtype: Any) -> None:
    """The rule, on arrays by name, which have the dtypes of `plain` and the shapes of `oracle` too."""
    kind = lambda x, shape: f"{x.dtype}{list(shape)}"
    kinds = {
        name: (kind(x, x.shape), kind(plain[name], oracle[name].shape)) for name, x in mine.items() if name in oracle
    }
    wrong = [f"{name}: {found}, not {right}" for name, (found, right) in kinds.items() if found != right]
    if wrong:
        raise AssertionError("\n".join(wrong))
    check(mine, plain, oracle, dtype)


def check(mine: Arrays, plain: Arrays, oracle: Arrays, dtype: Any) -> None:
    """The rule, on arrays by name: all of them are judged, and each that breaks it has a line that says where."""
    if wrong := faults(mine, plain, oracle, dtype):
        raise AssertionError("\n".join(wrong))


def faults(mine: Arrays, plain: Arrays, oracle: Arrays, dtype: Any) -> list[str]:
    """A line for each array that breaks the rule."""
    lines = {name: _fault(name, mine.get(name), plain[name], truth, dtype) for name, truth in oracle.items()}
    return [f"{name}: {line}" for name, line in lines.items() if line]


def _fault(name: str, mine: Any, plain: Any, truth: Any, dtype: Any) -> str:
    truth = exact(truth)
    if mine is None:
        return "missing"
    if not np.isfinite(truth).all():
        return "the oracle itself is not finite"
    worst = np.abs(truth).max(initial=0)
    ulp = float(jnp.finfo(dtype).eps) * max(1.0, worst)
    if name != "o" and worst < 1e-12:
        ulp = CANCELLED * float(jnp.finfo(jnp.float32).eps)
    error, allowed = (np.abs(exact(x) - truth).max(initial=0) for x in (mine, plain))
    if error <= 2 * allowed + ulp:  # which NaN is not
        return ""
    where = wrong_places.describe(exact(mine), truth, 2 * allowed + ulp, ROW_AXIS.get(truth.ndim))
    return f"{where}; plain jnp {allowed:.3g}, ulp {ulp:.3g}"


def exact(x: Any) -> np.ndarray:
    """`x` in float64."""
    return np.asarray(x).astype(np.float64)


def same_bits(a: Arrays, b: Arrays) -> None:
    """Both hold the same arrays, bit for bit, and no NaN or infinity."""
    lines = {name: _unlike(np.asarray(a[name]), np.asarray(b[name])) for name in a}
    if wrong := [f"{name}: {line}" for name, line in lines.items() if line]:
        raise AssertionError("\n".join(wrong))


def _unlike(x: np.ndarray, y: np.ndarray) -> str:
    if not all(np.isfinite(exact(values)).all() for values in (x, y)):
        return "not finite"
    return wrong_places.different_bits(x, y, ROW_AXIS.get(x.ndim))


def slope(f: Callable[..., np.ndarray], inputs: Arrays, toward: Arrays, dout: np.ndarray) -> float:
    """d/de sum(dout * f(inputs + e * toward)) at e = 0, by central difference in float64: a gradient's oracle."""
    e = 1e-5
    ends = [np.sum(dout * f(**{n: x + sign * e * toward[n] for n, x in inputs.items()})) for sign in (1, -1)]
    return float(ends[0] - ends[1]) / (2 * e)
