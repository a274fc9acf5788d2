"""The model, its training step, scoring and generation under JAX's switches: none changes a dtype or a shape."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dantinox
from dantinox.checkpoint.train_state import TrainState
from dantinox.config import Config
from dantinox.inference import decoding, prefill, scoring
from dantinox.inference.sampling import Sampling
from dantinox.model.params import split_params
from dantinox.training.optimizer import make_optimizer
from dantinox.training.train_step import make_train_step

SWITCHES: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "x64": lambda: jax.enable_x64(True),
    "rank promotion raises": lambda: jax.numpy_rank_promotion("raise"),
    "strict dtype promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "explicit mesh": lambda: jax.set_mesh(jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "rotary, gated, bfloat16": {
        "dtype": "bfloat16",
        "kv_cache_dtype": "int8",
        "attn_gate": "head",
        "qk_norm": True,
        "attn_softcap": 20.0,
        "logit_softcap": 30.0,
        "dropout": 0.1,
        "n_experts": 4,
        "experts_per_token": 2,
        "shared_expert": True,
    },
    "sinks, biases, clamped": {
        "dtype": "bfloat16",
        "attn_sinks": True,
        "attn_bias": True,
        "n_experts": 4,
        "mlp": "swiglu_clamped",
        "moe_bias": True,
        "shared_expert": True,
    },
    "learned, float32": {"pos_encoding": "learned", "mlp": "gelu", "tie_embeddings": True, "attn_gate": "elementwise"},
}
SIZES = {"vocab_size": 23, "dim": 16, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "window": 5, "max_context": 64}
TRAINING = {"seq_len": 8, "batch_size": 4, "grad_accum": 2, "steps": 10, "ema_decay": 0.9}
B, T = 2, 8
TOKENS = np.arange(B * T, dtype=np.int32).reshape(B, T) % SIZES["vocab_size"]


class Programs:
    """The compiled programs of one model, as functions of arrays."""

    def __init__(self, name: str) -> None:
        xla = {"attn": "xla", "moe": "xla", "decode": "xla"}
        self.config = Config().replace(**SIZES, **TRAINING, **xla, **SETTINGS[name])
        self.model = dantinox.Transformer(self.config.model, rngs=nnx.Rngs(0))
        self.graph, self.weights = nnx.split(self.model)
        self.definition, params = split_params(self.model)
        self.optimizer = make_optimizer(self.config.optim, self.config.train.steps)
        self.state = TrainState(params, self.optimizer.init(params), params)

    def train(self) -> Any:
        tokens = TOKENS[:, None]  # two micro-batches
        step = make_train_step(self.definition, self.config, self.optimizer)
        return jax.eval_shape(step, self.state, tokens, tokens, jnp.int32(0))

    def score(self) -> Any:
        score = functools.partial(scoring._negative_log_probs, self.graph)
        return jax.eval_shape(score, self.weights, TOKENS, TOKENS)

    def generate(self) -> Any:
        """Two chunks of prefill and the decode loop."""
        slots = prefill.layer_cache_slots(self.config.model, SIZES["max_context"])
        length, seen = np.array([11, 3], np.int32), np.zeros((B, SIZES["vocab_size"]), bool)
        sampling, stop = Sampling.create(1.0, 5, 0.9, 0.1, 1.1), np.full(16, -1, np.int32)

        def run(weights: Any, tokens: jax.Array) -> Any:
            first = decoding.prefill_chunk(self.graph, slots, 0, weights, tokens, np.int32(0), length, None)
            state = decoding.prefill_chunk(self.graph, slots, T, weights, tokens, np.int32(T), length, first)
            samples = np.arange(2, dtype=np.int32)
            arguments = state.last, np.uint32(0), samples, state.caches, jnp.asarray(seen), sampling, stop
            state, _ = decoding.start(self.graph, weights, *arguments)
            return decoding.decode_chunk(self.graph, weights, state, sampling, stop, np.int32(3))

        return jax.eval_shape(run, self.weights, TOKENS)


programs = functools.cache(Programs)


def types(tree: Any) -> Any:
    return jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)


@functools.cache
def default_types(name: str, program: str) -> Any:
    return types(getattr(programs(name), program)())


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("program", ["train", "score", "generate"])
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.sampled(18)
def test_no_switch_changes_the_types_of_a_program(name, program, switch):
    """A switch that a program does not take raises where it is traced."""
    expected = default_types(name, program)
    with SWITCHES[switch]():
        found = types(getattr(programs(name), program)())
    if switch == "x64":  # metrics that count may be wider
        expected, found = expected[0] if program == "train" else expected, found[0] if program == "train" else found
    assert found == expected


@pytest.mark.slow
def test_nothing_in_generation_or_training_is_nan_or_infinite():
    name = "rotary, gated, bfloat16"
    with jax.debug_nans(True), jax.debug_infs(True):
        built = programs(name)
        tokens = TOKENS[:, None]
        step = make_train_step(built.definition, built.config, built.optimizer)
        state, metrics = step(jax.tree.map(jnp.copy, built.state), tokens, tokens, jnp.int32(0))
        assert np.isfinite(metrics["loss"]) and state.params.keys() == built.state.params.keys()
        assert len(dantinox.generate(built.model, [[1, 2, 3]], max_new_tokens=2, top_k=5)[0]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_model_runs_without_jit(name):
    built = programs(name)
    expected = built.model(TOKENS)
    with jax.disable_jit():
        np.testing.assert_allclose(built.model(TOKENS), expected, rtol=2e-2, atol=2e-2)
