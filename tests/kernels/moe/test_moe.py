"""The mixture of experts: the reference against Python loops, every implementation against the reference."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.verification.fast_compile import jit_fast_compile
from dantinox import kernels
from dantinox.kernels import workloads
from dantinox.kernels.workloads import types as workload_types
from tests.helpers import cases, random_shapes, tolerance

IMPLEMENTATIONS = tolerance.runnable_implementations("moe_mlp")


def row(N: int, M: int, F: int, E: int, k: int, skew: str = "uniform") -> workloads.MoE:
    return cases.make_workload(workloads.MoE, N=N, M=M, F=F, E=E, k=k, skew=skew)


def loops(x, w_gate, w_up, w_down, expert_weights, expert_ids):
    """One token, one expert and one hidden feature at a time."""
    y = np.zeros_like(x)
    for n, j in np.ndindex(*expert_ids.shape):
        e = expert_ids[n, j]
        for f in range(w_gate.shape[2]):
            gate = float(x[n] @ w_gate[e, :, f])
            hidden = gate / (1 + math.exp(-gate)) * float(x[n] @ w_up[e, :, f])
            y[n] += expert_weights[n, j] * hidden * w_down[e, f]
    return y


def assert_gradients_match_loops(inputs, aux, dout, gradients, max_error):
    """Compares each gradient with the loops, along one random direction per argument."""
    for name, x in inputs.items():
        direction = np.random.default_rng(1).standard_normal(x.shape)
        toward = {other: direction if other == name else np.zeros_like(y) for other, y in inputs.items()}
        by_hand = tolerance.directional_derivative(lambda **a: loops(**a, **aux), inputs, toward, dout)
        along = np.sum(tolerance.to_float64(gradients[f"d{name}"]) * direction)
        assert along == pytest.approx(by_hand, rel=max_error, abs=max_error), name


@pytest.mark.parametrize("k", [1, 2, 3], ids="k={}".format)
@pytest.mark.sampled(4)
def test_reference_matches_python_loops(k):
    inputs, aux, dout = cases.draw(row(5, 4, 3, 3, k))
    with jax.enable_x64(True):
        got = tolerance.program("moe_mlp", "reference")(inputs, aux, dout)
    np.testing.assert_allclose(got["o"], loops(**inputs, **aux), rtol=1e-12, atol=1e-13)
    assert_gradients_match_loops(inputs, aux, dout, got, 1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("case", "dtype"), cases.workload_parameters("moe_mlp"))
@pytest.mark.sampled(24)
def test_implementation_matches_reference(case, dtype, implementation):
    inputs, aux, dout = cases.draw(case)
    # Matrices of the size that keeps features near 1, as in a network; otherwise bfloat16 compares noise with noise.
    for name, width in (("w_gate", case.M), ("w_up", case.M), ("w_down", case.F)):
        inputs[name] /= math.sqrt(width)
    # The router's weights stay in float32 beside bfloat16 experts: so the model calls it.
    got = tolerance.assert_matches_reference(
        "moe_mlp", implementation, inputs, dout, dtype, aux=aux, keep_float32=("expert_weights",)
    )
    idle = [e for e in range(case.E) if e not in aux["expert_ids"]]
    for name in ("dw_gate", "dw_up", "dw_down"):
        assert not np.any(tolerance.to_float64(got[name])[idle]), f"{name} of an expert without tokens"


@random_shapes.examples(12)
@given(
    implementation=st.sampled_from(IMPLEMENTATIONS),
    shape=random_shapes.shapes(10),
    skew=st.sampled_from(workload_types.SKEWS),
    seed=st.integers(0, 99),
)
def test_random_routings_match_python_loops(implementation, shape, skew, seed):
    N = int(shape.choice([shape.integers(1, 21), shape.choice([31, 33, 64, 65, 70])]))
    E = int(shape.integers(1, 8))
    k = int(shape.integers(1, min(E, 4) + 1))
    inputs, aux, dout = cases.draw(row(N, *shape.integers(1, 5, 2).tolist(), E, k, skew), seed)
    narrow = {name: np.float32(x) for name, x in inputs.items()}
    expected = loops(**inputs, **aux)
    for form, run in tolerance.kernel_variants(implementation, tolerance.program("moe_mlp", implementation)).items():
        got = run(narrow, aux, np.float32(dout))
        np.testing.assert_allclose(got["o"], expected, rtol=1e-4, atol=1e-4, err_msg=form)
        assert_gradients_match_loops(inputs, aux, dout, got, 1e-2)
    random_shapes.clear_programs()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_idle_expert_weights_do_not_affect_results(implementation):
    inputs, _, dout = cases.draw(row(65, 16, 24, 4, 1))
    ids = workload_types.route(65, 2, 1, "uniform")  # experts 2 and 3 are idle
    idle, results = np.arange(4)[:, None, None] >= 2, []
    for fill in (0, np.nan, np.inf):
        filled = {n: np.float32(np.where(idle, fill, x) if n.startswith("w_") else x) for n, x in inputs.items()}
        results.append(tolerance.program("moe_mlp", implementation)(filled, {"expert_ids": ids}, np.float32(dout)))
    for poisoned in results[1:]:
        tolerance.assert_bit_equal(results[0], poisoned)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_tokens_do_not_affect_each_other(implementation):
    """Dropless: what one token gets does not depend on how many others chose its expert, NaN ones included."""
    inputs, aux, dout = cases.draw(row(65, 16, 24, 4, 1))
    narrow = {name: np.float32(x) for name, x in inputs.items()}
    run, ids = tolerance.program("moe_mlp", implementation), aux["expert_ids"]
    alone = run(narrow, aux, np.float32(dout))
    # New arrays: JAX may still be reading the old ones.
    first = np.arange(65)[:, None] == 0
    others = narrow | {"x": np.where(first, narrow["x"], np.float32(np.nan))}
    crowd = run(others, {"expert_ids": np.where(first, ids, ids[0])}, np.float32(dout))
    np.testing.assert_allclose(crowd["o"][0], alone["o"][0], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.sampled(2)
def test_two_runs_are_bit_equal(implementation):
    inputs, aux, dout = cases.draw(row(300, 16, 24, 4, 2))
    arguments = {name: np.float32(x) for name, x in inputs.items()}, aux, np.float32(dout)
    run = tolerance.program("moe_mlp", implementation)
    tolerance.assert_bit_equal(run(*arguments), run(*arguments))


def second_derivatives(inputs: dict, aux: dict, dout: jax.Array, implementation: str) -> dict:
    """The gradients of a function of the first derivatives, which depends on all of them."""

    def of_first_derivatives(inputs: dict, dout: jax.Array) -> jax.Array:
        y, pull = jax.vjp(lambda inputs: kernels.moe_mlp(**inputs, **aux, implementation=implementation), inputs)
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves((y, pull(dout))))

    dinputs, ddout = jax.grad(of_first_derivatives, argnums=(0, 1))(inputs, dout)
    return {f"d{name}": x for name, x in dinputs.items()} | {"ddout": ddout}


@pytest.mark.parametrize("N", [pytest.param(3, id="few rows"), pytest.param(33, id="many rows")])
@pytest.mark.slow
def test_second_derivative_of_xla_matches_reference(N):
    inputs, aux, dout = cases.draw(row(N, 5, 4, 3, 2))
    aux = {"expert_ids": jnp.asarray(aux["expert_ids"]).at[0, 1].set(3)}  # one id without an expert
    arguments = {name: jnp.float32(x) for name, x in inputs.items()}, aux, jnp.float32(dout)
    expected, got = (
        jit_fast_compile(functools.partial(second_derivatives, implementation=implementation))(*arguments)
        for implementation in ("reference", "xla")
    )
    for name, value in got.items():
        scale = float(jnp.abs(expected[name]).max())
        np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-5 * scale, err_msg=name)


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
def test_zero_tokens_give_empty_output(implementation):
    inputs, aux, dout = cases.draw(row(0, 4, 3, 2, 1))
    narrow = {name: np.float32(x) for name, x in inputs.items()}
    got = tolerance.program("moe_mlp", implementation)(narrow, aux, np.float32(dout))
    assert got["o"].shape == (0, 4) and not np.any(got["dw_gate"])
