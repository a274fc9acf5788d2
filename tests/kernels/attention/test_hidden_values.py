"""Keys that a query does not see: their contents have no effect on it."""

from typing import Any

import numpy as np
import pytest

from tests.helpers import cases, tolerance

IMPLEMENTATIONS = (*tolerance.runnable_implementations("attention"), "reference")
row = cases.attention
CASES = {  # the case, and which queries do not see the changed key
    "causal, cap": (row(12, 12, B=2, H=4, softcap=2.0, gate="elementwise"), 5, lambda t: t < 5),
    "causal": (row(12, 16, B=2, H=4), 9, lambda t: t < 5),
    "window": (row(100, 100, B=2, H=4, window=8, gate="head"), 40, lambda t: (t < 40) | (t >= 48)),
    "segments": (row(12, 12, B=2, H=4, segments="packed", causal=False), 5, None),
}
DTYPES = ("float32", "bfloat16", "float16")


def hidden_queries(name: str, aux: dict[str, Any]) -> np.ndarray:
    """[B, T]: the queries that do not see the changed key."""
    case, key, hides = CASES[name]
    if hides is not None:
        return np.broadcast_to(hides(np.arange(case.T)), (case.B, case.T))
    ids = np.asarray(aux["segment_ids"])
    return ids != ids[:, key][:, None]


def run(name: str, dtype: str, implementation: str, change: Any, hidden: np.ndarray | None) -> dict[str, np.ndarray]:
    """Outputs and gradients after change(k, v); queries that see the changed key get no cotangent."""
    case, _, _ = CASES[name]
    inputs, aux, dout = cases.draw(case)
    inputs = {n: np.array(np.asarray(x, dtype if dtype != "bfloat16" else np.float32)) for n, x in inputs.items()}
    change(inputs["k"], inputs["v"])
    if hidden is not None:
        dout = dout * hidden[:, :, None, None]
    arguments = tolerance.round_inputs(inputs, dout, dtype)
    result = tolerance.program("attention", implementation, cases.options(case))(arguments[0], aux, arguments[2])
    return {n: np.asarray(x) for n, x in result.items()}


def parameters() -> list[Any]:
    return [
        pytest.param(name, dtype, i, id=f"{name}-{dtype}-{i}", marks=marks)
        for name in CASES
        for dtype in DTYPES
        for i in IMPLEMENTATIONS
        for marks in [() if dtype == "float32" or name == "causal, cap" else pytest.mark.slow]
    ]


@pytest.mark.parametrize(("name", "dtype", "implementation"), parameters())
@pytest.mark.sampled(12)
def test_finite_values_of_hidden_keys_have_no_effect(name, dtype, implementation):
    case, key, _ = CASES[name]
    hidden = hidden_queries(name, cases.draw(case)[1])
    assert hidden.any() and not hidden.all(), "some queries see the key and some do not"
    largest = {"float32": 3e38, "bfloat16": 3e38, "float16": 65504}[dtype]
    signs = np.random.default_rng(0).choice([-1, 1], (case.B, case.K, case.D))

    def large_values(k: np.ndarray, v: np.ndarray) -> None:
        v[:, key] = largest * signs

    def large_keys_and_values(k: np.ndarray, v: np.ndarray) -> None:  # whose scores are infinite or NaN
        k[:, key] = largest * signs
        v[:, key] = largest * signs

    def other_values(k: np.ndarray, v: np.ndarray) -> None:
        v[:, key] = 1 - v[:, key]

    before = run(name, dtype, implementation, lambda k, v: None, hidden)
    for change in (other_values, large_values, large_keys_and_values):
        after = run(name, dtype, implementation, change, hidden)
        if change is not large_keys_and_values:  # NaN of the queries that see the key may reach these gradients
            tolerance.assert_bit_equal({n: before[n] for n in ("dk", "dv")}, {n: after[n] for n in ("dk", "dv")})
        for n in set(before) - {"dk", "dv"}:
            tolerance.assert_bit_equal({n: before[n][hidden]}, {n: after[n][hidden]})


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["causal, cap", "window", "segments"])
@pytest.mark.sampled(4)
def test_nan_stays_in_its_sequence_and_head(name, implementation):
    case, key, _ = CASES[name]
    before = run(name, "float32", implementation, lambda k, v: None, None)
    for value in (np.nan, np.inf):

        def poison(k: np.ndarray, v: np.ndarray, value: float = value) -> None:
            k[0, key, 0] = value
            v[0, key, 0] = -value

        after = run(name, "float32", implementation, poison, None)
        for n, x in before.items():
            poisoned = x.shape[2] // case.K  # heads that read the first key head
            tolerance.assert_bit_equal({n: x[1]}, {n: after[n][1]})
            tolerance.assert_bit_equal({n: x[0][:, poisoned:]}, {n: after[n][0][:, poisoned:]})
