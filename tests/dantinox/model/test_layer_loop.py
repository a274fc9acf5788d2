"""A model whose blocks run as a loop computes what it computes without one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dantinox import Transformer
from dantinox.config import Config
from dantinox.kernels.dispatch import target_device
from dantinox.model import layer_loop

TINY = {"vocab_size": 50, "dim": 32, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "window": 5, "max_context": 16}


AFMOE = {"n_experts": 4, "n_layers": 8, "n_dense_layers": 1, "rope_pattern": "RN", "norms": "both", "router": "sigmoid"}


@pytest.mark.parametrize(
    "features",
    [
        pytest.param({}, id="dense", marks=pytest.mark.slow),
        pytest.param({"n_experts": 4}, id="experts"),
        pytest.param(AFMOE, id="first layers dense", marks=pytest.mark.slow),
    ],
)
def test_loop_over_the_patterns_of_layers_equals_repeated_blocks(monkeypatch, features):
    settings = {"window_pattern": "SL", "dropout": 0.1, "remat": "block", "seq_len": 16} | features
    config = Config().replace(**TINY | settings).model
    graph, weights = nnx.split(Transformer(config, rngs=nnx.Rngs(0)))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 50, (2, 16)), jnp.int32)

    def loss(weights):
        h, stats = nnx.merge(graph, weights).hidden(tokens, key=jax.random.key(1))
        return jnp.sum(h**2) + (0 if stats is None else stats.balance + stats.load[2, 1])

    repeated = jax.jit(jax.value_and_grad(loss))(weights)
    monkeypatch.setattr(layer_loop, "runs_as_loop", lambda config: True)
    looped = jax.jit(jax.value_and_grad(lambda weights: loss(weights)))
    assert "while" in looped.lower(weights).as_text()
    for a, b in zip(jax.tree.leaves(looped(weights)), jax.tree.leaves(repeated), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_loop_is_for_deep_models_whose_weights_a_mesh_cuts(monkeypatch):
    deep = Config().replace(n_layers=16, window=64, window_pattern="SSSL").model
    with target_device("tpu", "TPU v6 lite"):
        assert not layer_loop.runs_as_loop(deep)  # one device
        monkeypatch.setattr(layer_loop.collectives, "cuts_weights", lambda: True)
        assert layer_loop.runs_as_loop(deep)
        for layers in (12, 18):  # three repeats; a rest
            assert not layer_loop.runs_as_loop(
                Config().replace(n_layers=layers, window=64, window_pattern="SSSL").model
            )
    assert not layer_loop.runs_as_loop(deep)  # a CPU
