"""Numbers over the whole range of a dtype: right wherever the true result and the documented intermediates fit."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.verification.fast_compile import jit_fast_compile
from dantinox.kernels.ops.attention import common
from dantinox.kernels.softcap import cap_derivative, cap_scores, soft_cap
from tests.helpers import cases, random_shapes, tolerance

IMPLEMENTATIONS = (*tolerance.runnable_implementations("attention"), "reference")
T, S, H, K, D = 3, 5, 2, 1, 4
SHAPES = {"q": (T, H, D), "k": (S, K, D), "v": (S, K, D), "gate": (T, H, D), "do": (T, H, D)}
FLOAT32_MAX = float(np.finfo(np.float32).max)
TINY = float(np.finfo(np.float32).tiny)


class Exact(NamedTuple):
    """Results in float64, and the sums of the absolute values of their terms."""

    results: dict[str, np.ndarray]
    sums: dict[str, np.ndarray]
    largest_intermediate: float


def exact(q, k, v, gate, do, *, scale: float, softcap: float | None, error: Any = 0.0) -> Exact:
    """The formula of causal attention; scores are off by the factor 1 + error."""
    qk = np.einsum("thd,sd->hts", q, k[:, 0]) * scale * (1 + error)
    s = qk if softcap is None else softcap * np.tanh(qk / softcap)
    slope = np.ones_like(s) if softcap is None else 1 - np.tanh(qk / softcap) ** 2
    visible = (np.arange(T)[:, None] + S - T >= np.arange(S))[None]
    s = np.where(visible, s, -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    sigmoid, slope_of_gate = 1 / (1 + np.exp(-gate)), 1 / (1 + np.exp(-gate)) / (1 + np.exp(gate))

    def terms(q, k, v, do, sign: float) -> dict[str, np.ndarray]:
        o = np.einsum("hts,sd->thd", p, v[:, 0])
        do_ungated = do * sigmoid
        dp = np.where(visible, np.einsum("thd,sd->hts", do_ungated, v[:, 0]), 0)
        # 1 - t^2 is off by a rounding of 1, which the sums of absolute values include.
        slopes = slope if sign > 0 else np.maximum(slope, 1 / 32)
        ds = p * slopes * (dp - sign * (p * dp).sum(-1, keepdims=True))
        return {
            "o": o * sigmoid,
            "dq": scale * np.einsum("hts,sd->thd", ds, k[:, 0]),
            "dk": scale * np.einsum("hts,thd->sd", ds, q)[:, None],
            "dv": np.einsum("hts,thd->sd", p, do_ungated)[:, None],
            "dgate": do * o * slope_of_gate,
            "intermediates": np.stack([np.abs(x).max() for x in (do * o, dp, ds, ds * scale, do_ungated)]),
        }

    results = terms(q, k, v, do, 1.0)
    scale, signed_scale = abs(scale), scale
    sums = terms(*map(np.abs, (q, k, v, do)), -1.0)
    scale = signed_scale
    scores = np.einsum("thd,sd->hts", np.abs(q), np.abs(k[:, 0])) * max(abs(scale), common.SMALL_SCALE)
    unscaled = max(sums["dq"].max(), sums["dk"].max()) / abs(scale) ** (0.5 if abs(scale) < common.SMALL_SCALE else 1)
    largest = max(sums.pop("intermediates").max(), scores.max(), unscaled)
    results.pop("intermediates")
    return Exact(results, sums, largest)


def draw(dtype: Any, seed: int, exponents: dict[str, float]) -> dict[str, np.ndarray]:
    """Normal numbers times 2^exponent, within the range of the dtype and rounded to it."""
    rng, largest = np.random.default_rng(seed), float(jnp.finfo(dtype).max)
    arrays = {}
    for name, shape in SHAPES.items():
        spread = 2.0 ** rng.uniform(-3, 0, shape) * rng.choice([-1, 1], shape)
        arrays[name] = np.clip(spread * 2.0 ** exponents[name], -largest, largest)
    return {name: np.asarray(jnp.asarray(x, dtype)) for name, x in arrays.items()}


@functools.cache
def program(implementation: str, scale: float, softcap: float | None) -> Any:
    return tolerance.program.__wrapped__("attention", implementation, (("scale", scale), ("softcap", softcap)))


def assert_right(implementation: str, dtype: Any, arrays: dict[str, Any], scale: float, softcap: float | None) -> bool:
    """Compare every entry whose true value fits; return False if the problem is too ill-conditioned to judge."""
    wide = {name: tolerance.to_float64(x) for name, x in arrays.items()}
    run_exact = functools.partial(exact, **wide, scale=scale, softcap=softcap)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        truth = run_exact()
        error = 4 * np.finfo(np.float32).eps * np.random.default_rng(0).choice([-1, 1], (H, T, S))
        # The reference rounds scores to the dtype: only problems where that does not matter tell right from wrong.
        rounding = float(jnp.finfo(dtype).eps) if implementation == "reference" else 0
        moved = run_exact(error=error + error / abs(error) * rounding)
    if not truth.largest_intermediate < FLOAT32_MAX / 16:
        return False
    steps = {"float32": 2.0**-23, "bfloat16": 2.0**-8, "float16": 2.0**-11}[jnp.dtype(dtype).name]
    info, wrong, bounds = jnp.finfo(dtype), [], {}
    # Float32 arithmetic flushes intermediates below TINY, which then miss in products with these factors.
    score_factor = abs(scale) * max(1, np.abs(wide["v"]).max(), np.abs(wide["do"]).max())
    factors = {"dq": ("k", score_factor), "dk": ("q", score_factor), "dv": ("do", 1), "dgate": ("do", 1), "o": ("v", 1)}
    for name, expected in truth.results.items():
        moved_by, (factor, size) = np.abs(moved.results[name] - expected), factors[name]
        flushed = TINY * max(1, 64 * abs(scale), 64 * size * np.abs(wide[factor]).max())
        bounds[name] = (
            8 * moved_by + 32 * steps * truth.sums[name].max() + 4 * max(float(info.smallest_normal), flushed)
        )
        if moved_by.max() > 0.01 * truth.sums[name].max():
            return False
    inputs = {name: x[None] for name, x in arrays.items() if name != "do"}
    actual = program(implementation, scale, softcap)(inputs, {}, arrays["do"][None])
    for name, expected in truth.results.items():
        fits = (np.abs(expected) + bounds[name] < float(info.max)) & (truth.sums[name] < FLOAT32_MAX / 4)
        found = tolerance.to_float64(actual[name])[0]
        if not np.all(np.abs(found - expected)[fits] <= bounds[name][fits]):
            wrong.append(f"{name} is {found[fits]}, not {expected[fits]}")
    assert not wrong, "\n".join(wrong)
    return True


def exponents(dtype: Any, log_scale: float) -> st.SearchStrategy[dict[str, float]]:
    """Magnitudes from the smallest subnormal number to the largest number; k is such that most scores are moderate."""
    info = jnp.finfo(dtype)
    smallest = np.log2(float(info.smallest_subnormal if dtype == "float16" else info.smallest_normal)) + 3

    def sizes(seed: int) -> dict[str, float]:  # hypothesis itself prefers small numbers
        rng = np.random.default_rng(seed)
        found = {name: rng.uniform(smallest, np.log2(float(info.max))) for name in ("q", "v", "do")}
        log_scores = rng.uniform(-20, 8)
        return found | {"k": np.clip(log_scores - log_scale - found["q"], -120, 120), "gate": rng.uniform(-3, 6.5)}

    return st.integers(0, 10**6).map(sizes)


# dtype, log2 of the scale, soft cap: scores of every magnitude come from q and k, so that few programs serve all draws.
RANGES = {
    "float16": ("float16", -1, None),
    "float16, cap": ("float16", -1, 1.5),
    "float32": ("float32", -1, None),
    "float32, small scale": ("float32", -124, 1.5),
    "float32, large scale": ("float32", 40, None),
    "bfloat16, small scale": ("bfloat16", -124, None),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in list(RANGES)[4:] else ()) for n in RANGES]
)
@pytest.mark.sampled(10)
def test_operands_of_every_magnitude(name, implementation):
    dtype, log_scale, cap = RANGES[name]

    @random_shapes.examples(100)
    @given(sizes=exponents(dtype, log_scale), seed=st.integers(0, 99))
    def check(sizes, seed):
        assert_right(implementation, dtype, draw(dtype, seed, sizes), 2.0**log_scale, cap)

    check()


def moderate(**changed: Any) -> dict[str, np.ndarray]:
    """Inputs near 1, in float32, but for the given ones, which are filled with one value."""
    arrays = draw("float32", 3, {"q": 0, "k": 1, "v": 2, "do": 0, "gate": 1})
    return arrays | {name: np.full(SHAPES[name], value, arrays[name].dtype) for name, value in changed.items()}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_finite_score_counts(implementation):
    """All scores of a row are far below zero: -3.2e38 and the like."""
    arrays = moderate(q=0.125, k=-1.0)
    for size, scale in ((1e30, 1.0), (1.6e38, 4.0), (-1.6e38, 4.0)):
        arrays["k"] = np.full(SHAPES["k"], -size, np.float32)
        inputs = {name: x[None] for name, x in arrays.items() if name != "do"}
        o = program(implementation, scale, None)(inputs, {}, arrays["do"][None])["o"][0]
        sees = np.arange(S) <= np.arange(T)[:, None] + S - T
        mean = (sees[..., None] * arrays["v"][:, 0]).sum(1) / sees.sum(1, keepdims=True)
        expected = mean[:, None] / (1 + np.exp(-tolerance.to_float64(arrays["gate"])))
        np.testing.assert_allclose(o, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("cap", [1e38, 1.2e-38])
@pytest.mark.sampled(8)
def test_soft_caps_of_every_size(cap, implementation):
    assert assert_right(implementation, "float32", moderate(), 0.5, cap)
    if cap > 1:  # scores near the cap: one key wins
        arrays = moderate()
        arrays |= {"q": arrays["q"] * np.float32(2**59), "k": arrays["k"] * np.float32(2**60)}
        assert assert_right(implementation, "float32", arrays, 0.5, cap)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gates_of_every_size(implementation):
    for gate in (-80.0, -20.0, 20.0, 80.0):
        arrays = moderate(gate=gate, do=1e30)
        assert assert_right(implementation, "float32", arrays, 0.5, None)
        inputs = {name: x[None] for name, x in arrays.items() if name != "do"}
        found = program(implementation, 0.5, None)(inputs, {}, arrays["do"][None])["dgate"][0]
        truth = exact(**{name: tolerance.to_float64(x) for name, x in arrays.items()}, scale=0.5, softcap=None)
        np.testing.assert_allclose(found, truth.results["dgate"], rtol=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_float16_takes_the_cotangents_of_a_scaled_loss(implementation):
    case = cases.attention(5, 5, H=2, gate="elementwise", softcap=20.0)
    inputs, aux, dout = cases.draw(case)
    dout = 8192 * np.clip(dout, -2, 2)
    inputs |= {
        "q": inputs["q"] / 8,
        "k": inputs["k"] / 8,
        "v": 6 * inputs["v"],
    }  # gradients fit, those of scores do not
    tolerance.assert_matches_reference(
        "attention", implementation, inputs, dout, "float16", aux=aux, options=cases.options(case)
    )


CAPS = [2.0**n for n in (-126, -100, -64, -10, 5, 39, 41, 80, 101, 126, 127.9)]


@pytest.mark.parametrize("unit", [1.0, 1.4426950408889634])
def test_soft_cap_and_its_derivative_for_scores_of_every_size(unit):
    rng = np.random.default_rng(0)
    qk = np.float32(2.0 ** rng.uniform(-125, 127.9, 300) * rng.choice([-1, 1], 300))
    options = [(cap, scale) for cap in CAPS for scale in (2.0**-120, 0.125, -(2.0**90))]

    @jit_fast_compile
    def run(qk):
        capped = [cap_scores(qk, scale=scale, softcap=cap, unit=unit) for cap, scale in options]
        return [(x, cap_derivative(x, softcap=cap, unit=unit)) for x, (cap, _) in zip(capped, options, strict=True)]

    for (cap, scale), (capped, slope) in zip(options, run(qk), strict=True):
        s = qk.astype(np.float64) * scale
        expected = unit * cap * np.tanh(s / cap)
        fits = (np.abs(s) < FLOAT32_MAX) & (np.abs(expected) < FLOAT32_MAX)
        np.testing.assert_allclose(capped[fits], expected[fits], rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(slope[fits], (1 - np.tanh(s / cap) ** 2)[fits], atol=1e-6)
    assert cap_derivative(jnp.float32(-jnp.inf), softcap=1e38) < 1e-6, "a masked score has no slope"


def test_soft_cap_has_derivatives_of_every_order():
    for cap in (3.0, 2.0**41):
        s = np.float32([-2, -0.1, 0, 0.7, 1.3]) * cap
        t = np.tanh(s.astype(np.float64) / cap)
        second = jax.vmap(jax.grad(jax.grad(lambda s, cap=cap: soft_cap(s, cap))))(s)
        np.testing.assert_allclose(second * cap, -2 * t * (1 - t * t), rtol=1e-5, atol=1e-6)
