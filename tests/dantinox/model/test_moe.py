"""The router and its losses, and the sparse block compared with a dense one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dantinox
from dantinox.config import ModelConfig
from dantinox.model.layers import MLP
from dantinox.model.moe import MoE, route


def config(**changes) -> ModelConfig:
    sizes = {"vocab_size": 23, "dim": 16, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "mlp_ratio": 2.0}
    return ModelConfig(**(sizes | {"max_context": 64, "moe": "xla", "attn": "xla"} | changes))


class Keys:
    """A fresh key a call."""

    def __init__(self) -> None:
        self.n = 0

    def __call__(self) -> jax.Array:
        self.n += 1
        return jax.random.key(self.n)


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.sampled(2)
def test_router_selects_top_k_and_renormalizes(k):
    logits = np.random.default_rng(0).standard_normal((9, 4)).astype(np.float32)
    ids, weights, _ = route(jnp.asarray(logits), k)
    assert ids.dtype == jnp.int32
    for n in range(9):
        best = np.argsort(-logits[n])[:k]
        assert list(ids[n]) == list(best)
        chances = np.exp(logits[n][best] - logits[n].max())
        np.testing.assert_allclose(weights[n], chances / chances.sum(), rtol=1e-5)


@pytest.mark.parametrize(("E", "k"), [(4, 1), (4, 2), (8, 3), (1, 1), (3, 3)])
@pytest.mark.sampled(4)
def test_balance_loss_is_k_when_even_and_larger_when_skewed(E, k):
    # Token n likes experts n, n + 1, ...: every expert gets k / E of the slots and 1 / E of the probability.
    even = np.zeros((E * 5, E), np.float32)
    for n in range(E * 5):
        for j in range(k):
            even[n, (n + j) % E] = 5.0 - j
    balance = float(route(jnp.asarray(even), k)[2].balance)
    assert balance == pytest.approx(k, rel=1e-5)
    if k < E:
        skewed = np.tile(np.arange(E, dtype=np.float32)[::-1] * 3, (20, 1))
        chances = np.exp(skewed[0]) / np.exp(skewed[0]).sum()
        worse = float(route(jnp.asarray(skewed), k)[2].balance)
        assert worse == pytest.approx(E * chances[:k].sum(), rel=1e-5) and worse > 1.2 * k


def test_router_losses_have_balancing_gradients():
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((64, 4)) + [2, 0, 0, 0], jnp.float32)
    loss = lambda shift: route(logits + shift, 2)[2].balance
    gradient = jax.grad(loss)(jnp.zeros(4))
    assert gradient[0] > 0 and bool(jnp.all(gradient[1:] < 0)), "downhill is away from the crowded expert"
    z = lambda scale: route(logits * scale, 2)[2].z
    by_hand = np.mean(np.log(np.exp(np.float64(logits)).sum(1)) ** 2)
    assert float(z(1.0)) == pytest.approx(by_hand, rel=1e-5) and jax.grad(z)(1.0) > 0


def test_large_router_logits_stay_finite():
    _, weights, losses = route(jnp.array([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4]]), 2)
    assert all(bool(jnp.isfinite(x).all()) for x in (weights, *losses))
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-6)


def test_one_expert_equals_dense_mlp():
    sparse = MoE(config(n_experts=1, experts_per_token=1), Keys(), 0.02)
    dense = MLP(config(), Keys(), 0.02)
    for name in ("gate", "up", "down"):
        getattr(dense, name)[...] = getattr(sparse, name)[...][0]
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 7, 16)), jnp.float32)
    y, losses = nnx.jit(lambda model, x: model(x))(sparse, x)
    np.testing.assert_allclose(y, dense(x), rtol=1e-5, atol=1e-7)
    assert float(losses.balance) == pytest.approx(1)


def test_shared_expert_output_is_added_to_routed_experts():
    model = MoE(config(n_experts=4, shared_expert=True), Keys(), 0.02)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 7, 16)), jnp.float32)
    run = nnx.jit(lambda model, x: model(x)[0])
    both = run(model, x)
    shared, model.shared = model.shared, None
    np.testing.assert_allclose(both, run(model, x) + shared(x), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.sampled(2)
def test_every_parameter_of_a_sparse_model_gets_a_gradient(dtype):
    model = dantinox.Transformer(config(n_experts=4, shared_expert=True, dtype=dtype, n_layers=1), rngs=nnx.Rngs(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 23, (4, 32)), jnp.int32)

    @nnx.jit
    @nnx.grad
    def gradients(model):
        h, losses = model.hidden(tokens)
        return jnp.mean(model.logits(h)[..., 0] ** 2) + 0.01 * losses.balance + 0.001 * losses.z

    for path, gradient in nnx.to_flat_state(gradients(model)):
        g = np.asarray(gradient[...])
        assert np.isfinite(g).all() and np.any(g != 0), path


def test_router_loss_is_the_mean_over_layers():
    model = dantinox.Transformer(config(n_experts=4, n_layers=2), rngs=nnx.Rngs(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 23, (2, 32)), jnp.int32)

    @nnx.jit
    def losses_of(model):
        each, (h, rope) = [], model.embed(tokens, jnp.arange(32)[None])
        for block in model.blocks:
            h, losses, _ = block(h, rope)
            each.append(losses)
        return each, model.hidden(tokens)[1]

    each, mean = losses_of(model)
    assert float(mean.balance) == pytest.approx(np.mean([float(x.balance) for x in each]), rel=1e-5)
    assert float(mean.z) == pytest.approx(np.mean([float(x.z) for x in each]), rel=1e-5)


@pytest.mark.parametrize(
    ("switch", "value"),
    [("jax_enable_x64", True), ("jax_numpy_rank_promotion", "raise"), ("jax_numpy_dtype_promotion", "strict")],
)
@pytest.mark.sampled(6)
def test_router_under_switches_of_jax(switch, value):
    logits = jnp.float32(np.random.default_rng(0).standard_normal((6, 4)))
    expected, before = route(logits, 2), getattr(jax.config, switch)
    jax.config.update(switch, value)
    try:
        actual = route(logits, 2)
    finally:
        jax.config.update(switch, before)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.sampled(4)
def test_sigmoid_router_selects_by_biased_scores_and_weighs_by_scores(renormalise):
    rng = np.random.default_rng(0)
    logits, bias = rng.standard_normal((40, 6)), np.array([3.0, 0, 0, -3, 0.2, 0])
    ids, weights, stats = route(
        jnp.float32(logits), 2, kind="sigmoid", selection_bias=jnp.float32(bias), renormalise=renormalise, scale=2.5
    )
    scores = 1 / (1 + np.exp(-logits))
    best = np.argsort(-(scores + bias), axis=1)[:, :2]
    np.testing.assert_array_equal(ids, best)
    chosen = np.take_along_axis(scores, best, axis=1)
    np.testing.assert_allclose(
        weights, 2.5 * (chosen / chosen.sum(1, keepdims=True) if renormalise else chosen), rtol=1e-5
    )
    load, p = np.bincount(best.ravel(), minlength=6) / 40, scores / scores.sum(1, keepdims=True)
    np.testing.assert_allclose(stats.load, load, rtol=1e-6)
    assert load[0] == 1 and load[3] == 0
    assert float(stats.balance) == pytest.approx(6 * (load * p.mean(0)).sum(), rel=1e-5)
    assert float(stats.entropy) == pytest.approx(-(p * np.log(p)).sum(1).mean() / np.log(6), rel=1e-5)


def test_sigmoids_of_zero_give_finite_weights():
    _, weights, stats = route(jnp.full((3, 4), -1e4), 2, kind="sigmoid")
    assert all(bool(jnp.isfinite(x).all()) for x in (weights, *stats))
