"""Checks of the Triton attention in Triton's interpreter: needs Triton, no GPU.

`python -m tests.helpers.triton_attention NAME...` runs the named checks, or all, and prints one line for each; it fails
at the first that does not hold. The cases of single features and of pairs are those of `bench.judge`.
"""

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from bench.judge import triton_interpreter
from dantinox import kernels
from dantinox.kernels.dispatch import target_device
from dantinox.kernels.ops.attention.triton import block_sizes

Array = jax.Array
dot = triton_interpreter._dot
DEVICE = "gpu", "NVIDIA A100-SXM4-80GB"


def draw(T: int, S: int, *, B: int = 1, H: int = 2, K: int = 1, D: int = 16, gate: int = 0, dtype: str = "float32"):
    """Return q, k, v, gate or None, and a cotangent."""
    rng = np.random.default_rng(T + 1000 * S)
    shapes = (B, T, H, D), (B, S, K, D), (B, S, K, D), (B, T, H, gate), (B, T, H, D)
    q, k, v, g, do = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
    return q, k, v, (g if gate else None), do


def with_gradients(implementation: str, **options: Any) -> Callable[..., Any]:
    """Return a function of the arrays of `draw` that returns the output and the gradients."""

    def run(q: Array, k: Array, v: Array, gate: Array | None, do: Array) -> tuple[Any, ...]:
        def attend(q: Array, k: Array, v: Array, gate: Array | None) -> Array:
            return kernels.attention(q, k, v, gate=gate, implementation=implementation, **options)

        o, vjp = jax.vjp(attend, q, k, v, gate)
        return o, *vjp(do)

    return run


def interpret(f: Callable[..., Any], *args: Any, precision: str = "highest") -> Any:
    """Return f(*args), with the Triton kernels in the interpreter."""
    with target_device(*DEVICE), jax.default_matmul_precision(precision):
        return triton_interpreter.run(f, args)


def error(actual: Any, expected: Any) -> float:
    """Return the largest difference, relative to the largest value of each array, but at least to 1."""
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    errors = [np.max(np.abs(np.float64(a) - np.float64(b))) / max(1, np.max(np.abs(np.float64(b)))) for a, b in pairs]
    return float(max(errors))


@contextlib.contextmanager
def small_blocks() -> Iterator[None]:
    """Let few tokens of up to 32 numbers have several blocks."""
    wide, tall = block_sizes.TritonBlockSizes(16, 32, 4, 1), block_sizes.TritonBlockSizes(32, 16, 4, 1)
    with contextlib.ExitStack() as stack:
        for table, sizes in ((block_sizes.FWD, tall), (block_sizes.DQ, tall), (block_sizes.DKV, wide)):
            stack.enter_context(mock.patch.dict(table, {(bytes_, 32): sizes for bytes_ in (2, 4)}))
        yield


def check_features() -> None:
    """Every feature, with gradients, on as few tokens as give several blocks of every kind."""
    documents = jnp.asarray([np.sort(np.arange(110) * 7 % 5), np.arange(110) // 45], jnp.int32)
    own_ids, ids = (documents[:, :66],) * 2, (documents[:1, :37], documents[:1, 40:])
    problems: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
        ({"T": 50, "S": 50, "B": 2, "H": 4, "K": 2, "gate": 16}, {}),
        ({"T": 67, "S": 110, "gate": 1}, {"window": 66}),
        ({"T": 45, "S": 20, "D": 24, "gate": 1}, {"softcap": 0.8, "scale": 0.3}),
        ({"T": 20, "S": 75, "H": 1, "gate": 16}, {"causal": False, "softcap": 2.0**41}),
        ({"T": 66, "S": 66, "B": 2, "H": 1}, {"segment_ids": own_ids, "window": 40}),
        ({"T": 37, "S": 70}, {"segment_ids": ids, "causal": False}),
    )
    with small_blocks():
        for sizes, options in problems:
            arrays = draw(**sizes)
            expected = jax.jit(with_gradients("reference", **options))(*arrays)
            actual = interpret(with_gradients("triton", **options), *arrays)
            for name, a, b in zip(("o", "dq", "dk", "dv", "dgate"), actual, expected, strict=True):
                assert b is None or error(a, b) < 5e-6, (sizes, list(options), name, error(a, b))
        q, k, v, gate, do = arrays
        is_hidden = (ids[1] > 1)[:, :, None, None]
        k, v = jnp.where(is_hidden, jnp.nan, k), jnp.where(is_hidden, jnp.nan, v)
        again = interpret(with_gradients("triton", **options), q, k, v, gate, do)
        assert jax.tree.all(jax.tree.map(np.array_equal, again, actual)), "keys that no query sees have an effect"


def check_sizes() -> None:
    """Sizes of one row, of one tile and of one more, windows of one key and past the last."""
    worst = 0.0
    for T, S in ((1, 1), (1, 129), (129, 1), (7, 129), (129, 7), (127, 127), (129, 129)):
        for options in ({}, {"window": 1}, {"window": 1000}, {"causal": False}):
            arrays = draw(T, S, gate=1)
            worst = max(worst, error(interpret(with_gradients("triton", **options), *arrays),
                                     with_gradients("reference", **options)(*arrays)))  # fmt: skip
            assert worst < 5e-6, (T, S, options, worst)


def dot_of_tensor_cores(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
    """Multiply tiles as tensor cores do: of float32 they take the bits of TF32."""
    from triton.runtime.interpreter import TensorHandle

    cut = (TensorHandle((x.data.view(np.int32) & -0x2000).view(np.float32), x.dtype.scalar) for x in (a, b))
    return dot(builder, *cut, *rest)


def check_tf32() -> None:
    """By default float32 is rounded to TF32: as exact as rounding, not as cutting off, and exact where asked for."""
    arrays = draw(100, 100, D=32)
    expected = jax.jit(with_gradients("reference", window=70))(*arrays)
    f = with_gradients("triton", window=70)
    with mock.patch.object(triton_interpreter, "_dot", dot_of_tensor_cores):
        rounded = interpret(f, *arrays, precision="default")
    exact = interpret(f, *arrays, precision="high")

    def relative_rms(actual: Any) -> dict[str, float]:
        arrays = zip(("o", "dq", "dk", "dv"), actual[:4], expected[:4], strict=True)
        return {name: float(np.sqrt(np.mean(np.square(a - b)) / np.mean(np.square(b)))) for name, a, b in arrays}

    rms, exact_rms = relative_rms(rounded), relative_rms(exact)
    for name, limit in {"o": 3.8e-4, "dq": 5.7e-4, "dk": 5.5e-4, "dv": 4.2e-4}.items():
        assert 1e-4 < rms[name] < limit and exact_rms[name] < 1e-6, (name, rms, exact_rms)

    # An addition to the bits of this NaN turns it into a number.
    q, k, v, *_ = draw(3, 3)
    q = q.at[0, 1].set(jax.lax.bitcast_convert_type(jnp.int32(0x7FFFFFFF), jnp.float32))
    o = interpret(functools.partial(kernels.attention, implementation="triton"), q, k, v, precision="default")
    assert np.array_equal(np.isnan(o[0, :, 0, 0]), [False, True, False])


def check_vmap() -> None:
    """A batch over any of the arrays, also of batches, and of gradients."""
    q, k, v, gate, do = draw(9, 12, B=2, H=1, gate=16)
    qs, many = jnp.stack([q, 2 * q, -q]), jnp.stack([k, v, k + v])
    f, reference = with_gradients("triton", window=7), jax.jit(with_gradients("reference", window=7))
    batched = interpret(jax.vmap(f, in_axes=(0, 0, None, None, None)), qs, many, v, gate, do)
    expected = [reference(qs[n], many[n], v, gate, do) for n in range(3)]
    assert error(batched, jax.tree.map(lambda *x: jnp.stack(x), *expected)) < 5e-6
    twice = jax.vmap(jax.vmap(f, in_axes=(0, None, None, None, None)), in_axes=(None, 0, None, None, None))
    nested = interpret(twice, qs, many, v, gate, do)
    assert error(jax.tree.map(lambda x: x[2, 1], nested), reference(qs[1], many[2], v, gate, do)) < 5e-6


def check_shard_map() -> None:
    """Two devices, each with a sequence, under `shard_map` with its default check; keys and values on both."""
    q, k, v, gate, do = draw(33, 40, B=2, gate=16)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, everywhere = PartitionSpec("data"), PartitionSpec()
    k, v = k[:1], v[:1]
    f = with_gradients("triton")
    sharded = jax.shard_map(f, mesh=mesh, in_specs=(rows, everywhere, everywhere, rows, rows),
                            out_specs=(rows, rows, everywhere, everywhere, rows))  # fmt: skip
    o, dq, dk, dv, dgate = interpret(sharded, q, k, v, gate, do)
    both = [with_gradients("reference")(q[n : n + 1], k, v, gate[n : n + 1], do[n : n + 1]) for n in range(2)]
    expected = [jnp.concatenate([one[n] for one in both]) for n in (0, 1, 4)]
    assert error((o, dq, dgate), tuple(expected)) < 5e-6
    assert error((dk, dv), tuple(both[0][n] + both[1][n] for n in (2, 3))) < 5e-6


def check_remat_and_scan() -> None:
    """Rematerialization, a scan over layers and x64."""
    q, k, v, *_ = draw(33, 33)

    def loss(implementation: str, q: Array) -> Array:
        def layer(x: Array, _: None) -> tuple[Array, None]:
            return kernels.attention(x, k, v, window=9, implementation=implementation), None

        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), q, length=2)[0] ** 2)

    expected = jax.grad(lambda q: loss("reference", q))(q)
    assert error(interpret(jax.grad(lambda q: loss("triton", q)), q), expected) < 5e-6
    with jax.enable_x64(True), jax.numpy_rank_promotion("raise"):
        assert error(interpret(jax.grad(lambda q: loss("triton", q)), q), expected) < 5e-6


def check_determinism() -> None:
    """Two runs are bit-equal."""
    arrays = draw(100, 100, H=4, K=2, gate=16, dtype="bfloat16")
    first, second = (interpret(with_gradients("triton"), *arrays) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def check_float16_range() -> None:
    """Gradients that fit float16, with gradients of scores that do not, or with cotangents of values that vanish."""
    q, k, v, gate, do = draw(40, 40, gate=16, dtype="float16")
    for arrays in (q / 32, k / 32, v * 64, gate - 6, do * 2000), (q / 32, k * 32, v * 8192, gate - 18, do):
        wide = [x.astype(jnp.float32) for x in arrays]
        expected, actual = with_gradients("reference")(*wide), interpret(with_gradients("triton"), *arrays)
        for a, b in zip(actual, expected, strict=True):
            error = np.max(np.abs(np.float64(a) - np.float64(b)))
            assert error < 4e-3 * np.max(np.abs(np.float64(b))) + 2.0**-24


def check_second_derivative() -> None:
    """It is refused by one sentence."""
    q, k, v, _, do = draw(8, 8)

    def dq(q: Array, do: Array) -> Array:
        return jax.vjp(lambda q: kernels.attention(q, k, v, implementation="triton"), q)[1](do)[0]

    for argument in (0, 1):
        try:
            interpret(jax.grad(lambda q, do: jnp.sum(dq(q, do)), argument), q, do)
        except NotImplementedError as refusal:
            assert "implementation='triton' has no second derivative" in str(refusal)
        else:
            raise AssertionError("it was not refused")


def run_checks(module: dict[str, Any], names: list[str]) -> int:
    """Run the checks of a module by name, or all; "NAME=N" calls one with a number."""
    checks = {name.removeprefix("check_"): f for name, f in list(module.items()) if name.startswith("check_")}
    for name in names or checks:
        check, _, number = name.partition("=")
        checks[check](*[int(number)] if number else [])
        print(f"{name}: right", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_checks(globals(), sys.argv[1:]))
