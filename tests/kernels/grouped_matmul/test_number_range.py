"""Grouped matmul of numbers of any magnitude: right wherever the true result and its float32 sums fit."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import error_bounds, random_shapes, tolerance

IMPLEMENTATIONS = ("reference", *tolerance.runnable_implementations("grouped_matmul"))
N, M, F, SIZES = 9, 3, 4, np.int32([4, 0, 3])
FLOAT32_MAX = float(jnp.finfo(jnp.float32).max)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.sampled(3)
def test_numbers_of_any_magnitude(implementation, dtype):
    run = tolerance.program("grouped_matmul", implementation)

    @random_shapes.examples(25)
    @given(seed=st.integers(0, 2**31), spans=st.tuples(*[st.sampled_from([0.0, 0.1, 0.5, 1.0])] * 3))
    def check(seed, spans):
        rng = np.random.default_rng(seed)
        draw = functools.partial(error_bounds.draw_magnitudes, rng, dtype=dtype)
        x, w, dy = (draw(s, span=a) for s, a in zip([(N, M), (3, M, F), (N, F)], spans, strict=True))
        arguments = tolerance.round_inputs({"x": x, "w": w}, dy, dtype, aux={"group_sizes": SIZES})
        got = {name: np.asarray(value) for name, value in run(*arguments).items()}
        exact = lambda value: error_bounds.Bounded(value, 0 * value, 8 * float(jnp.finfo(jnp.float32).eps))
        row = 0
        for e, size in enumerate(SIZES):
            rows = slice(row, row := row + size)
            x_e, w_e, dy_e = exact(x[rows]), exact(w[e]), exact(dy[rows])
            expected = {
                "o": (got["o"][rows], x_e.einsum("nm,mf->nf", w_e)),
                "dx": (got["dx"][rows], dy_e.einsum("nf,mf->nm", w_e)),
                "dw": (got["dw"][e], x_e.einsum("nm,nf->mf", dy_e)),
            }
            for name, (actual, bounded) in expected.items():
                if bounded.peak < FLOAT32_MAX:
                    bounded.assert_contains(actual, dtype, f"{name} of group {e}")

    check()
