"""Rotary positions against numpy: complex rotation, relative positions, NTK and YaRN from their papers' formulas."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from dantinox.config import ModelConfig
from dantinox.rope import frequencies, rotate, rotation

CONFIG = ModelConfig(dim=64, n_heads=1, kv_heads=1, head_dim=32, max_context=8192)


def scaled(kind: str, factor: float, **changes) -> ModelConfig:
    return dataclasses.replace(CONFIG, rope_scaling=kind, rope_factor=factor, **changes)


def turned(x: np.ndarray, positions: np.ndarray, config: ModelConfig = CONFIG) -> np.ndarray:
    cos, sin = rotation(config, jnp.asarray(positions, jnp.int32)[None])
    return np.asarray(rotate(jnp.asarray(x, jnp.float32), cos, sin))


def test_rotation_is_a_complex_product():
    x = np.random.default_rng(0).standard_normal((1, 5, 2, 32))
    positions = np.array([0, 1, 7, 100, 8191])
    angle = positions[:, None] * 10000.0 ** (-np.arange(16) / 16)
    z = (x[..., :16] + 1j * x[..., 16:]) * np.exp(1j * angle)[None, :, None]
    np.testing.assert_allclose(turned(x, positions), np.concatenate([z.real, z.imag], -1), rtol=1e-3, atol=2e-3)
    np.testing.assert_array_equal(turned(x, np.zeros(5)), np.float32(x))


@pytest.mark.parametrize("kind", ["none", "ntk", "yarn"])
def test_scores_depend_on_the_distance_alone(kind):
    q, k = np.random.default_rng(0).standard_normal((2, 1, 1, 1, 32))
    config = scaled(kind, 4.0)
    score = lambda p, s: np.sum(turned(q, np.array([p]), config) * turned(k, np.array([s]), config))
    assert score(9, 2) == pytest.approx(score(107, 100), rel=1e-4)
    assert score(9, 2) == pytest.approx(score(1007, 1000), rel=1e-3)
    assert score(9, 2) != pytest.approx(score(9, 3), rel=1e-3)


def test_a_factor_of_one_stretches_nothing():
    plain, _ = frequencies(CONFIG)
    for kind in ("ntk", "yarn"):
        inverse, magnitude = frequencies(scaled(kind, 1.0))
        np.testing.assert_allclose(inverse, plain, rtol=1e-6)
        assert magnitude == 1


def test_ntk_stretches_the_base():
    """theta' = theta * factor^(D / (D - 2)): the fastest pair stays, the slowest turns `factor` times slower."""
    inverse, magnitude = frequencies(scaled("ntk", 4.0))
    base = 10000.0 * 4.0 ** (32 / 30)
    np.testing.assert_allclose(inverse, [base ** (-2 * i / 32) for i in range(16)], rtol=1e-6)
    plain, _ = frequencies(CONFIG)
    assert magnitude == 1 and inverse[0] == plain[0]
    assert inverse[-1] == pytest.approx(plain[-1] / 4, rel=1e-6)


@pytest.mark.parametrize("original", [None, 2048, 1024])
def test_yarn_slows_slow_pairs_by_the_turns_they_make(original):
    """NTK-by-parts of the paper: alpha = 1 and beta = 32 turns over the original context, a ramp between."""
    factor, context = 4.0, original or 8192 // 4
    inverse, magnitude = frequencies(scaled("yarn", factor, rope_original_context=original))
    for i, got in enumerate(inverse):
        theta = 10000.0 ** (-2 * i / 32)
        turns = context / (2 * math.pi / theta)
        ramp = 0 if turns < 1 else 1 if turns > 32 else (turns - 1) / (32 - 1)
        assert got == pytest.approx((1 - ramp) * theta / factor + ramp * theta, rel=1e-5), i
    # On q and on k, so the scores are warmed by its square: sqrt(1 / t) = 0.1 ln(s) + 1.
    assert magnitude == pytest.approx(0.1 * math.log(4) + 1)


def test_yarn_agrees_with_transformers_where_both_are_sure():
    """Transformers ramps over the pair's index, between the pairs that turn 32 times and once; outside, both agree."""
    factor, context, D = 4.0, 2048, 32
    inverse, _ = frequencies(scaled("yarn", factor))
    index = lambda turns: D * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(10000.0))
    low, high = math.floor(index(32)), math.ceil(index(1))
    for i, got in enumerate(inverse):
        theta = 10000.0 ** (-2 * i / D)
        if i <= low:
            assert got == pytest.approx(theta, rel=1e-5)
        elif i >= high:
            assert got == pytest.approx(theta / factor, rel=1e-5)
        else:
            assert theta / factor * (1 - 1e-5) <= got <= theta * (1 + 1e-5)
