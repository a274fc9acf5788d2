"""The model: what each setting changes, what no setting may change, and the dtype of every matrix product."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dantinox
from bench import numpy_interpreter
from dantinox.config import ModelConfig
from tests.helpers.jaxpr_walk import equations, matmuls

SMALL = ModelConfig(
    vocab_size=23,
    dim=16,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    max_context=64,
    mlp_ratio=2.0,
    attn="xla",
    moe="xla",
)


def small(**changes) -> ModelConfig:
    """A tiny config with the given changes."""
    return dataclasses.replace(SMALL, **changes)


def build(seed: int = 0, **changes) -> dantinox.Transformer:
    return dantinox.Transformer(small(**changes), rngs=nnx.Rngs(seed))


def sharpen(model: dantinox.Transformer, by: float = 20.0) -> dantinox.Transformer:
    """Larger matrices: at its initial 0.02 a tiny attention is so flat that its toggles hardly show."""
    for block in model.blocks:
        for w in (block.attention.q, block.attention.k, block.attention.v, block.attention.o):
            w[...] = w[...] * by
    for path, w in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if path[-1].endswith("_bias"):  # zeros, which would not show either
            w[...] = w[...] + jnp.linspace(-0.5, 0.5, w[...].size).reshape(w[...].shape)
    return model


def text(B: int = 2, T: int = 24, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, SMALL.vocab_size, (B, T)), jnp.int32)


def forward(model: dantinox.Transformer):
    """tokens -> logits, in NumPy: what runs a few times at most is not worth compiling."""
    graph, state = nnx.split(model)
    run = lambda state, tokens: nnx.merge(graph, state)(tokens)
    program = functools.cache(lambda *shape: numpy_interpreter.trace(run, state, text(*shape)))
    return lambda tokens: program(*tokens.shape)(state, tokens)


def loss_of(model: dantinox.Transformer):
    """(loss(state, tokens), state): next-token cross-entropy plus the router's losses."""
    graph, state = nnx.split(model)

    def loss(state, tokens):
        model = nnx.merge(graph, state)
        h, router = model.hidden(tokens[:, :-1])
        log_p = jax.nn.log_softmax(model.logits(h))
        nll = -jnp.mean(jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1))
        return nll if router is None else nll + 0.01 * router.balance + 0.001 * router.z

    return loss, state


TOGGLES = {
    "plain": {},
    "window": {"window": 5},
    "pattern": {"window": 3, "window_pattern": "SSSL", "n_layers": 4},
    "head gate": {"attn_gate": "head"},
    "elementwise gate": {"attn_gate": "elementwise"},
    "qk norm": {"qk_norm": True},
    "attention cap": {"attn_softcap": 1.0},
    "logit cap": {"logit_softcap": 0.01},
    "learned": {"pos_encoding": "learned"},
    "no positions": {"pos_encoding": "none"},
    "ntk": {"rope_scaling": "ntk", "rope_factor": 4.0},
    "linear": {"rope_scaling": "linear", "rope_factor": 4.0},
    "llama3": {"rope_scaling": "llama3", "rope_factor": 4.0},
    "yarn": {"rope_scaling": "yarn", "rope_factor": 4.0},
    "yarn, bounds not rounded": {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_truncate": False},
    "gelu": {"mlp": "gelu"},
    "clamped": {"mlp": "swiglu_clamped"},
    "biases": {"attn_bias": True},
    "biases without o": {"attn_bias": True, "attn_out_bias": False},
    "qk norm over all heads": {"qk_norm": True, "qk_norm_all_heads": True},
    "post-norms": {"norms": "post"},
    "norms before and after": {"norms": "both"},
    "attention scale": {"attn_scale": 1.0},
    "geglu": {"mlp": "geglu"},
    "scaled embeddings": {"scale_embeddings": True},
    "sigmoid router": {"n_experts": 4, "router": "sigmoid", "router_scale": 2.0, "selection_bias": True},
    "weights of experts as they are": {"n_experts": 4, "router_renormalise": False},
    "dense layer before experts": {"n_experts": 4, "n_layers": 2, "n_dense_layers": 1, "dense_ratio": 3.0},
    "wide shared expert": {"n_experts": 4, "shared_expert": True, "shared_ratio": 5.0},
    "rope pattern": {"rope_pattern": "N"},
    "rope of windows": {"window": 5, "rope_theta_windowed": 7.0},
    "sinks": {"attn_sinks": True},
    "experts, clamped, biases": {"n_experts": 4, "mlp": "swiglu_clamped", "moe_bias": True, "shared_expert": True},
    "experts": {"n_experts": 4},
    "shared expert": {"n_experts": 4, "shared_expert": True},
    "untied": {"tie_embeddings": False},
    "multi-query": {"n_kv_heads": 1},
    "bfloat16": {"dtype": "bfloat16"},
}


UNSEEN = ("plain", "multi-query", "geglu")  # for gates as small as here, GELU is SiLU


@functools.cache
def outputs(name: str) -> tuple[jax.Array, jax.Array]:
    """Logits of one text, and of the same with token 15 changed."""
    run, tokens = forward(sharpen(build(**({"n_layers": 1} | TOGGLES[name])))), text()
    return run(tokens), run(tokens.at[:, 15].set((tokens[:, 15] + 1) % 23))


@pytest.mark.parametrize("name", TOGGLES)
@pytest.mark.sampled(4)
def test_output_does_not_depend_on_later_tokens(name):
    logits, changed = outputs(name)
    assert logits.dtype == jnp.float32 and logits.shape == (2, 24, 23) and bool(jnp.isfinite(logits).all())
    np.testing.assert_array_equal(logits[:, :15], changed[:, :15])
    assert all(np.any(logits[:, t] != changed[:, t]) for t in (15, 16))


@pytest.mark.parametrize(
    ("W", "L", "pattern", "reach"), [(4, 2, "S", 6), (1, 2, "S", 0), (3, 3, "S", 6), (3, 4, "SSSL", None)]
)
def test_windows_limit_the_receptive_field(W, L, pattern, reach):
    """Through L windowed layers the first token reaches L (W - 1) tokens on, exactly; one full layer lifts that."""
    run, tokens = forward(sharpen(build(window=W, n_layers=L, window_pattern=pattern))), text(B=1)
    moved = jnp.any(run(tokens) != run(tokens.at[0, 0].set((tokens[0, 0] + 1) % 23)), axis=-1)[0]
    felt = int(np.flatnonzero(moved).max())
    assert felt == reach if reach is not None else felt > 6


@pytest.mark.parametrize("name", [name for name in TOGGLES if name not in UNSEEN])
def test_model_setting_changes_the_output(name):
    assert float(jnp.max(jnp.abs(outputs("plain")[0] - outputs(name)[0]))) > 1e-5


def test_pattern_without_windows_equals_full_attention():
    run = lambda **changes: forward(sharpen(build(**changes)))(text())
    full = run()
    np.testing.assert_array_equal(full, run(window=3, window_pattern="L"))
    np.testing.assert_allclose(full, run(window=64), rtol=1e-5, atol=1e-5)
    assert np.any(full != run(window=3, window_pattern="SL"))


def test_zero_gate_logits_halve_the_attention_output():
    model, plain = sharpen(build(attn_gate="head")), sharpen(build())
    for block, other in zip(model.blocks, plain.blocks, strict=True):
        block.attention_norm[...] = other.attention_norm[...] = jnp.ones(16)
        for name in ("q", "k", "v", "o"):
            getattr(block.attention, name)[...] = getattr(other.attention, name)[...]
        for name in ("gate", "up", "down"):
            getattr(block.mlp, name)[...] = getattr(other.mlp, name)[...]
        block.attention.gate[...] = jnp.zeros_like(block.attention.gate[...])
    model.token_embedding[...] = plain.token_embedding[...]
    for block in plain.blocks:
        block.attention.o[...] = block.attention.o[...] / 2
    # Gate logits of zero halve the attention branch.
    np.testing.assert_allclose(forward(model)(text()), forward(plain)(text()), rtol=1e-4, atol=1e-5)


def test_only_pos_encoding_none_ignores_token_order():
    tokens = text(B=1)
    swapped = tokens.at[0, :8].set(tokens[0, :8][::-1])
    for positions in ("none", "rope", "learned"):
        # One layer: with more, a causal mask alone tells order.
        run = forward(sharpen(build(pos_encoding=positions, n_layers=1)))
        same = np.allclose(run(tokens)[0, -1], run(swapped)[0, -1], atol=1e-5)
        assert same == (positions == "none"), positions


def test_logit_softcap_bounds_logits():
    model = build(logit_softcap=0.05, n_layers=1)
    model.token_embedding[...] = model.token_embedding[...] * 100
    logits = forward(model)(text())
    assert 0.04 < float(jnp.max(jnp.abs(logits))) <= 0.05 * (1 + 1e-6)


def test_tied_embeddings_share_one_array():
    tied, untied = build(n_layers=1), build(n_layers=1, tie_embeddings=False)
    count = lambda model: sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert count(untied) - count(tied) == 23 * 16
    assert tied.lm_head is None
    loss, state = loss_of(tied)
    # A token that is never read still gets a gradient, through the logits.
    tokens = text() % 10
    gradient = jax.jit(jax.grad(loss))(state, tokens)["token_embedding"][...]
    assert np.all(np.any(np.asarray(gradient)[10:] != 0, axis=1))
    # The one array is both: a row that is never read moves its own logit only.
    before = forward(tied)(tokens)
    tied.token_embedding[...] = tied.token_embedding[...].at[20].mul(3.0)
    after = forward(tied)(tokens)
    np.testing.assert_allclose(after[..., 20], 3 * before[..., 20], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(np.delete(after, 20, -1), np.delete(before, 20, -1))


def test_dropout_is_active_only_with_a_key():
    model, plain, tokens = build(dropout=0.5, n_layers=1), build(dropout=0.0, n_layers=1), text()
    hidden = nnx.jit(lambda model, key: model.hidden(tokens, key=key)[0])
    still = hidden(plain, None)
    np.testing.assert_array_equal(hidden(model, None), still)
    np.testing.assert_array_equal(hidden(plain, jax.random.key(0)), still)
    a, again, b = (hidden(model, jax.random.key(n)) for n in (0, 0, 1))
    np.testing.assert_array_equal(a, again)
    assert np.any(a != b) and np.any(a != still)


@functools.cache
def trained(remat: str, changes: tuple) -> tuple[tuple, int]:
    """((loss, gradients), how many remat equations the gradient holds)."""
    loss, state = loss_of(build(remat=remat, n_layers=1, **dict(changes)))
    traced = jax.jit(jax.value_and_grad(loss)).trace(state, text())
    marks = sum("remat" in e.primitive.name or "checkpoint" in e.primitive.name for e in equations(traced.jaxpr))
    return numpy_interpreter.run(jax.value_and_grad(loss), state, text()), marks


@pytest.mark.parametrize("remat", ["block", "dots"])
@pytest.mark.parametrize("changes", [{"window": 4, "attn_gate": "head"}, {"n_experts": 4}], ids=["dense", "experts"])
@pytest.mark.sampled(4)
def test_remat_does_not_change_loss_or_gradients(changes, remat):
    """Fault 5: gradient checkpointing is a flag without effect. Here the gradient holds remat equations."""
    (plain, marks), (remade, more) = (trained(kind, tuple(changes.items())) for kind in ("none", remat))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(remade), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert more > marks


def test_remat_saves_memory():
    """Fault 5: gradient checkpointing is a flag without effect. Here it saves memory, by XLA's own count."""

    def saved(remat: str) -> int:
        loss, state = loss_of(build(remat=remat, n_layers=4, dim=32))
        return jax.jit(jax.grad(loss)).lower(state, text(8, 64)).compile().memory_analysis().temp_size_in_bytes

    assert saved("block") < 0.7 * saved("none")


NARROW = {
    "dense": ({}, 32),
    "experts": ({"n_experts": 4, "shared_expert": True}, 32),
    "gpt-oss": ({"n_experts": 4, "mlp": "swiglu_clamped", "moe_bias": True, "attn_bias": True, "attn_sinks": True}, 32),
    "windowed": ({"window": 8, "attn_gate": "elementwise", "qk_norm": True, "attn_softcap": 5.0}, 128),
    "long": ({}, 1200),
    "long, a window that hardly limits": ({"window": 1000}, 1200),
    "gelu, untied": ({"mlp": "gelu", "tie_embeddings": False, "logit_softcap": 5.0, "attn_gate": "head"}, 32),
    "learned": ({"pos_encoding": "learned", "remat": "dots"}, 32),
}


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize("name", NARROW)
@pytest.mark.sampled(16)
def test_every_matmul_runs_in_bfloat16(name, backward):
    """Fault 6: with bfloat16 asked for, matrix products still run in float32."""
    changes, T = NARROW[name]
    model = build(dtype="bfloat16", **changes)
    assert {x.dtype for x in jax.tree.leaves(nnx.state(model, nnx.Param))} == {jnp.dtype("float32")}
    loss, state = loss_of(model)
    jaxpr = jax.make_jaxpr(jax.grad(loss) if backward else loss)(state, text(1, T + 1))
    products = matmuls(jaxpr)
    assert len(products) >= SMALL.n_layers * 8
    wide = [e for e in products if any(v.aval.dtype != jnp.bfloat16 for v in e.invars[:2])]
    shown = sorted({" x ".join(str(v.aval) for v in e.invars[:2]) for e in wide})
    assert not wide, f"{len(wide)} of {len(products)} products have wider operands: {shown}"
    if backward:
        assert {x.dtype for x in jax.tree.leaves(jax.eval_shape(jax.grad(loss), state, text(1, T + 1)))} == {
            jnp.dtype("float32")
        }


def test_initial_weights_have_the_specified_std():
    model = build(
        dim=128, n_layers=8, vocab_size=500, attn_gate="elementwise", tie_embeddings=False, mlp_ratio=4.0, qk_norm=True
    )
    for path, w in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        w, name = np.asarray(w[...]), path[-1]
        if w.ndim == 1:
            assert np.all(w == 1), path
            continue
        planned = 0.02 / 4 if name in ("o", "down") else 0.02  # sqrt(2 * 8 layers) = 4
        assert w.std() == pytest.approx(planned, rel=0.1), path
        assert abs(w.mean()) < 6 * planned / w.size**0.5, path


def test_initial_weights_depend_only_on_the_seed():
    leaves = [jax.tree.leaves(nnx.state(build(seed), nnx.Param)) for seed in (0, 0, 1)]
    assert all(np.array_equal(a, b) for a, b in zip(*leaves[:2], strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(leaves[0], leaves[2], strict=True) if a.ndim > 1)
    matrices = [x for x in leaves[0] if x.ndim > 1]
    assert len({x.tobytes() for x in map(np.asarray, matrices)}) == len(matrices), "two parameters share a draw"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_experts": 4, "shared_expert": True},
        {"pos_encoding": "learned", "tie_embeddings": False, "attn_gate": "head"},
        {"n_experts": 4, "attn_bias": True, "attn_sinks": True, "moe_bias": True},
    ],
)
def test_every_parameter_names_its_axes(changes):
    sizes = {"V": 23, "M": 16, "H": 4, "K": 2, "D": 4, "F": 32, "E": 4, "T": 64}
    for path, w in nnx.to_flat_state(nnx.state(build(**changes, qk_norm=True), nnx.Param)):
        axes = w.get_metadata()["axes"]
        assert len(axes) == w[...].ndim and set(axes) <= set("BTSHKGDCNMFEkVLW"), path
        for axis, size in zip(axes, w[...].shape, strict=True):
            assert size == sizes[axis] or (path[-1] == "gate" and axis == "D" and size == 1), (path, axes)


@pytest.mark.parametrize(
    "tokens",
    [np.zeros(3, np.int32), np.zeros((1, 2, 3), np.int32), np.zeros((1, 3)), np.zeros((1, 3), bool)],
    ids=["[T]", "[1,2,3]", "float", "bool"],
)
def test_tokens_of_wrong_shape_or_dtype_raise(tokens):
    """Fault 15: wrong shapes give raw errors of JAX."""
    with pytest.raises(ValueError, match=r"tokens are .*allowed") as refusal:
        build()(tokens)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("bad", [-1, 23, 2**31 - 1])
def test_token_ids_out_of_range_raise(bad):
    """Fault 15: ids out of range give NaN, or another token's logits where XLA clamps."""
    tokens = np.array([[1, bad, 2]], np.int32)
    for given in (tokens, jnp.asarray(tokens)):
        with pytest.raises(ValueError, match=rf"^tokens contain id {bad}; allowed: 0 to 22$"):
            build(n_layers=1)(given)


def test_learned_positions_past_max_context_raise():
    model = build(pos_encoding="learned")
    assert model(text(T=64)).shape == (2, 64, 23)
    with pytest.raises(ValueError, match=r"65.*max_context 64"):
        model(text(T=65))


@pytest.mark.parametrize("changes", [{"logit_softcap": 0.2}, {"tie_embeddings": False}], ids=str)
def test_token_losses_are_those_of_the_logits(changes):
    """Values and gradients, where some targets are negative."""
    graph, state = nnx.split(build(**changes))
    tokens, targets = text(2, 7), jnp.where(jnp.arange(7) % 3 == 1, -1, text(2, 7, seed=1))

    def from_logits(state):
        logp = jax.nn.log_softmax(nnx.merge(graph, state)(tokens))
        return jnp.where(targets < 0, 0, -jnp.take_along_axis(logp, jnp.maximum(targets, 0)[..., None], -1)[..., 0])

    def without_logits(state):
        model = nnx.merge(graph, state)
        return model.token_losses(model.hidden(tokens)[0], targets)

    def run(losses, state, dout):
        o, pull = jax.vjp(losses, state)
        return o, pull(dout)[0]

    dout = jnp.linspace(-1, 1, 14).reshape(2, 7)
    expected, got = (jax.jit(functools.partial(run, f))(state, dout) for f in (from_logits, without_logits))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), got, expected)


def test_token_losses_of_bfloat16_are_float32():
    model = build(dtype="bfloat16")
    losses = jax.eval_shape(lambda tokens: model.token_losses(model.hidden(tokens)[0], tokens), text())
    assert (losses.dtype, losses.shape) == (jnp.float32, (2, 24))
