"""The mixture of experts: the reference against python loops, every implementation against the reference."""

import math

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.parity import rule

IMPLEMENTATIONS = rule.runnable("moe_mlp")


def draw(N: int, M: int, F: int, E: int, k: int, seed: int = 0) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """(the differentiable arguments in float64, cotangent [N, M])."""
    rng = np.random.default_rng(seed)
    shapes = {
        "x": (N, M),
        "w_gate": (E, M, F),
        "w_up": (E, M, F),
        "w_down": (E, F, M),
        "expert_weights": (N, k),
    }
    return {name: rng.standard_normal(shape) for name, shape in shapes.items()}, rng.standard_normal((N, M))


def route(N: int, E: int, k: int, how: str = "random", seed: int = 0) -> np.ndarray:
    """Expert ids [N, k], no token twice at one expert: "random", "skewed" (expert E-1 takes nearly all) or "one"."""
    rng = np.random.default_rng(seed)
    chances = np.ones(E)
    if how != "random":
        chances[-1] = 1e12 if how == "one" else 30 * E
    ids = [rng.choice(E, k, replace=False, p=chances / chances.sum()) for _ in range(N)]
    return np.array(ids, np.int32).reshape(N, k)


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


def slopes(inputs, ids, dout, gradients, tolerance):
    """Each gradient against the loops, along one random direction an argument."""
    for name, x in inputs.items():
        direction = np.random.default_rng(1).standard_normal(x.shape)
        toward = {other: direction if other == name else np.zeros_like(y) for other, y in inputs.items()}
        by_hand = rule.slope(lambda **a: loops(**a, expert_ids=ids), inputs, toward, dout)
        along = np.sum(rule.exact(gradients[f"d{name}"]) * direction)
        assert along == pytest.approx(by_hand, rel=tolerance, abs=tolerance), name


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_reference_is_the_formula(k):
    inputs, dout = draw(5, 4, 3, 3, k)
    ids = route(5, 3, k)
    with jax.enable_x64(True):
        got = rule.program("moe_mlp", "reference")(inputs, {"expert_ids": ids}, dout)
    np.testing.assert_allclose(got["o"], loops(**inputs, expert_ids=ids), rtol=1e-12, atol=1e-13)
    slopes(inputs, ids, dout, got, 1e-6)


CASES = {  # N, M, F, E, k, how
    "top 1": (65, 16, 24, 4, 1, "random"),
    "top 2": (300, 16, 24, 4, 2, "random"),
    "top 2, skewed": (300, 16, 24, 4, 2, "skewed"),
    "top 2, one expert takes one slot of all": (300, 16, 24, 4, 2, "one"),
    "all experts": (64, 8, 24, 3, 3, "random"),
    "one expert": (257, 8, 24, 1, 1, "random"),
    "one token": (1, 8, 16, 4, 3, "random"),
    "top 2, few rows of wide matrices": (4, 200, 300, 4, 2, "random"),  # as in decoding
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, "float32") for name in CASES] + [(name, "bfloat16") for name in CASES if name.startswith("top")],
)
def test_every_implementation_keeps_the_rule(name, dtype, implementation):
    *sizes, how = CASES[name]
    N, M, F, E, k = sizes
    inputs, dout = draw(*sizes)
    # Matrices of the size that keeps features near 1, as in a network; otherwise bfloat16 compares noise with noise.
    for name, width in (("w_gate", M), ("w_up", M), ("w_down", F)):
        inputs[name] /= math.sqrt(width)
    ids = route(N, E, k, how)
    # The router's weights stay in float32 beside bfloat16 experts: so the model calls it.
    got = rule.judge("moe_mlp", implementation, inputs, dout, dtype, aux={"expert_ids": ids}, keep=("expert_weights",))
    idle = [e for e in range(E) if e not in ids]
    for name in ("dw_gate", "dw_up", "dw_down"):
        assert not np.any(rule.exact(got[name])[idle]), f"{name} of an expert without tokens"


@given(
    shape=st.sampled_from([(1, 3, 2, 1, 1), (9, 4, 3, 4, 4), (70, 2, 3, 2, 1), (33, 1, 1, 7, 3)]),
    how=st.sampled_from(["random", "skewed", "one"]),
    seed=st.integers(0, 99),
)
def test_any_routing_is_the_formula(shape, how, seed):
    N, _, _, E, k = shape
    inputs, dout = draw(*shape, seed)
    ids = route(N, E, k, how, seed)
    narrow = {name: np.float32(x) for name, x in inputs.items()}
    for implementation in IMPLEMENTATIONS:
        got = rule.program("moe_mlp", implementation)(narrow, {"expert_ids": ids}, np.float32(dout))
        np.testing.assert_allclose(got["o"], loops(**inputs, expert_ids=ids), rtol=1e-4, atol=1e-4)
        slopes(inputs, ids, dout, got, 1e-2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_an_idle_expert_holds_reaches_nobody(implementation):
    inputs, dout = draw(65, 16, 24, 4, 1)
    ids = route(65, 2, 1)  # experts 2 and 3 are idle
    idle, results = np.arange(4)[:, None, None] >= 2, []
    for fill in (0, np.nan, np.inf):
        filled = {n: np.float32(np.where(idle, fill, x) if n.startswith("w_") else x) for n, x in inputs.items()}
        results.append(rule.program("moe_mlp", implementation)(filled, {"expert_ids": ids}, np.float32(dout)))
    for poisoned in results[1:]:
        rule.same_bits(results[0], poisoned)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_token_meets_no_other_token(implementation):
    """Dropless: what one token gets does not depend on how many others chose its expert, NaN ones included."""
    inputs, dout = draw(65, 16, 24, 4, 1)
    narrow = {name: np.float32(x) for name, x in inputs.items()}
    run, ids = rule.program("moe_mlp", implementation), route(65, 4, 1)
    alone = run(narrow, {"expert_ids": ids}, np.float32(dout))
    # New arrays: JAX may still be reading the old ones.
    first = np.arange(65)[:, None] == 0
    others = narrow | {"x": np.where(first, narrow["x"], np.float32(np.nan))}
    crowd = run(others, {"expert_ids": np.where(first, ids, ids[0])}, np.float32(dout))
    np.testing.assert_allclose(crowd["o"][0], alone["o"][0], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_two_runs_are_bit_equal(implementation):
    inputs, dout = draw(300, 16, 24, 4, 2)
    arguments = (
        {name: np.float32(x) for name, x in inputs.items()},
        {"expert_ids": route(300, 4, 2)},
        np.float32(dout),
    )
    run = rule.program("moe_mlp", implementation)
    rule.same_bits(run(*arguments), run(*arguments))


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
def test_no_tokens_give_no_rows(implementation):
    inputs, dout = draw(0, 4, 3, 2, 1)
    narrow = {name: np.float32(x) for name, x in inputs.items()}
    got = rule.program("moe_mlp", implementation)(narrow, {"expert_ids": np.zeros((0, 1), np.int32)}, np.float32(dout))
    assert got["o"].shape == (0, 4) and not np.any(got["dw_gate"])
