"""Checks of the Triton mixture of experts in Triton's interpreter: needs Triton, no GPU.

`python -m tests.helpers.triton_moe NAME...` runs the named checks, or all, and prints one line for each; it fails at
the first that does not hold. `random_shapes=N` draws N problems. The cases of single features and of pairs are those of
`bench.judge`.
"""

import contextlib
import functools
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

from tests.helpers.triton_attention import (  # isort: skip (sets the environment)
    dot_of_tensor_cores,
    error,
    interpret,
    run_checks,
)
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from bench.judge import triton_interpreter
from bench.verification.error_bound import bound_violations
from bench.verification.fast_compile import jit_fast_compile
from dantinox import kernels
from dantinox.kernels import workloads
from dantinox.kernels.workloads.types import SKEWS, route
from tests.helpers.triton_grouped_matmul import pad, small_blocks

Array = jax.Array
Inputs = dict[str, Array]
CLAMPED = ("swiglu_clamped", 0.9, 1.702)  # a limit that many gates and ups exceed
BIASES = ("b_gate", "b_up", "b_down")


def draw(
    ids: np.ndarray, M: int, F: int, E: int, *, biases: tuple[str, ...] = (), dtype: Any = "float32", seed: int = 0
) -> tuple[Inputs, Array, Array]:
    """Return the differentiable inputs, the ids and the cotangent of the output."""
    N, k = ids.shape
    rng = np.random.default_rng([seed, N, M, F])
    shapes = {"x": (N, M), "w_gate": (E, M, F), "w_up": (E, M, F), "w_down": (E, F, M), "expert_weights": (N, k)}
    shapes |= {name: shape for name, shape in zip(BIASES, ((E, F), (E, F), (E, M)), strict=True) if name in biases}
    # Matrices of the size that keeps features near 1, as in a network.
    scales = {"w_gate": M**-0.5, "w_up": M**-0.5, "w_down": F**-0.5}
    inputs = {name: rng.standard_normal(shape) * scales.get(name, 1) for name, shape in shapes.items()}
    kept = {"expert_weights": "float32"}  # as the model calls it
    rounded = {name: jnp.asarray(x, kept.get(name, dtype)) for name, x in inputs.items()}
    return rounded, jnp.asarray(ids, jnp.int32), jnp.asarray(rng.standard_normal((N, M)), dtype)


def with_gradients(implementation: str, **options: Any) -> Callable[..., dict[str, Array]]:
    """Return a function of the arrays of `draw` that returns the output "o" and the gradients by name."""

    def run(inputs: Inputs, ids: Array, dy: Array) -> dict[str, Array]:
        def call(inputs: Inputs) -> Array:
            return kernels.moe_mlp(**inputs, expert_ids=ids, implementation=implementation, **options)

        y, vjp = jax.vjp(call, inputs)
        return {"o": y} | {f"d{name}": gradient for name, gradient in vjp(dy)[0].items()}

    return run


def widen(tree: Any) -> Any:
    """Return arrays of floats in float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def expected(arrays: tuple[Inputs, Array, Array], **options: Any) -> dict[str, Array]:
    """Return the reference's results, computed in float32."""
    inputs, ids, dy = arrays
    return jax.jit(with_gradients("reference", **options))(widen(inputs), ids, widen(dy))


def assert_right(arrays: tuple[Inputs, Array, Array], limit: float = 5e-6, **options: Any) -> dict[str, Array]:
    """Compare with the reference; return the results."""
    actual = interpret(with_gradients("triton", **options), *arrays)
    for name, right in expected(arrays, **options).items():
        wrong = error(actual[name], right)
        assert wrong < limit, ({n: x.shape for n, x in arrays[0].items()}, options, name, wrong)
    return actual


@functools.cache
def reference(activation: Any) -> Callable[..., dict[str, Array]]:
    """Return the jitted function of the reference."""
    return jit_fast_compile(with_gradients("reference", activation=activation))


AXES = {
    "x": "NM",
    "w_gate": "EMF",
    "w_up": "EMF",
    "w_down": "EFM",
    "expert_weights": "Nk",
    "b_gate": "EF",
    "b_up": "EF",
    "b_down": "EM",
}


def assert_within_bound(
    arrays: tuple[Inputs, Array, Array], what: Any, activation: Any = "swiglu", largest: dict[str, int] | None = None
) -> None:
    """Compare with the reference in float64 by the error rule, and experts without tokens with zero.

    Args:
        arrays: those of `draw`.
        what: names the problem.
        activation: the activation.
        largest: the largest sizes of the caller's problems by axis: zeros fill the reference's arrays up to them, so
            that it compiles once.
    """
    inputs, ids, dy = arrays
    actual = interpret(with_gradients("triton", activation=activation), *arrays)
    padded, given = inputs, (np.asarray(ids), np.asarray(dy))
    if largest is not None:
        padded = {name: pad(x, *(largest[axis] for axis in AXES[name])) for name, x in inputs.items()}
        no_expert = pad(ids + 1, largest["N"], largest["k"]) - 1
        given = no_expert, pad(dy, largest["N"], largest["M"])
    run = reference(activation)
    plain = run(padded, *given)
    with jax.enable_x64(True):
        wide = {name: np.asarray(x).astype(np.float64) for name, x in padded.items()}
        oracle = run(wide, given[0], given[1].astype(np.float64))
    plain, oracle = ({n: r[n][tuple(map(slice, x.shape))] for n, x in actual.items()} for r in (plain, oracle))
    assert {name: x.dtype for name, x in actual.items()} == {name: x.dtype for name, x in plain.items()}
    assert not (wrong := bound_violations(actual, plain, oracle, inputs["x"].dtype)), (what, wrong)
    idle = [e for e in range(inputs["w_up"].shape[0]) if not np.any(ids == e)]
    for name in ("dw_gate", "dw_up", "dw_down"):
        assert not np.any(np.float32(actual[name][np.array(idle, int)])), (what, name)


def some_ids(N: int, E: int, k: int, idle: int) -> np.ndarray:
    """Return ids [N, k] of which some name no expert, and none the idle one."""
    ids = np.random.default_rng(0).integers(0, E, (N, k))
    return np.where(ids == idle, E + 2, ids)


def check_features() -> None:
    """Biases, the clamped activation, choices of no expert and NaN in an idle one, with several tiles of every kind."""
    inputs, ids, dy = arrays = draw(some_ids(30, 3, 2, idle=2), 17, 33, 3, biases=BIASES)
    poisoned = {name: x.at[2].set(jnp.nan) if name[0] in "wb" else x for name, x in inputs.items()}
    with small_blocks():
        actual = interpret(with_gradients("triton", activation=CLAMPED), poisoned, ids, dy)
    for name, right in expected(arrays, activation=CLAMPED).items():
        assert error(actual[name], right) < 5e-6, (name, error(actual[name], right))


def check_hidden_values() -> None:
    """What an expert without tokens holds changes no bit; NaN of a token reaches its own output and its experts."""
    inputs, ids, dy = arrays = draw(some_ids(25, 4, 2, idle=1), 20, 17, 4, biases=BIASES)
    f = with_gradients("triton")
    with small_blocks():
        kept = assert_right(arrays)
        poisoned = {name: x.at[1].set(jnp.nan) if name[0] in "wb" else x for name, x in inputs.items()}
        again = interpret(f, poisoned, ids, dy)
        assert all(np.array_equal(again[name], kept[name]) for name in kept), "an idle expert has an effect"
        ids = ids.at[3].set(jnp.int32([0, 9]))
        kept = interpret(f, inputs, ids, dy)
        found = interpret(f, inputs | {"x": inputs["x"].at[3].set(jnp.nan)}, ids, dy)
    for name in ("o", "dx", "dexpert_weights"):
        assert np.array_equal(np.delete(found[name], 3, 0), np.delete(kept[name], 3, 0)), name
        assert np.isnan(found[name][3]).any(), name
    for name in ("dw_gate", "dw_up", "dw_down", "db_gate", "db_up"):
        assert np.array_equal(found[name][1:], kept[name][1:]), name


def check_forward() -> None:
    """Without gradients no residuals are written."""

    def forward(implementation: str, options: dict[str, Any]) -> Callable[[Inputs, Array], Array]:
        return lambda inputs, ids: kernels.moe_mlp(**inputs, expert_ids=ids, implementation=implementation, **options)

    with small_blocks():
        for biases, options in (((), {}), (("b_up",), {"activation": CLAMPED})):
            inputs, ids, _ = draw(some_ids(21, 3, 2, idle=1), 20, 33, 3, biases=biases)
            right = forward("reference", options)(inputs, ids)
            assert error(interpret(forward("triton", options), inputs, ids), right) < 5e-6


def check_sizes() -> None:
    """One token, widths of one and of one more than a tile, all choices of no expert, and the tiles of a GPU."""
    for N, M, F, E, k in ((1, 8, 16, 4, 3), (17, 1, 1, 1, 1), (33, 16, 17, 5, 1), (5, 7, 130, 2, 2)):
        for biases in ((), ("b_gate",)):
            with small_blocks():
                assert_right(draw(route(N, E, k, "uniform"), M, F, E, biases=biases))
    assert_right(draw(route(140, 3, 2, "zipf"), 65, 70, 3, biases=BIASES))
    inputs, ids, dy = draw(np.full((9, 2), 7), 8, 8, 3)
    found = interpret(with_gradients("triton"), inputs, ids, dy)
    assert not any(np.any(x) for x in found.values())


def check_workloads() -> None:
    """The parity workloads and every skew, with gradients, within the error rule."""
    for row in workloads.select("moe_mlp", "parity"):
        biases = BIASES if row.biases else ()
        ids = row.integer_inputs(0)["expert_ids"]
        for dtype in (*row.dtypes, "float16"):
            arrays = draw(ids, row.M, row.F, row.E, biases=biases, dtype=dtype)
            assert_within_bound(arrays, (row.name, dtype), row.activation)
    for skew in SKEWS:
        for dtype in ("float32", "bfloat16", "float16"):
            with small_blocks():
                assert_within_bound(draw(route(70, 5, 2, skew), 24, 20, 5, dtype=dtype), (skew, dtype))


def check_random_shapes(examples: int = 10) -> None:
    """Random sizes, routings, features and dtypes within the error rule."""
    for seed in range(examples):
        rng = np.random.default_rng(seed)
        E, M, F = (int(rng.integers(1, limit)) for limit in (6, 36, 36))
        N, k = int(rng.choice([rng.integers(1, 18), rng.integers(1, 51)])), int(rng.integers(1, min(E, 3) + 1))
        ids = route(N, E, k, str(rng.choice(SKEWS)), seed)
        ids = np.where(rng.random((N, k)) < rng.choice([0, 0.3]), E, ids)
        biases = BIASES if rng.random() < 0.3 else ()
        dtype = str(rng.choice(["float32", "bfloat16", "float16"]))
        activation = CLAMPED if rng.random() < 0.4 else "swiglu"
        arrays = draw(ids, M, F, E, biases=biases, dtype=dtype, seed=seed)
        what = seed, N, M, F, E, k, biases, dtype, activation
        with small_blocks() if rng.random() < 0.7 else contextlib.nullcontext():
            assert_within_bound(arrays, what, activation, {"N": 50, "E": 5, "M": 35, "F": 35, "k": 3})


def check_number_range() -> None:
    """Hidden rows beyond float16, and a gate of 2**26, whose silu has the derivative 1."""
    N = 20
    inputs = {"x": np.full((N, 8), 36), "w_gate": np.ones((2, 8, 16)), "w_up": np.ones((2, 8, 16))}
    inputs["w_down"] = np.stack([np.full((16, 8), 0.00075), np.full((16, 8), 0.06)])
    half = {name: jnp.asarray(x, "float16") for name, x in inputs.items()}
    half["expert_weights"] = jnp.tile(jnp.float32([[1, 0.5]]), (N, 1))
    ids, dy = jnp.tile(jnp.int32([[0, 1]]), (N, 1)), jnp.full((N, 8), 1 / 8, "float16")
    assert_within_bound((half, ids, dy), "float16")
    inputs = {"x": jnp.ones((N, 1)), "w_gate": jnp.full((1, 1, 1), 2.0**26), "w_up": jnp.full((1, 1, 1), 2.0**-13)}
    inputs |= {"w_down": jnp.ones((1, 1, 1)), "expert_weights": jnp.ones((N, 1))}
    got = interpret(with_gradients("triton"), inputs, jnp.zeros((N, 1), jnp.int32), jnp.ones((N, 1)))
    np.testing.assert_allclose(got["dx"], np.full((N, 1), 2.0**14), rtol=1e-6)
    np.testing.assert_allclose(got["dw_gate"], np.full((1, 1, 1), N * 2.0**-13), rtol=1e-6)


def check_tf32() -> None:
    """By default float32 is rounded to TF32: as exact as rounding, not as cutting off, and exact where asked for."""
    arrays = draw(route(64, 3, 2, "uniform"), 64, 48, 3)
    right, f = expected(arrays), with_gradients("triton")
    with mock.patch.object(triton_interpreter, "_dot", dot_of_tensor_cores):
        rounded = interpret(f, *arrays, precision="default")
    exact = interpret(f, *arrays, precision="high")

    def relative_rms(actual: dict[str, Array]) -> dict[str, float]:
        return {n: float(np.sqrt(np.mean(np.square(actual[n] - x)) / np.mean(np.square(x)))) for n, x in right.items()}

    rms, exact_rms = relative_rms(rounded), relative_rms(exact)
    for name in right:
        assert 1e-4 < rms[name] < 7e-4 and exact_rms[name] < 1e-6, (name, rms, exact_rms)


def check_vmap() -> None:
    """A batch over tokens, over matrices and biases, and over ids, and of gradients."""
    inputs, ids, dy = draw(route(7, 3, 2, "uniform"), 12, 18, 3, biases=("b_up",))
    many = jax.tree.map(lambda x: jnp.stack([x, -x, x / 2]), inputs)
    all_ids = jnp.stack([ids, (ids + 1) % 3, jnp.full_like(ids, 3)])
    f, reference = with_gradients("triton"), with_gradients("reference")
    with small_blocks():
        for batched, ids_axis in ((("x",), None), (("w_up", "b_up"), None), ((), 0)):
            axes = dict.fromkeys(inputs) | dict.fromkeys(batched, 0)
            chosen = {name: many[name] if axis == 0 else inputs[name] for name, axis in axes.items()}
            arrays = chosen, ids if ids_axis is None else all_ids, dy
            found = interpret(jax.vmap(f, in_axes=(axes, ids_axis, None)), *arrays)
            right = jax.jit(jax.vmap(reference, in_axes=(axes, ids_axis, None)))(*arrays)
            assert error(found, right) < 5e-6, (batched, ids_axis)


def check_shard_map() -> None:
    """Two devices, each with half of the tokens, under `shard_map` with its default check; all experts on both."""
    inputs, *_ = arrays = draw(route(20, 3, 2, "zipf"), 12, 18, 3, biases=BIASES)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, everywhere = PartitionSpec("data"), PartitionSpec()
    specs = {name: rows if name in ("x", "expert_weights") else everywhere for name in inputs}
    out_specs = {"o": rows} | {f"d{name}": spec for name, spec in specs.items()}
    f = jax.shard_map(with_gradients("triton"), mesh=mesh, in_specs=(specs, rows, rows), out_specs=out_specs)
    with small_blocks():
        assert error(interpret(f, *arrays), expected(arrays)) < 5e-6


def check_remat_and_scan() -> None:
    """Rematerialization, a scan and x64, with ranks that do not promote."""
    inputs, ids, _ = draw(route(15, 3, 2, "uniform"), 12, 18, 3)

    def loss(implementation: str, w_up: Array) -> Array:
        @jax.checkpoint
        def layer(x: Array, scale: Array) -> tuple[Array, None]:
            given = inputs | {"x": x * scale, "w_up": w_up}
            return kernels.moe_mlp(**given, expert_ids=ids, implementation=implementation), None

        return jnp.sum(jax.lax.scan(layer, inputs["x"], jnp.float32([0.5, 2]))[0] ** 2)

    right = jax.grad(lambda w: loss("reference", w))(inputs["w_up"])
    with small_blocks():
        assert error(interpret(jax.grad(lambda w: loss("triton", w)), inputs["w_up"]), right) < 5e-6
        with jax.enable_x64(True), jax.numpy_rank_promotion("raise"):
            assert error(interpret(jax.grad(lambda w: loss("triton", w)), inputs["w_up"]), right) < 5e-6


def check_determinism() -> None:
    """Two runs are bit-equal."""
    arrays = draw(route(100, 4, 2, "zipf"), 24, 40, 4, dtype="bfloat16")
    with small_blocks():
        first, second = (interpret(with_gradients("triton"), *arrays) for _ in range(2))
    assert all(np.array_equal(first[name], second[name]) for name in first)


def check_second_derivative() -> None:
    """It is refused by one sentence."""
    inputs, ids, dy = draw(route(8, 2, 1, "uniform"), 8, 8, 2)

    def dx(x: Array, dy: Array) -> Array:
        f = lambda x: kernels.moe_mlp(**inputs | {"x": x}, expert_ids=ids, implementation="triton")
        return jax.vjp(f, x)[1](dy)[0]

    for argument in (0, 1):
        try:
            interpret(jax.grad(lambda x, dy: jnp.sum(dx(x, dy)), argument), inputs["x"], dy)
        except NotImplementedError as refusal:
            assert "'triton' has no second derivative" in str(refusal)
        else:
            raise AssertionError("a second derivative came out")


if __name__ == "__main__":
    sys.exit(run_checks(globals(), sys.argv[1:]))
