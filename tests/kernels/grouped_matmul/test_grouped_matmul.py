"""Grouped matmul: the reference against Python loops, every implementation against the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.verification.fast_compile import jit_fast_compile
from dantinox import kernels
from dantinox.kernels import workloads
from tests.helpers import cases, random_shapes, tolerance

IMPLEMENTATIONS = tolerance.runnable_implementations("grouped_matmul")


def row(*sizes: int, N: int, M: int = 24, F: int = 40) -> workloads.GroupedMatmul:
    return cases.make_workload(workloads.GroupedMatmul, N=N, M=M, F=F, E=len(sizes), sizes=sizes)


def loops(x: np.ndarray, w: np.ndarray, sizes: list[int]) -> np.ndarray:
    """One row and one column at a time."""
    y, row = np.zeros((x.shape[0], w.shape[2])), 0
    for e, size in enumerate(sizes):
        for n in range(row, row + size):
            for f in range(w.shape[2]):
                y[n, f] = sum(x[n, m] * w[e, m, f] for m in range(w.shape[1]))
        row += size
    return y


def loops_gradients(x: np.ndarray, w: np.ndarray, sizes: list[int], dy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(dx, dw): each row gives to its own group's matrix only, rows past the sum give nothing."""
    dx, dw, row = np.zeros_like(x), np.zeros_like(w), 0
    for e, size in enumerate(sizes):
        for n in range(row, row + size):
            dx[n] = w[e] @ dy[n]
            dw[e] += np.outer(x[n], dy[n])
        row += size
    return dx, dw


@pytest.mark.parametrize("sizes", [[2, 3, 1], [0, 6, 0], [0, 0, 0], [1, 0, 2], [6, 0, 0]], ids=str)
def test_reference_matches_python_loops(sizes):
    inputs, aux, dout = cases.draw(row(*sizes, N=6, M=3, F=2))
    with jax.enable_x64(True):
        run = tolerance.program("grouped_matmul", "reference")
        got = run(inputs, aux, dout)
    dx, dw = loops_gradients(**inputs, sizes=sizes, dy=dout)
    for name, expected in {"o": loops(**inputs, sizes=sizes), "dx": dx, "dw": dw}.items():
        np.testing.assert_allclose(got[name], expected, rtol=1e-12, atol=1e-13, err_msg=name)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("case", "dtype"), cases.workload_parameters("grouped_matmul"))
@pytest.mark.sampled(12)
def test_implementation_matches_reference(case, dtype, implementation):
    inputs, aux, dout = cases.draw(case)
    sizes = aux["group_sizes"]
    got = tolerance.assert_matches_reference("grouped_matmul", implementation, inputs, dout, dtype, aux=aux)
    for name in ("o", "dx"):
        assert not np.any(tolerance.to_float64(got[name])[sum(sizes) :]), f"{name}: rows past the sum of the sizes"
    assert not np.any(tolerance.to_float64(got["dw"])[sizes == 0]), "dw of an empty group"


EDGES = [63, 64, 65, 127, 128, 129, 191, 255, 256, 257, 330]


@random_shapes.examples(32)
@given(
    implementation=st.sampled_from(IMPLEMENTATIONS),
    shape=random_shapes.shapes(12),
    cuts=st.lists(st.floats(0, 1), min_size=7, max_size=7),
    full=st.booleans(),
    seed=st.integers(0, 99),
)
def test_random_group_sizes_match_python_loops(implementation, shape, cuts, full, seed):
    N = int(shape.choice([shape.integers(1, 41), shape.choice(EDGES)]))
    widths, cuts = shape.integers(1, 6, 2), cuts[: shape.integers(1, 8)]
    ends = np.sort(np.round(np.array(cuts) * N)).astype(int)
    if full:
        ends[-1] = N
    sizes = np.diff(ends, prepend=0).tolist()
    inputs, aux, dout = cases.draw(row(*sizes, N=N, M=int(widths[0]), F=int(widths[1])), seed)
    narrow = {name: np.float32(x) for name, x in inputs.items()}
    dx, dw = loops_gradients(**inputs, sizes=sizes, dy=dout)
    expected = {"o": loops(**inputs, sizes=sizes), "dx": dx, "dw": dw}
    for form, run in tolerance.kernel_variants(
        implementation, tolerance.program("grouped_matmul", implementation)
    ).items():
        got = run(narrow, aux, np.float32(dout))
        for name, value in expected.items():
            np.testing.assert_allclose(got[name], value, rtol=1e-4, atol=1e-4, err_msg=f"{form}: {name}")
    random_shapes.clear_programs()


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
@pytest.mark.parametrize("sizes", [[63, 64, 65, 1], [0, 0, 0, 0], [257, 0, 1, 129], [580, 0, 0, 0]], ids=str)
@pytest.mark.sampled(4)
def test_unassigned_rows_do_not_affect_results(sizes, implementation):
    inputs, aux, dout = cases.draw(row(*sizes, N=580))
    unassigned = (np.arange(580) >= sum(sizes))[:, None]
    # An empty group's weights multiply nothing either, and the cotangent of unassigned rows must be ignored.
    empty = (np.int32(sizes) == 0)[:, None, None]
    run, results = tolerance.program("grouped_matmul", implementation), []
    for fill in (0, np.nan, np.inf):
        filled = {
            "x": np.float32(np.where(unassigned, fill, inputs["x"])),
            "w": np.float32(np.where(empty, fill, inputs["w"])),
        }
        dy = np.float32(np.where(unassigned, fill, dout))
        results.append(run(filled, aux, dy))
    for poisoned in results[1:]:
        tolerance.assert_bit_equal(results[0], poisoned)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_two_runs_are_bit_equal(implementation):
    inputs, aux, dout = cases.draw(row(63, 257, 0, 129, N=580))
    run = tolerance.program("grouped_matmul", implementation)
    arguments = {name: np.float32(x) for name, x in inputs.items()}, aux, np.float32(dout)
    tolerance.assert_bit_equal(run(*arguments), run(*arguments))


def second_derivatives(inputs: dict, aux: dict, dout: np.ndarray, implementation: str) -> dict:
    """The gradients of a function of the first derivatives, which depends on all of them."""

    def of_first_derivatives(inputs: dict, dout: jax.Array) -> jax.Array:
        run = functools.partial(kernels.grouped_matmul, implementation=implementation, **aux)
        y, pull = jax.vjp(lambda inputs: run(**inputs), inputs)
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves((y, pull(dout))))

    dinputs, ddout = jax.grad(of_first_derivatives, argnums=(0, 1))(inputs, dout)
    return {f"d{name}": x for name, x in dinputs.items()} | {"ddout": ddout}


def test_second_derivative_of_xla_matches_reference():
    inputs, aux, dout = cases.draw(row(9, 0, 13, 8, N=33, M=5, F=4))
    aux = {"group_sizes": jnp.asarray(aux["group_sizes"])}
    arguments = {name: jnp.float32(x) for name, x in inputs.items()}, aux, jnp.float32(dout)
    expected, got = (
        jit_fast_compile(functools.partial(second_derivatives, implementation=implementation))(*arguments)
        for implementation in ("reference", "xla")
    )
    for name, value in got.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
@pytest.mark.parametrize(
    "case",
    [row(0, 0, N=0, M=3, F=2), row(N=4, M=3, F=2), row(4, N=4, M=0, F=2)],
    ids=["no rows", "no groups", "no width"],
)
def test_empty_inputs_give_zeros(case, implementation):
    inputs, aux, dout = cases.draw(case)
    narrow = {name: np.float32(x) for name, x in inputs.items()}
    got = tolerance.program("grouped_matmul", implementation)(narrow, aux, np.float32(dout))
    np.testing.assert_array_equal(got["o"], np.zeros(case.out_shape()))
