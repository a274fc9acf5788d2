"""One training step: accumulation, meshes, auxiliary losses, dropout, schedules."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from dantinox import Transformer
from dantinox.checkpoint.train_state import TrainState
from dantinox.config import Config, OptimConfig
from dantinox.model import moe
from dantinox.model.params import abstract_params, param_axes, split_params
from dantinox.training.optimizer import make_optimizer, make_schedule, muon_dimension_numbers
from dantinox.training.train_step import compute_loss, make_eval_step, make_train_step, mean_over_targets

ROOT = Path(__file__).parents[3]
TINY = {"vocab_size": 50, "dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "window": 5, "max_context": 16}
BIASED = {"attn_bias": True, "attn_sinks": True, "moe_bias": True}
RUN = {"seq_len": 16, "batch_size": 8, "steps": 10, "lr": 1e-2}


def build(**settings):
    config = Config().replace(**{**TINY, **RUN, **settings})
    model_def, params = split_params(Transformer(config.model, rngs=nnx.Rngs(0)))
    optimizer = make_optimizer(config.optim, config.train.steps)
    return config, model_def, TrainState(params, optimizer.init(params)), make_train_step(model_def, config, optimizer)


def batch(config, seed=0):
    t = config.train
    rng = np.random.default_rng(seed)
    shape = (t.grad_accum, t.batch_size // t.grad_accum, t.seq_len)
    return tuple(rng.integers(0, config.model.vocab_size, shape, dtype=np.int32) for _ in range(2))


def largest_difference(a, b):
    return max(float(jnp.abs(x - y).max()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize(
    "pieces", [pytest.param(2, marks=pytest.mark.slow), 4, pytest.param(8, marks=pytest.mark.slow)]
)
def test_micro_batches_equal_one_large_batch(pieces):
    whole, _, start, step = build()
    x, y = batch(whole)
    one, parts = step(start, x, y, jnp.int32(0))
    _, _, start, step = build(grad_accum=pieces)
    cut = [a.reshape(pieces, -1, a.shape[-1]) for a in (x, y)]
    many, parts_many = step(start, *cut, jnp.int32(0))
    assert abs(parts["loss"] - parts_many["loss"]) < 1e-6
    assert abs(parts["grad_norm"] - parts_many["grad_norm"]) < 1e-6 * float(parts["grad_norm"])
    # Adam divides by the gradient's size, so compare the moments: they are linear in the gradient.
    assert largest_difference(one.opt_state[1][0].mu, many.opt_state[1][0].mu) < 1e-6


def test_loss_decreases_and_old_state_is_donated():
    """Fault 7: the state is copied at each step."""
    config, _, current, step = build(steps=60)
    x, y = batch(config)
    before = current
    losses = []
    for i in range(60):
        current, parts = step(current, x, y, jnp.int32(i))
        losses.append(float(parts["loss"]))
    assert abs(losses[0] - np.log(50)) < 0.3
    assert losses[-1] < 0.5 * losses[0]
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.params))


def test_negative_targets_do_not_affect_the_mean():
    losses, targets = np.float32([[1, 2, 0], [0, 5, 9]]), np.int32([[0, 3, -1], [-100, 2, 7]])
    assert mean_over_targets(losses, targets) == pytest.approx(17 / 4)
    assert mean_over_targets(losses, targets, 34) == pytest.approx(0.5)
    assert mean_over_targets(np.zeros((2, 3), np.float32), np.full((2, 3), -1)) == 0


def test_padding_does_not_affect_loss_in_any_micro_batch_split():
    config, model_def, start, _ = build(n_layers=1, window=None, pos_encoding="none", attn="reference")
    x, y = batch(config)
    y[0, 1:3] = -1
    y[0, 5, 4:] = -7
    whole = losses(model_def, config)(start.params, x[0], y[0], None)[0]
    _, _, start, step = build(n_layers=1, window=None, pos_encoding="none", attn="reference", grad_accum=4)
    _, parts = step(start, *(a.reshape(4, -1, a.shape[-1]) for a in (x, y)), jnp.int32(0))
    assert parts["loss"] == pytest.approx(float(whole), rel=1e-6)


def test_ema_weights_follow_the_formula():
    config, _, start, step = build(n_layers=1, window=None, pos_encoding="none", attn="reference", ema_decay=0.5)
    current = TrainState(start.params, start.opt_state, jax.tree.map(jnp.copy, start.params))
    average = {name: np.float64(value) for name, value in start.params.items()}
    for i in range(8):
        current, _ = step(current, *batch(config, seed=i), jnp.int32(i))
        decay = min(0.5, (1 + i) / (10 + i))
        average = {name: decay * average[name] + (1 - decay) * np.float64(current.params[name]) for name in average}
    assert largest_difference(current.ema, average) < 1e-6 < largest_difference(current.ema, current.params)
    assert current.weights is current.ema and TrainState(current.params, None).weights is current.params


@pytest.mark.parametrize(
    "name", ["adamw", *(pytest.param(name, marks=pytest.mark.slow) for name in ("lion", "adafactor")), "muon"]
)
def test_optimizer_descends_and_decays_only_matrices(name):
    _, shapes = abstract_params(Config().replace(**TINY | RUN | {"n_layers": 1, "n_experts": 4} | BIASED).model)
    draw = np.random.default_rng(0)
    goal = {key: jnp.asarray(draw.standard_normal(shape.shape), jnp.float32) for key, shape in shapes.items()}
    optimizer = make_optimizer(
        OptimConfig(optimizer=name, lr=0.02, schedule="constant", warmup_ratio=0.0, grad_clip=0.0), 100
    )
    distance = lambda params: sum(jnp.sum((params[key] - goal[key]) ** 2) for key in goal)

    @jax.jit
    def step(params, moments, slope):
        updates, moments = optimizer.update(
            jax.tree.map(lambda g: g * slope, jax.grad(distance)(params)), moments, params
        )
        return optax.apply_updates(params, updates), moments

    params = jax.tree.map(jnp.zeros_like, goal)
    moments = optimizer.init(params)
    start = distance(params)
    for _ in range(20):
        params, moments = step(params, moments, 1.0)
    assert distance(params) < 0.9 * start
    still, _ = step(goal, optimizer.init(goal), 0.0)  # no gradient: only the decay is left
    moved = {key for key in goal if (still[key] != goal[key]).any()}
    matrices = {key for key in goal if goal[key].ndim > 1 and not key.endswith("_bias")}
    assert moved == matrices  # with muon the embedding, which goes by Adam, too
    for key in moved:
        np.testing.assert_allclose(still[key], goal[key] * (1 - 0.02 * 0.1), rtol=1e-5)


def test_muon_reduction_axes_match_the_matmul_axes():
    config = Config().replace(
        **TINY | RUN | BIASED,
        n_experts=4,
        shared_expert=True,
        attn_gate="elementwise",
        tie_embeddings=False,
        qk_norm=True,
    )
    _, shapes = abstract_params(config.model)
    numbers, letters = muon_dimension_numbers(shapes), param_axes(config.model)
    assert numbers.keys() == letters.keys()
    for name, axes in letters.items():
        if numbers[name] is None:
            assert not name.startswith("blocks.") or len(axes) == 1 or name.endswith("_bias"), name
            continue
        takes, makes = (np.atleast_1d(numbers[name].reduction_axis), np.atleast_1d(numbers[name].output_axis))
        summed = {"o": "HD", "down": "F"}.get(name.split(".")[-1], "M")
        assert "".join(axes[i] for i in takes) == summed, name
        assert sorted([*takes, *makes]) == [i for i, axis in enumerate(axes) if axis != "E" or name.endswith("router")]


def test_router_metrics_are_reported_per_layer():
    config, model_def, start, _ = build(
        n_experts=4, window=None, pos_encoding="none", attn="reference", moe="reference"
    )
    x, y = (a[0] for a in batch(config))
    lopsided = start.params["blocks.1.mlp.router"] * 0
    params = start.params | {"blocks.1.mlp.router": lopsided}  # equal logits: top_k takes experts 0 and 1
    _, parts = losses(model_def, config)(params, x, y, None)
    assert 1 < parts["router/load_max.0"] < 2 and 0 < parts["router/load_min.0"] < 1
    assert (parts["router/load_max.1"], parts["router/load_min.1"]) == (2, 0)
    assert parts["router/entropy.0"] < 1 and parts["router/entropy.1"] == pytest.approx(1, abs=1e-5)
    assert parts["router/dropped.0"] == parts["router/dropped.1"] == 0
    ids = jnp.zeros((8, 4)).at[:, 3].set(5.0)
    served = moe.route(ids, 2)[2]
    lost = moe.router_metrics(moe.mean_over_layers([served._replace(load=served.load.at[3].set(0))]), 2)
    assert lost["router/dropped.0"] == 0.5  # a slot of each token that no expert served would be seen


def losses(model_def, config):
    return jax.jit(lambda *args: compute_loss(model_def, config, *args))


def test_router_loss_coefficients_affect_training_loss_only():
    """Fault 3: the balance coefficient is ignored in the loss, or the validation loss holds the router's losses."""
    config, model_def, start, _ = build(n_experts=4, router_aux_loss_coef=0.0, router_z_loss_coef=0.0)
    x, y = (a[0] for a in batch(config))
    bare, parts = losses(model_def, config)(start.params, x, y, None)
    assert bare == parts["loss"]
    both = config.replace(router_aux_loss_coef=0.5, router_z_loss_coef=0.25)
    total, parts = losses(model_def, both)(start.params, x, y, None)
    assert abs(total - (parts["loss"] + 0.5 * parts["balance"] + 0.25 * parts["router_z"])) < 1e-6
    assert parts["balance"] > 1 and parts["router_z"] > 0
    assert abs(make_eval_step(model_def, both)(start.params, x, y) - parts["loss"]) < 1e-6


def test_dropout_is_active_in_training_only_and_depends_on_the_step():
    """Fault 4: dropout stays on in validation."""
    config, model_def, start, _ = build(dropout=0.5)
    x, y = (a[0] for a in batch(config))
    evaluate = make_eval_step(model_def, config)
    assert evaluate(start.params, x, y) == evaluate(start.params, x, y)
    still = losses(model_def, config)(start.params, x, y, None)[0]
    keys = [jax.random.key(0), jax.random.key(1), jax.random.key(0)]
    first, second, again = (losses(model_def, config)(start.params, x, y, key)[0] for key in keys)
    assert first == again != second
    assert abs(evaluate(start.params, x, y) - still) < 1e-6 and first != still


def test_weight_decay_skips_norm_scales():
    _, model_def, start, _ = build()
    optimizer = make_optimizer(OptimConfig(lr=0.1, warmup_ratio=0.0, weight_decay=1.0, schedule="constant"), 10)
    zero = jax.tree.map(jnp.zeros_like, start.params)
    updates, _ = optimizer.update(zero, optimizer.init(start.params), start.params)
    moved = {name for name, update in updates.items() if float(jnp.abs(update).max()) > 0}
    assert moved == {name for name in model_def.names if "norm" not in name}


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
def test_learning_rate_follows_the_schedule(kind):
    rate = make_schedule(OptimConfig(lr=1.0, schedule=kind, warmup_ratio=0.1, min_lr_ratio=0.1), 100)
    values = [float(rate(i)) for i in range(100)]
    assert values[0] == pytest.approx(0.1) and values[9] == pytest.approx(1.0)
    assert values[10] == pytest.approx(1.0) and max(values) <= 1.0 + 1e-6
    assert values[99] == pytest.approx({"cosine": 0.1, "wsd": 0.15, "constant": 1.0}[kind], abs=0.06)
    if kind == "wsd":
        assert values[80] == pytest.approx(1.0)
    assert all(float(make_schedule(OptimConfig(), n)(0)) > 0 for n in (1, 2, 3, 19, 21))


def test_grad_clip_bounds_the_update():
    config, _, start, step = build(grad_clip=1e-3)
    x, y = batch(config)
    _, parts = step(start, x, y, jnp.int32(0))
    assert parts["grad_norm"] > 1e-3  # what is reported is the norm before clipping
    grads = {"w": jnp.full((3, 3), 10.0)}
    clipped, _ = optax.clip_by_global_norm(1e-3).update(grads, optax.EmptyState())
    assert optax.tree.norm(clipped) == pytest.approx(1e-3, rel=1e-4)


def test_split_and_merge_params_round_trip():
    config, model_def, start, _ = build(n_experts=4, qk_norm=True, attn_gate="elementwise", tie_embeddings=False)
    model = model_def.merge(start.params)
    tokens = jnp.arange(12).reshape(1, 12)
    direct = Transformer(config.model, rngs=nnx.Rngs(0))(tokens)
    assert (model(tokens) == direct).all()
    assert split_params(model)[1].keys() == start.params.keys() == set(param_axes(config.model))
    assert hash(model_def) == hash(abstract_params(config.model)[0])


def test_selection_biases_move_against_the_load_and_by_nothing_else():
    """The optimizer, its weight decay and the gradient leave them alone; two micro-batches count as one batch."""
    rate = 0.25
    settings = {"n_experts": 4, "router": "sigmoid", "selection_bias": True, "selection_bias_rate": rate}
    config, model_def, start, step = build(
        **settings, n_layers=2, n_dense_layers=1, mlp_ratio=1.0, grad_accum=2, weight_decay=1.0, attn="xla", moe="xla"
    )
    name = "blocks.1.mlp.selection_bias"
    params = start.params | {name: jnp.float32([0.7, 0.1, -0.3, 0.2])}
    before = np.asarray(params[name])
    inputs, targets = batch(config)
    _, stats = model_def.merge(params).hidden(inputs.reshape(-1, inputs.shape[-1]))
    load = np.asarray(stats.load)
    assert load.shape == (1, 4) and load.sum() == pytest.approx(2) and load[0, 0] > 0.9
    _, gradients = jax.value_and_grad(lambda p: compute_loss(model_def, config, p, inputs[0], targets[0], None)[0])(
        params
    )
    assert not gradients[name].any()
    after, metrics = step(start._replace(params=params), inputs, targets, jnp.int32(0))
    np.testing.assert_allclose(after.params[name], before + rate * np.sign(0.5 - load[0]), rtol=1e-6)
    assert "load" not in metrics and "router/load_max.1" in metrics and "router/load_max.0" not in metrics
