"""Rotary positions against NumPy: complex rotation, relative positions, and each scaling from its formula."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from dantinox.config import ConfigError, ModelConfig
from dantinox.model.rope import apply_rope, rope_cos_sin, rope_frequencies

CONFIG = ModelConfig(dim=64, n_heads=1, n_kv_heads=1, head_dim=32, max_context=8192)


def scaled(kind: str, factor: float, **changes) -> ModelConfig:
    return dataclasses.replace(CONFIG, rope_scaling=kind, rope_factor=factor, **changes)


def turned(x: np.ndarray, positions: np.ndarray, config: ModelConfig = CONFIG) -> np.ndarray:
    cos, sin = rope_cos_sin(config, jnp.asarray(positions, jnp.int32)[None])
    return np.asarray(apply_rope(jnp.asarray(x, jnp.float32), cos, sin))


def test_apply_rope_equals_complex_multiplication():
    x = np.random.default_rng(0).standard_normal((1, 5, 2, 32))
    positions = np.array([0, 1, 7, 100, 8191])
    angle = positions[:, None] * 10000.0 ** (-np.arange(16) / 16)
    z = (x[..., :16] + 1j * x[..., 16:]) * np.exp(1j * angle)[None, :, None]
    np.testing.assert_allclose(turned(x, positions), np.concatenate([z.real, z.imag], -1), rtol=1e-3, atol=2e-3)
    np.testing.assert_array_equal(turned(x, np.zeros(5)), np.float32(x))


@pytest.mark.parametrize("kind", ["none", "linear", "ntk", "yarn", "llama3"])
def test_rope_scores_depend_only_on_distance(kind):
    q, k = np.random.default_rng(0).standard_normal((2, 1, 1, 1, 32))
    config = scaled(kind, 4.0)
    score = lambda p, s: np.sum(turned(q, np.array([p]), config) * turned(k, np.array([s]), config))
    assert score(9, 2) == pytest.approx(score(107, 100), rel=1e-4)
    assert score(9, 2) == pytest.approx(score(1007, 1000), rel=1e-3)
    assert score(9, 2) != pytest.approx(score(9, 3), rel=1e-3)


def test_factor_of_one_changes_nothing():
    plain, _ = rope_frequencies(CONFIG)
    for kind in ("linear", "ntk", "yarn", "llama3"):
        inverse, magnitude = rope_frequencies(scaled(kind, 1.0))
        np.testing.assert_allclose(inverse, plain, rtol=1e-6)
        assert magnitude == 1


def test_ntk_scales_the_base():
    """theta' = theta * factor^(D / (D - 2)): the fastest pair stays, the slowest turns `factor` times slower."""
    inverse, magnitude = rope_frequencies(scaled("ntk", 4.0))
    base = 10000.0 * 4.0 ** (32 / 30)
    np.testing.assert_allclose(inverse, [base ** (-2 * i / 32) for i in range(16)], rtol=1e-6)
    plain, _ = rope_frequencies(CONFIG)
    assert magnitude == 1 and inverse[0] == plain[0]
    assert inverse[-1] == pytest.approx(plain[-1] / 4, rel=1e-6)


@pytest.mark.parametrize("original", [None, 2048, 1024])
def test_yarn_scales_low_frequencies(original):
    """A ramp over the pair's index between those that turn 32 times and once over the original context."""
    factor, context, D = 4.0, original or 8192 // 4, 32
    inverse, magnitude = rope_frequencies(scaled("yarn", factor, rope_original_context=original))
    turns = [context * 10000.0 ** (-2 * i / D) / (2 * math.pi) for i in range(D // 2)]
    low = max(i for i in range(D // 2) if turns[i] >= 32)  # the last that turns so often
    high = min(i for i in range(D // 2) if turns[i] <= 1)
    for i, got in enumerate(inverse):
        theta, ramp = 10000.0 ** (-2 * i / D), min(max((i - low) / (high - low), 0), 1)
        assert got == pytest.approx(theta * (1 - ramp) + theta / factor * ramp, rel=1e-5), i
    # On q and on k, so the scores are warmed by its square: sqrt(1 / t) = 0.1 ln(s) + 1.
    assert magnitude == pytest.approx(0.1 * math.log(4) + 1)


def test_yarn_without_rounding_matches_the_formula():
    """rope_truncate False, as in gpt-oss: the ramp begins and ends between two pairs."""
    config = dataclasses.replace(CONFIG, rope_scaling="yarn", rope_factor=32.0, rope_theta=150_000.0, head_dim=64)
    config = dataclasses.replace(config, rope_original_context=4096, rope_truncate=False)
    inverse, _ = rope_frequencies(config)
    low, high = (32 * math.log(4096 / (turns * 2 * math.pi)) / math.log(150_000) for turns in (32, 1))
    assert (round(low, 2), round(high, 2)) == (8.09, 17.4)
    for i, got in enumerate(inverse):
        theta, ramp = 150_000 ** (-2 * i / 64), min(max((i - low) / (high - low), 0), 1)
        assert got == pytest.approx(theta * (1 - ramp) + theta / 32 * ramp, rel=1e-6), i
    rounded, _ = rope_frequencies(dataclasses.replace(config, rope_truncate=True))
    assert np.any(np.abs(rounded / inverse - 1) > 1e-2)


def test_llama3_scales_frequencies_below_four_rotations():
    """By wavelengths, as Llama 3.1 was published: past the context / 1, short of the context / 4, and between."""
    factor, context = 8.0, 2048
    inverse, magnitude = rope_frequencies(scaled("llama3", factor, rope_original_context=context))
    kinds = set()
    for i, got in enumerate(inverse):
        theta = 10000.0 ** (-2 * i / 32)
        wave = 2 * math.pi / theta
        smooth = (context / wave - 1) / (4 - 1)
        between = (1 - smooth) * theta / factor + smooth * theta
        want = theta if wave < context / 4 else theta / factor if wave > context else between
        kinds.add("fast" if wave < context / 4 else "slow" if wave > context else "between")
        assert got == pytest.approx(want, rel=1e-5), i
    assert magnitude == 1 and kinds == {"fast", "between", "slow"}


def test_linear_scales_every_frequency():
    inverse, magnitude = rope_frequencies(scaled("linear", 4.0))
    np.testing.assert_allclose(inverse, rope_frequencies(CONFIG)[0] / 4, rtol=1e-6)
    assert magnitude == 1


@pytest.mark.parametrize("theta", [1.0, 0.5, 0.0, -1.0])
def test_rope_base_of_at_most_one_raises(theta):
    with pytest.raises(ConfigError, match=rf"^rope_theta is {theta}; allowed: more than 1$"):
        scaled("yarn", 2.0, rope_theta=theta)
