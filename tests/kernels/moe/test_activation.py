"""Biases of the experts and the clamped SwiGLU, against loops in NumPy float64 and the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dantinox import kernels
from dantinox.kernels import workloads
from tests.helpers import cases, tolerance

IMPLEMENTATIONS = tolerance.runnable_implementations("moe_mlp")
CLAMPED = ("swiglu_clamped", 1.25, 1.702)  # a limit that many gates of these sizes exceed
BIASES = ("b_gate", "b_up", "b_down")
NONE = np.int32([[0, -1], [4, 9], [2, 0], [-7, 4], [1, 1], [0, 2], [4, 1], [2, -1]])  # with ids of no expert


def draw(N: int, M: int, F: int, E: int, k: int, biases: tuple[str, ...] = BIASES, skew: str = "uniform"):
    row = cases.make_workload(workloads.MoE, N=N, M=M, F=F, E=E, k=k, skew=skew)
    inputs, aux, dout = cases.draw(row)
    for name in ("w_gate", "w_up"):
        inputs[name] /= np.sqrt(M)
    inputs["w_down"] /= np.sqrt(F)
    rng = np.random.default_rng(5)
    widths = {"b_gate": F, "b_up": F, "b_down": M}
    inputs |= {name: rng.standard_normal((E, width)) for name, width in widths.items() if name in biases}
    return inputs, aux, dout


def options(activation) -> tolerance.Options:
    return () if activation == "swiglu" else (("activation", activation),)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def by_hand(inputs: dict[str, np.ndarray], ids: np.ndarray, dout: np.ndarray, activation) -> dict[str, np.ndarray]:
    """The output and every gradient, one choice at a time, by formulas."""
    x, E = inputs["x"], inputs["w_gate"].shape[0]
    got = {"o": np.zeros_like(x)} | {f"d{name}": np.zeros_like(value) for name, value in inputs.items()}
    for n, j in np.ndindex(*ids.shape):
        if not 0 <= (e := ids[n, j]) < E:
            continue
        w_gate, w_up, w_down = (inputs[name][e] for name in ("w_gate", "w_up", "w_down"))
        b_gate, b_up, b_down = (inputs[name][e] if name in inputs else 0 for name in BIASES)
        p, dy = inputs["expert_weights"][n, j], dout[n]
        gate, up = x[n] @ w_gate + b_gate, x[n] @ w_up + b_up
        if activation == "swiglu":
            s = sigmoid(gate)
            act, act_gate, act_up = gate * s * up, up * s * (1 + gate * (1 - s)), gate * s
        else:
            _, limit, alpha = activation
            g, u = np.minimum(gate, limit), np.clip(up, -limit, limit)
            s = sigmoid(alpha * g)
            act = g * s * (u + 1)
            act_gate = (gate <= limit) * (u + 1) * s * (1 + alpha * g * (1 - s))
            act_up = (np.abs(up) <= limit) * g * s
        output, dh = act @ w_down + b_down, p * (w_down @ dy)
        dgate, dup = dh * act_gate, dh * act_up
        got["o"][n] += p * output
        got["dx"][n] += w_gate @ dgate + w_up @ dup
        got["dexpert_weights"][n, j] += dy @ output
        terms = {"dw_gate": np.outer(x[n], dgate), "dw_up": np.outer(x[n], dup), "dw_down": np.outer(act, p * dy)}
        terms |= {"db_gate": dgate, "db_up": dup, "db_down": p * dy}
        for name, term in terms.items():
            if name in got:
                got[name][e] += term
    return got


@pytest.mark.parametrize("activation", ["swiglu", CLAMPED], ids=["swiglu", "clamped"])
@pytest.mark.parametrize("biases", [BIASES, ("b_gate",), ("b_up",), ("b_down",), ()], ids=lambda names: "+".join(names))
@pytest.mark.sampled(32)
def test_reference_matches_numpy(biases, activation):
    inputs, _, dout = draw(len(NONE), 5, 7, 4, 2, biases)
    with jax.enable_x64(True):
        got = tolerance.program("moe_mlp", "reference", options(activation))(inputs, {"expert_ids": NONE}, dout)
    expected = by_hand(inputs, NONE, dout, activation)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-11, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("activation", ["swiglu", CLAMPED], ids=["swiglu", "clamped"])
@pytest.mark.sampled(2)
def test_output_and_gradients_match_numpy(activation, implementation):
    """Every variant of the kernels, over several blocks of columns, with ids of no expert; few rows and many."""
    run = tolerance.program("moe_mlp", implementation, options(activation))
    for ids in (NONE[:4], np.tile(NONE, (5, 1))):
        inputs, _, dout = draw(len(ids), 10, 300, 4, 2)
        expected = by_hand(inputs, ids, dout, activation)
        narrow = {name: np.float32(x) for name, x in inputs.items()}
        for form, evaluate in tolerance.kernel_variants(implementation, run).items():
            got = evaluate(narrow, {"expert_ids": ids}, np.float32(dout))
            for name, value in expected.items():
                scale = np.abs(value).max()
                np.testing.assert_allclose(got[name], value, rtol=1e-4, atol=1e-5 * scale, err_msg=f"{form}: {name}")


SIZES = {
    "1 row": (1, 1, 1, 1, 1),
    "7 rows": (7, 5, 3, 3, 2),
    "127 rows": (127, 17, 33, 5, 2),
    "129 rows": (129, 16, 24, 4, 1),
    "one expert": (70, 16, 12, 6, 2, BIASES, "one"),
    "empty experts": (70, 16, 12, 6, 2, BIASES, "empty"),
    "b_gate alone": (33, 8, 12, 3, 2, ("b_gate",)),
    "b_up alone": (33, 8, 12, 3, 2, ("b_up",)),
    "b_down alone": (33, 8, 12, 3, 2, ("b_down",)),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("activation", ["swiglu", CLAMPED], ids=["swiglu", "clamped"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.sampled(128)
def test_implementation_matches_reference(sizes, activation, dtype, implementation):
    inputs, aux, dout = draw(*sizes)
    tolerance.assert_matches_reference(
        "moe_mlp",
        implementation,
        inputs,
        dout,
        dtype,
        aux=aux,
        keep_float32=("expert_weights",),
        options=options(activation),
    )


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
@pytest.mark.parametrize("activation", ["swiglu", CLAMPED], ids=["swiglu", "clamped"])
@pytest.mark.sampled(4)
def test_values_that_no_choice_names(activation, implementation):
    """An idle expert's matrices and biases, tokens without an expert, weights of ids without an expert."""
    ids = np.tile(np.where(NONE == 1, 0, NONE), (3, 1))
    inputs, _, dout = draw(len(ids), 8, 12, 4, 2)
    idle, is_none = np.isin(np.arange(4), ids, invert=True), (ids < 0) | (ids >= 4)
    assert list(idle) == [False, True, False, True]
    alone = is_none.all(1)[:, None]
    run = tolerance.program("moe_mlp", implementation, options(activation))
    for form, evaluate in tolerance.kernel_variants(implementation, run).items():
        results = []
        for fill in (0, np.nan, np.inf):
            filled = {"x": np.where(alone, fill, inputs["x"])}
            filled["expert_weights"] = np.where(is_none, fill, inputs["expert_weights"])
            for name in inputs.keys() - filled.keys():
                mask = idle.reshape(-1, *[1] * (inputs[name].ndim - 1))
                filled[name] = np.where(mask, fill, inputs[name])
            filled = {name: np.float32(value) for name, value in filled.items()}
            results.append(evaluate(filled, {"expert_ids": ids}, np.float32(np.where(alone, fill, dout))))
        for poisoned in results[1:]:
            tolerance.assert_bit_equal(results[0], poisoned)
        got = {name: np.asarray(value) for name, value in results[0].items()}
        assert not np.any(got["o"] * alone) and not np.any(got["dexpert_weights"] * is_none), form
        for name in BIASES:
            assert np.any(got[f"d{name}"]) and not np.any(got[f"d{name}"][idle]), f"{form}: {name}"


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
@pytest.mark.parametrize("fill", [np.nan, np.inf], ids=str)
def test_nan_reaches_its_tokens_and_experts_only(fill, implementation):
    ids = np.tile(NONE, (3, 1))
    inputs, _, dout = draw(len(ids), 8, 12, 4, 2)
    inputs, dout = {name: np.float32(x) for name, x in inputs.items()}, np.float32(dout)
    tokens, experts = np.arange(len(ids)), np.arange(4)
    run = tolerance.program("moe_mlp", implementation, options(CLAMPED))
    changes = {name: (ids != 1).all(1) for name in BIASES} | {"x": tokens != 0}
    for form, evaluate in tolerance.kernel_variants(implementation, run).items():
        before = evaluate(inputs, {"expert_ids": ids}, dout)
        for changed, kept_tokens in changes.items():
            where = (tokens == 0) if changed == "x" else (experts == 1)
            others = inputs | {changed: np.where(where[:, None], np.float32(fill), inputs[changed])}
            after = evaluate(others, {"expert_ids": ids}, dout)
            kept_experts = experts != (0 if changed == "x" else 1)
            rows = {name: kept_experts if name[1:3] in ("w_", "b_") else kept_tokens for name in before}
            kept = [{name: np.asarray(x)[rows[name]] for name, x in r.items()} for r in (before, after)]
            tolerance.assert_bit_equal(*kept)
            if np.isnan(fill):  # a clamp may take an infinity away
                assert not np.isfinite(np.asarray(after["o"])[~kept_tokens]).all(), f"{form}: {changed}"


def test_derivative_of_clamp_at_its_limit():
    """1 at the limit, 0 beyond it: of gates and up projections of the limit and of the numbers beside it."""
    limit = np.float32(0.5)
    x = np.stack([np.nextafter(limit, np.float32(to)) for to in (0, 1)] + [limit, -limit, -np.float32(0.75)])[:, None]
    one = np.ones((1, 1, 1), np.float32)
    ids, weights = np.zeros((len(x), 1), np.int32), np.ones((len(x), 1), np.float32)

    def f(g, u, implementation):  # gate and up alone depend on g and u
        inputs = {"w_gate": one, "w_up": one, "w_down": one, "expert_ids": ids, "expert_weights": weights}
        tokens = jnp.concatenate([g, u], axis=1)
        inputs |= {"w_gate": np.float32([[[1], [0]]]), "w_up": np.float32([[[0], [1]]]), "w_down": np.ones((1, 1, 2))}
        inputs["w_down"] = np.float32(inputs["w_down"])
        y = kernels.moe_mlp(tokens, **inputs, activation=("swiglu_clamped", 0.5, 1.0), implementation=implementation)
        return jnp.sum(y[:, 0])

    for implementation in ("reference", *IMPLEMENTATIONS):
        dg, du = jax.grad(f, argnums=(0, 1))(jnp.asarray(x), jnp.asarray(x), implementation)
        assert list(np.asarray(dg[:, 0]) != 0) == [True, False, True, True, True], implementation
        assert list(np.asarray(du[:, 0]) != 0) == [True, False, True, True, False], implementation


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.sampled(2)
def test_two_runs_are_bit_equal(implementation):
    inputs, aux, dout = draw(300, 16, 24, 4, 2)
    arguments = {name: np.float32(x) for name, x in inputs.items()}, aux, np.float32(dout)
    run = tolerance.program("moe_mlp", implementation, options(CLAMPED))
    tolerance.assert_bit_equal(run(*arguments), run(*arguments))


@pytest.mark.parametrize(
    "implementation",
    IMPLEMENTATIONS,
)
@pytest.mark.slow
def test_transformations(implementation):
    """vmap, remat and shard_map with its default, and float64 and ranks that do not promote."""
    inputs, aux, dout = draw(16, 8, 12, 3, 2)
    inputs, dout = {name: jnp.float32(x) for name, x in inputs.items()}, jnp.float32(dout)
    ids = jnp.asarray(aux["expert_ids"])

    def loss(inputs, ids, dout):
        y = kernels.moe_mlp(**inputs, expert_ids=ids, activation=CLAMPED, implementation=implementation)
        return jnp.sum(y * dout)

    with jax.numpy_rank_promotion("raise"):
        expected = jax.jit(jax.grad(loss))(inputs, ids, dout)
        by_remat = jax.jit(jax.grad(jax.checkpoint(loss)))(inputs, ids, dout)
        tokens = {"x", "expert_weights"}
        axes = {name: 0 if name in tokens else None for name in inputs}
        halves = {name: x.reshape(2, 8, -1) if name in tokens else x for name, x in inputs.items()}
        grads = jax.vmap(jax.grad(loss), in_axes=(axes, 0, 0))
        by_vmap = jax.jit(grads)(halves, ids.reshape(2, 8, -1), dout.reshape(2, 8, -1))
        mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        specs = {name: P("data") if name in tokens else P() for name in inputs}
        sharded = jax.shard_map(jax.grad(loss), mesh=mesh, in_specs=(specs, P("data"), P("data")), out_specs=specs)
        by_shards = jax.jit(sharded)(inputs, ids, dout)
    for name, value in expected.items():
        scale = float(jnp.abs(value).max())
        from_vmap = by_vmap[name].reshape(value.shape) if name in tokens else by_vmap[name].sum(0)
        for other in (by_remat[name], from_vmap, by_shards[name]):
            np.testing.assert_allclose(other, value, rtol=1e-5, atol=1e-5 * scale, err_msg=name)


@pytest.mark.slow
def test_second_derivative_of_xla_matches_reference():
    inputs, aux, dout = draw(33, 5, 4, 3, 2)
    narrow = {name: jnp.float32(x) for name, x in inputs.items()}

    def of_first_derivatives(inputs, implementation):
        f = functools.partial(kernels.moe_mlp, **aux, activation=CLAMPED, implementation=implementation)
        y, pull = jax.vjp(lambda inputs: f(**inputs), inputs)
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves((y, pull(jnp.float32(dout)))))

    expected, got = (jax.jit(jax.grad(of_first_derivatives), static_argnums=1)(narrow, i) for i in ("reference", "xla"))
    for name, value in got.items():
        scale = float(jnp.abs(expected[name]).max())
        np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-5 * scale, err_msg=name)


@pytest.mark.parametrize("implementation", ["reference", "xla", "auto"])
def test_no_hidden_features_leave_the_bias(implementation):
    inputs, aux, _ = draw(3, 4, 1, 2, 1)
    inputs = {name: np.float32(x) for name, x in inputs.items()}
    inputs |= {"w_gate": np.zeros((2, 4, 0), np.float32), "w_down": np.zeros((2, 0, 4), np.float32)}
    inputs |= {"w_up": inputs["w_gate"], "b_gate": np.zeros((2, 0), np.float32), "b_up": np.zeros((2, 0), np.float32)}
    y = kernels.moe_mlp(**inputs, **aux, implementation=implementation)
    expected = inputs["expert_weights"] * inputs["b_down"][aux["expert_ids"][:, 0]]
    np.testing.assert_allclose(y, expected, rtol=1e-6)


WRONG = {
    "relu": {"activation": "relu"},
    "no alpha": {"activation": ("swiglu_clamped", 7.0)},
    "negative limit": {"activation": ("swiglu_clamped", -7.0, 1.702)},
    "infinite limit": {"activation": ("swiglu_clamped", np.inf, 1.702)},
    "alpha 0": {"activation": ("swiglu_clamped", 7.0, 0)},
    "bias of one expert": {"b_up": np.ones((1, 3), np.float32)},
    "bias of another width": {"b_down": np.ones((2, 3), np.float32)},
    "bias of another dtype": {"b_gate": np.ones((2, 3), np.float16)},
    "bias without an axis of experts": {"b_gate": np.ones(3, np.float32)},
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_bad_arguments_raise_one_line(wrong):
    inputs, aux, _ = draw(3, 4, 3, 2, 1)
    narrow = {name: np.float32(x) for name, x in inputs.items()} | wrong
    ((name, _),) = wrong.items()
    with pytest.raises(ValueError, match=rf"^{name} (is|has) .*; allowed: .*") as error:
        kernels.moe_mlp(**narrow, **aux)
    assert "\n" not in str(error.value)


def test_custom_implementation_without_options(monkeypatch):
    monkeypatch.setattr("dantinox.kernels.registry._registered", {})
    inputs, aux, _ = draw(3, 4, 3, 2, 1)
    narrow = {name: np.float32(x) for name, x in inputs.items()}

    def mine(x, w_gate, w_up, w_down, expert_ids, expert_weights):
        return x

    kernels.register("moe_mlp", "mine", mine)
    with pytest.raises(NotImplementedError, match=r"takes no b_\w+; implementation='xla' runs here"):
        kernels.moe_mlp(**narrow, **aux, implementation="mine")
