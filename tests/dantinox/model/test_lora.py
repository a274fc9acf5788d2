"""LoRA: products added to weights, their gradients, frozen weights, optimizer state, meshes by `test_meshes.py`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dantinox import ConfigError, Transformer
from dantinox.checkpoint.train_state import TrainState
from dantinox.config import Config
from dantinox.model import lora
from dantinox.model.params import abstract_params, param_axes, split_params
from dantinox.training.optimizer import make_optimizer
from dantinox.training.train_step import compute_loss, make_train_step

SIZES = {
    "vocab_size": 31, "dim": 12, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 4, "window": 5,
    "max_context": 16, "seq_len": 8, "batch_size": 4, "dtype": "float32", "attn_gate": "elementwise",
    "lora_rank": 3, "lora_alpha": 12.0, "lr": 0.01, "warmup_ratio": 0.0, "attn": "xla", "moe": "xla",
}  # fmt: skip
DENSE, SPARSE = SIZES, SIZES | {"n_experts": 3, "experts_per_token": 2, "shared_expert": True}
RNG = np.random.default_rng(0)
INPUTS, TARGETS = (RNG.integers(0, 31, (4, 8)).astype(np.int32) for _ in range(2))


def make(settings):
    """Return (config, definition, parameters with random factors)."""
    config = Config().replace(**settings)
    model_def, shapes = abstract_params(config.model)
    _, params = split_params(Transformer(config.model, rngs=nnx.Rngs(0)))
    factors = {name: x for name, x in shapes.items() if name not in params}
    drawn = lora.init_factors(factors, jax.random.key(1))
    assert all(not np.any(x) for name, x in drawn.items() if name.endswith("_b"))
    drawn = {name: jnp.asarray(RNG.normal(size=x.shape) * 0.3, jnp.float32) for name, x in drawn.items()}
    return config, model_def, params | drawn


def weights_by_loops(params, scale):
    """Add the products of the factors, one output at a time."""
    merged = {name: np.array(x, np.float64) for name, x in params.items() if ".lora_" not in name}
    for name in [name for name in params if name.endswith(".lora_a")]:
        w = merged[name.removesuffix(".lora_a")]
        a, b = (np.asarray(params[name[:-1] + letter], np.float64) for letter in "ab")
        stacks = range(w.shape[0]) if b.ndim > 2 and b.shape[1] == 3 and "mlp" in name else [...]
        for e in stacks:
            inputs = a[e].reshape(-1, 3)
            outputs = b[e].reshape(3, -1)
            w[e] = (w[e].reshape(len(inputs), -1) + scale * inputs @ outputs).reshape(w[e].shape)
    return merged


@pytest.mark.parametrize("settings", [DENSE, SPARSE], ids=["dense", "experts"])
def test_model_has_the_merged_weights(settings):
    config, model_def, params = make(settings)
    targets = {name.removesuffix(".lora_a").split(".", 2)[2] for name in params if name.endswith(".lora_a")}
    of_mlp = {"mlp.gate", "mlp.up", "mlp.down"}
    shared = {"mlp.shared.gate", "mlp.shared.up", "mlp.shared.down"} if config.model.n_experts else set()
    assert targets == {f"attention.{name}" for name in ("q", "k", "v", "o", "gate")} | of_mlp | shared
    expected = weights_by_loops(params, 12 / 3)
    merged = split_params(model_def.merge(params))[1]
    assert merged.keys() == expected.keys()
    for name, x in merged.items():
        np.testing.assert_allclose(x, expected[name], atol=2e-6, err_msg=name)


def test_fresh_factors_change_nothing():
    config, model_def, params = make(DENSE)
    plain = {name: x for name, x in params.items() if ".lora_" not in name}
    _, shapes = abstract_params(config.model)
    fresh = lora.init_factors({name: x for name, x in shapes.items() if name not in plain}, jax.random.key(1))
    for name, x in split_params(model_def.merge(plain | fresh))[1].items():
        np.testing.assert_array_equal(x, plain[name], err_msg=name)
    for name, x in fresh.items():
        if name.endswith("_a"):
            inputs = 16 if name.endswith("attention.o.lora_a") else 12 if "down" not in name else 48
            assert 0.6 < np.std(x) * inputs**0.5 < 1.5, (name, np.std(x))


@pytest.mark.parametrize("settings", [DENSE, pytest.param(SPARSE, marks=pytest.mark.slow)], ids=["dense", "experts"])
def test_training_changes_the_factors_by_their_gradients_alone(settings):
    config, model_def, params = make(settings | {"optimizer": "adamw", "weight_decay": 0.0, "grad_clip": 0.0})
    trained, frozen = lora.split_trained(params)
    optimizer = make_optimizer(config.optim, 1)
    state = TrainState(params, optimizer.init(trained))
    assert {x.shape for x in jax.tree.leaves(state.opt_state)} <= {(), *(x.shape for x in trained.values())}
    step = make_train_step(model_def, config, optimizer)
    before = {name: np.array(x) for name, x in params.items()}
    state, metrics = step(state, INPUTS[None], TARGETS[None], jnp.int32(0))
    assert np.isfinite(metrics["loss"]) and metrics["finite"]

    # The gradient of the merged weights, projected on the factors.
    plain = dataclasses.replace(model_def, lora_scale=1.0)
    weights = {name: jnp.asarray(x, jnp.float32) for name, x in weights_by_loops(before, 4.0).items()}
    dw = jax.grad(lambda weights: compute_loss(plain, config, weights, INPUTS, TARGETS, None)[0])(weights)
    for name, x in state.params.items():
        if name in frozen:
            np.testing.assert_array_equal(x, before[name], err_msg=name)
    grads = jax.grad(lambda t: compute_loss(model_def, config, before | t, INPUTS, TARGETS, None)[0])(
        {name: jnp.asarray(before[name]) for name in trained}
    )
    name = "blocks.1.attention.o"
    g, b = (np.asarray(x, np.float64) for x in (dw[name], before[f"{name}.lora_b"]))
    np.testing.assert_allclose(grads[f"{name}.lora_a"], 4 * np.einsum("hdm,rm->hdr", g, b), atol=1e-6)
    name = "blocks.0.mlp.down"
    g, a = (np.asarray(x, np.float64) for x in (dw[name], before[f"{name}.lora_a"]))
    np.testing.assert_allclose(grads[f"{name}.lora_b"], 4 * np.einsum("...fm,...fr->...rm", g, a), atol=1e-6)
    for name, grad in grads.items():  # the first step of Adam is the sign of the gradient
        large = np.abs(grad) > 1e-5
        moved = np.asarray(state.params[name]) - before[name]
        np.testing.assert_allclose(moved[large], -0.01 * np.sign(grad)[large], rtol=2e-3, err_msg=name)


def test_targets_choose_the_weights():
    config = Config().replace(**DENSE | {"lora_targets": "q,v"})
    names = {name for name in param_axes(config.model) if ".lora_" in name}
    assert names == {f"blocks.{i}.attention.{w}.lora_{f}" for i in (0, 1) for w in "qv" for f in "ab"}
    assert not any(".lora_" in name for name in param_axes(Config().model))


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"lora_rank": -1}, r"lora_rank is -1; allowed: 0 \(no LoRA\) or more"),
        ({"lora_alpha": 0.0}, "lora_alpha is 0.0; it must be positive"),
        ({"lora_targets": "q,w"}, "lora_targets is 'q,w'; allowed: some of q,k,v,o,gate,up,down"),
        ({"lora_targets": "q,q"}, "lora_targets is 'q,q'; allowed"),
        ({"lora_targets": ""}, "lora_targets is ''; allowed"),
    ],
)
def test_invalid_settings_are_named(setting, said):
    with pytest.raises(ConfigError, match=said):
        Config().replace(**setting)
