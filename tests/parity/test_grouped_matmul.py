"""Grouped matmul: the reference against python loops, every implementation against the reference."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.parity import rule

IMPLEMENTATIONS = rule.runnable("grouped_matmul")


def draw(N: int, M: int, F: int, E: int, seed: int = 0) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """(x [N, M] and w [E, M, F] in float64, cotangent [N, F])."""
    rng = np.random.default_rng(seed)
    return (
        {"x": rng.standard_normal((N, M)), "w": rng.standard_normal((E, M, F))},
        rng.standard_normal((N, F)),
    )


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
def test_the_reference_is_the_formula(sizes):
    inputs, dout = draw(6, 3, 2, 3)
    with jax.enable_x64(True):
        run = rule.program("grouped_matmul", "reference")
        got = run(inputs, {"group_sizes": np.int32(sizes)}, dout)
    dx, dw = loops_gradients(**inputs, sizes=sizes, dy=dout)
    for name, expected in {"o": loops(**inputs, sizes=sizes), "dx": dx, "dw": dw}.items():
        np.testing.assert_allclose(got[name], expected, rtol=1e-12, atol=1e-13, err_msg=name)


# N rows, and group sizes around the edges of tiles of 64, 128 and 256 rows.
CASES = {
    **{
        f"580: {sizes}": (580, sizes)
        for sizes in (
            [580, 0, 0, 0],
            [0, 0, 0, 580],
            [0, 0, 0, 0],
            [63, 64, 65, 1],
            [255, 256, 0, 69],
            [257, 0, 1, 129],
            [1, 1, 1, 1],
            [127, 320, 133, 0],
        )
    },
    "one group of all": (65, [65]),
    "one group of some": (65, [64]),
    "one row": (1, [0, 1]),
    "one row of nobody": (1, [0, 0]),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("N", "sizes"), CASES.values(), ids=CASES)
def test_every_implementation_keeps_the_rule(N, sizes, dtype, implementation):
    inputs, dout = draw(N, 24, 40, len(sizes))
    aux = {"group_sizes": np.int32(sizes)}
    got = rule.judge("grouped_matmul", implementation, inputs, dout, dtype, aux=aux)
    for name in ("o", "dx"):
        assert not np.any(rule.exact(got[name])[sum(sizes) :]), f"{name}: rows past the sum of the sizes"
    empty = [e for e, size in enumerate(sizes) if size == 0]
    assert not np.any(rule.exact(got["dw"])[empty]), "dw of an empty group"


@given(
    shape=st.sampled_from([(1, 3, 2, 1), (9, 5, 4, 3), (70, 4, 7, 5), (140, 1, 1, 2), (330, 3, 2, 4)]),
    cuts=st.lists(st.floats(0, 1), min_size=5, max_size=5),
    seed=st.integers(0, 9),
)
def test_any_sizes_are_the_formula(shape, cuts, seed):
    N, *_, E = shape
    ends = np.sort(np.round(np.array(cuts[:E]) * N)).astype(int)
    sizes = np.diff(ends, prepend=0)
    inputs, dout = draw(*shape, seed)
    narrow = {name: np.float32(x) for name, x in inputs.items()}
    dx, dw = loops_gradients(**inputs, sizes=sizes, dy=dout)
    expected = {"o": loops(**inputs, sizes=sizes), "dx": dx, "dw": dw}
    for implementation in IMPLEMENTATIONS:
        run = rule.program("grouped_matmul", implementation)
        got = run(narrow, {"group_sizes": np.int32(sizes)}, np.float32(dout))
        for name, value in expected.items():
            np.testing.assert_allclose(got[name], value, rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
@pytest.mark.parametrize("sizes", [[63, 64, 65, 1], [0, 0, 0, 0], [257, 0, 1, 129], [580, 0, 0, 0]], ids=str)
def test_what_rows_of_nobody_hold_reaches_nobody(sizes, implementation):
    inputs, dout = draw(580, 24, 40, 4)
    nobody = (np.arange(580) >= sum(sizes))[:, None]
    # An empty group's matrix multiplies nothing either, and what comes back for rows of nobody is no gradient.
    empty = (np.int32(sizes) == 0)[:, None, None]
    run, results = rule.program("grouped_matmul", implementation), []
    for fill in (0, np.nan, np.inf):
        filled = {
            "x": np.float32(np.where(nobody, fill, inputs["x"])),
            "w": np.float32(np.where(empty, fill, inputs["w"])),
        }
        dy = np.float32(np.where(nobody, fill, dout))
        results.append(run(filled, {"group_sizes": np.int32(sizes)}, dy))
    for poisoned in results[1:]:
        rule.same_bits(results[0], poisoned)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_two_runs_are_bit_equal(implementation):
    inputs, dout = draw(580, 24, 40, 4)
    run = rule.program("grouped_matmul", implementation)
    arguments = (
        {name: np.float32(x) for name, x in inputs.items()},
        {"group_sizes": np.int32([63, 257, 0, 129])},
        np.float32(dout),
    )
    rule.same_bits(run(*arguments), run(*arguments))


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
@pytest.mark.parametrize("shape", [(0, 3, 2, 2), (4, 3, 2, 0), (4, 0, 2, 1)], ids=["no rows", "no groups", "no width"])
def test_nothing_to_multiply_gives_zeros(shape, implementation):
    inputs, dout = draw(*shape)
    narrow = {name: np.float32(x) for name, x in inputs.items()}
    sizes = np.full(shape[3], shape[0], np.int32) if shape[3] == 1 else np.zeros(shape[3], np.int32)
    got = rule.program("grouped_matmul", implementation)(narrow, {"group_sizes": sizes}, np.float32(dout))
    np.testing.assert_array_equal(got["o"], np.zeros((shape[0], shape[2])))
