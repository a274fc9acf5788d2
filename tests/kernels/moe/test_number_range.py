"""The mixture of experts of numbers of any magnitude: right wherever the true result and its float32 sums fit."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import random_shapes, tolerance
from tests.helpers.error_bounds import Bounded, draw_magnitudes

IMPLEMENTATIONS = ("reference", *tolerance.runnable_implementations("moe_mlp"))
M, F, E = 3, 4, 3
IDS = {  # few rows are multiplied one by one
    "many rows": np.int32([[0, 1], [1, E], [E, E], [1, 1], [0, E], [1, 0]]),
    "few rows": np.int32([[0, 1], [E, 1]]),
}
FLOAT32_MAX = float(jnp.finfo(jnp.float32).max)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("N", [2, 20], ids=["few rows", "many rows"])
@pytest.mark.sampled(5)
def test_hidden_rows_beyond_float16(N, implementation):
    """Hidden rows of 83,000 with an output of 995, and outputs of single experts of 80,000 that weights halve."""
    inputs = {"x": np.full((N, 8), 36), "w_gate": np.ones((2, 8, 16)), "w_up": np.ones((2, 8, 16))}
    inputs["w_down"] = np.stack([np.full((16, 8), 0.00075), np.full((16, 8), 0.06)])
    inputs["expert_weights"] = np.tile([[1, 0.5]], (N, 1))
    ids, dout = np.tile(np.int32([[0, 1]]), (N, 1)), np.full((N, 8), 1 / 8)
    tolerance.assert_matches_reference("moe_mlp", implementation, inputs, dout, "float16", aux={"expert_ids": ids})


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.sampled(2)
def test_large_gate(implementation):
    """The derivative of silu is 1 where the gate is 2**26."""
    N = 20
    inputs = {"x": np.ones((N, 1)), "w_gate": np.full((1, 1, 1), 2.0**26), "w_up": np.full((1, 1, 1), 2.0**-13)}
    inputs |= {"w_down": np.ones((1, 1, 1)), "expert_weights": np.ones((N, 1))}
    run = tolerance.program("moe_mlp", implementation)
    got = run(
        *tolerance.round_inputs(inputs, np.ones((N, 1)), "float32", aux={"expert_ids": np.zeros((N, 1), np.int32)})
    )
    np.testing.assert_allclose(got["dx"], np.full((N, 1), 2.0**14), rtol=1e-6)
    np.testing.assert_allclose(got["dw_gate"], np.full((1, 1, 1), N * 2.0**-13), rtol=1e-6)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))


def silu_derivative(x: np.ndarray) -> np.ndarray:
    return sigmoid(x) * (1 + x * sigmoid(-x))


def either(a: Bounded, b: Bounded) -> Bounded:
    """Bound a value that is computed in one of two orders."""
    return dataclasses.replace(a, error=np.maximum(a.error, b.error), peak=max(a.peak, b.peak))


def bounded_results(
    exact: dict[str, Bounded], ids: np.ndarray, dy: Bounded
) -> tuple[dict[str, dict[tuple, Bounded]], dict[tuple, Bounded]]:
    """Returns (the terms of each array by its index, the gradients of the choices' weights)."""
    terms: dict[str, dict[tuple, list[Bounded]]] = {name: {} for name in ("o", "dx", "dw_gate", "dw_up", "dw_down")}
    dweights = {}

    def add(name: str, index: int, value: Bounded) -> None:
        terms[name].setdefault(index, []).append(value)

    for n, j in np.ndindex(*ids.shape):
        if (e := ids[n, j]) == E:
            continue
        x, dy_n, p = exact["x"].of(n), dy.of(n), exact["expert_weights"].of((n, j))
        w_gate, w_up, w_down = (exact[name].of(e) for name in ("w_gate", "w_up", "w_down"))
        gate, up, dh = x.einsum("m,mf->f", w_gate), x.einsum("m,mf->f", w_up), dy_n.einsum("m,fm->f", w_down)
        silu = gate.einsum("f,f->f", gate.apply(sigmoid))
        h = silu.einsum("f,f->f", up)
        output = h.einsum("f,fm->m", w_down)
        # The router's weight may join before or after a product, and its own gradient is made in two ways.
        weighted_dy, weighted_h = dy_n.einsum("m,->m", p), h.einsum("f,->f", p)
        weighted_dh = either(dh.einsum("f,->f", p), weighted_dy.einsum("m,fm->f", w_down))
        dup = weighted_dh.einsum("f,f->f", silu)
        dgate = weighted_dh.einsum("f,f->f", up).einsum("f,f->f", gate.apply(silu_derivative))
        dx = dgate.einsum("f,mf->m", w_gate) + dup.einsum("f,mf->m", w_up)
        dw_down = either(weighted_h.einsum("f,m->fm", dy_n), h.einsum("f,m->fm", weighted_dy))
        dweights[n, j] = either(output.einsum("m,m->", dy_n), dh.einsum("f,f->", h))
        add("o", n, output.einsum("m,->m", p))
        peak = max(value.peak for value in (terms["o"][n][-1], dx, dw_down, dweights[n, j]))
        dweights[n, j] = dataclasses.replace(dweights[n, j], peak=peak)
        for name, index, value in (
            ("dx", n, dx),
            ("dw_gate", e, x.einsum("m,f->mf", dgate)),
            ("dw_up", e, x.einsum("m,f->mf", dup)),
            ("dw_down", e, dw_down),
        ):
            add(name, index, dataclasses.replace(value, peak=max(peak, value.peak)))
    return {
        name: {index: functools.reduce(Bounded.__add__, values) for index, values in by_index.items()}
        for name, by_index in terms.items()
    }, dweights


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
@pytest.mark.sampled(10)
def test_numbers_of_any_magnitude(ids, implementation, dtype):
    run, N = tolerance.program("moe_mlp", implementation), len(ids)
    shapes = {"x": (N, M), "w_gate": (E, M, F), "w_up": (E, M, F), "w_down": (E, F, M), "expert_weights": ids.shape}

    @random_shapes.examples(15)
    @given(seed=st.integers(0, 2**31), span=st.sampled_from([0.0, 0.05, 0.2, 1.0]))
    def check(seed, span):
        rng = np.random.default_rng(seed)
        inputs = {name: draw_magnitudes(rng, shape, dtype, span) for name, shape in shapes.items()}
        dy = draw_magnitudes(rng, (N, M), dtype, span)
        arguments = tolerance.round_inputs(inputs, dy, dtype, aux={"expert_ids": ids})
        got = {name: np.asarray(value) for name, value in run(*arguments).items()}
        eps = 4 * max(float(jnp.finfo(dtype).eps), 2 * float(jnp.finfo(jnp.float32).eps))
        exact = {name: Bounded(x, 0 * x, eps) for name, x in inputs.items()}
        expected, dweights = bounded_results(exact, ids, Bounded(dy, 0 * dy, eps))
        for name, by_index in expected.items():
            for index, bounded in by_index.items():
                if bounded.peak < FLOAT32_MAX:
                    bounded.assert_contains(got[name][index], dtype, f"{name}[{index}]")
        for index, bounded in dweights.items():
            if bounded.peak < FLOAT32_MAX:
                bounded.assert_contains(got["dexpert_weights"][index], dtype, f"dexpert_weights{list(index)}")

    check()
