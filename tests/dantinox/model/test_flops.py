"""Parameter and FLOP counts against the model's own arrays and the matrix products of its jaxpr."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import dantinox
from dantinox.config import ModelConfig
from dantinox.inference import prefill
from dantinox.kernels.cost import visible_pairs
from dantinox.model import flops as count
from tests.helpers.jaxpr_walk import dot_flops, matmuls

BASE = ModelConfig(vocab_size=37, dim=24, n_layers=3, n_heads=4, n_kv_heads=2, max_context=50, mlp_ratio=2.5)
CONFIGS = {
    "dense": {},
    "untied gelu": {"tie_embeddings": False, "mlp": "gelu"},
    "experts": {"n_experts": 5, "experts_per_token": 2},
    "shared expert": {"n_experts": 4, "experts_per_token": 4, "shared_expert": True},
    "biases, sinks": {"attn_bias": True, "attn_sinks": True, "n_experts": 4, "moe_bias": True},
    "biases without o": {"attn_bias": True, "attn_out_bias": False},
    "norms after, qk norm over all heads": {"norms": "post", "qk_norm": True, "qk_norm_all_heads": True},
    "norms before and after": {"norms": "both"},
    "dense layers, wide shared expert, selection bias": {
        "n_experts": 4,
        "n_dense_layers": 1,
        "dense_ratio": 5.0,
        "shared_expert": True,
        "shared_ratio": 1.5,
        "selection_bias": True,
        "router": "sigmoid",
    },
    "clamped, dense": {"attn_bias": True, "moe_bias": True, "mlp": "swiglu_clamped"},
    "head gate, qk norm": {"attn_gate": "head", "qk_norm": True},
    "elementwise gate, learned": {"attn_gate": "elementwise", "pos_encoding": "learned", "n_kv_heads": 1},
    "wide heads": {"head_dim": 10, "window": 7, "window_pattern": "SL"},
}


def config(name: str) -> ModelConfig:
    return dataclasses.replace(BASE, **CONFIGS[name])


def shapes(config: ModelConfig) -> nnx.State:
    """The model's parameters, as shapes: nothing is drawn."""
    return nnx.state(nnx.eval_shape(lambda: dantinox.Transformer(config, rngs=nnx.Rngs(0))), nnx.Param)


@pytest.mark.parametrize("name", CONFIGS)
def test_parameter_count_matches_the_model(name):
    leaves = nnx.to_flat_state(shapes(config(name)))
    total = active = 0
    for _, leaf in leaves:
        size = math.prod(leaf.get_value().shape)
        total += size
        # A token uses k of the E slices of an array with an expert axis, and all of a router [M, E] and its bias [E].
        axes = leaf.get_metadata()["axes"]
        sparse = axes[0] == "E" and len(axes) > 1
        active += size * config(name).experts_per_token // config(name).n_experts if sparse else size
    assert count.total_parameters(config(name)) == total
    assert count.active_parameters(config(name)) == active
    if not config(name).n_experts:
        assert total == active


def forward_flops(config: ModelConfig, T: int, backward: bool = False) -> int:
    """FLOPs of the dot_generals in the model's jaxpr, one sequence of T tokens, all pairs computed."""
    graph, state = nnx.split(nnx.eval_shape(lambda: dantinox.Transformer(config, rngs=nnx.Rngs(0))))
    tokens = jax.ShapeDtypeStruct((1, T), jnp.int32)
    run = lambda state, tokens: jnp.sum(nnx.merge(graph, state)(tokens) ** 2)
    jaxpr = jax.make_jaxpr(jax.grad(run) if backward else run)(state, tokens)
    return sum(dot_flops(e) for e in matmuls(jaxpr))


@pytest.mark.parametrize(
    "name", ["dense", "untied gelu", "head gate, qk norm", "elementwise gate, learned", "clamped, dense"]
)
@pytest.mark.sampled(2)
def test_flops_match_the_jaxpr(name):
    T, full = 20, dataclasses.replace(config(name), attn="reference")
    # The reference computes all T * T pairs of which a causal query sees (T + 1) / 2 on average.
    hidden = 4 * full.n_heads * full.resolved_head_dim * full.n_layers * (T * T - visible_pairs(T, T))
    forward = forward_flops(full, T)
    per_token = count.flops_per_token(full, T, training=False)
    assert per_token * T == forward - hidden
    assert forward_flops(full, T, backward=True) == 3 * forward
    assert count.flops_per_token(full, T) * T == 3 * (forward - hidden)


def test_flops_depend_on_windows_and_active_experts():
    T, more = 40, lambda **changes: dataclasses.replace(BASE, **changes)
    flops = lambda **changes: count.flops_per_token(more(**changes), T, training=False)
    pair = 4 * 4 * 6
    mixed = {"window": 5, "window_pattern": "SSL"}
    saved = 2 * pair * (visible_pairs(T, T) - visible_pairs(T, T, window=5)) / T
    assert flops() - flops(**mixed) == pytest.approx(saved)
    # Four times the experts: only the router grows.
    assert flops(n_experts=16) - flops(n_experts=4) == 3 * 2 * 24 * 12
    one, two = (flops(n_experts=4, experts_per_token=k) for k in (1, 2))
    assert two - one == 3 * 2 * 3 * 24 * 60


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8", "fp8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cache_bytes_match_the_kv_caches(dtype, kv_cache_dtype):
    model = dataclasses.replace(BASE, window=8, window_pattern="SL", dtype=dtype, kv_cache_dtype=kv_cache_dtype)
    for context in (1, 5, 8, 30):
        slots = prefill.layer_cache_slots(model, context)
        rings = jax.eval_shape(lambda slots=slots: prefill.init_caches(model, 2, slots))
        full = {1: 8, 5: 8, 8: 8, 30: 32}[context]  # slots come in eights
        assert [ring.k.shape for ring in rings] == [(2, 2, C, 6) for C in (8, full, 8)]
        held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves([ring._replace(length=None) for ring in rings]))
        assert count.kv_cache_bytes(model, context, batch=2) == held
    assert 8 * count.kv_bytes_per_token(model) == count.kv_cache_bytes(model, 8)
