"""Attention that returns the log-sum-exp of its scores, the merge of two parts of the keys, and sinks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dantinox import kernels
from dantinox.kernels import registry
from dantinox.kernels.dispatch import target_device
from tests.helpers import cases, tolerance

IMPLEMENTATIONS = tolerance.runnable_implementations("attention")
EVERYWHERE = ["reference", *IMPLEMENTATIONS, "pallas on TPU"]
CASES = {
    "window, gate per head": cases.attention(40, 70, H=4, window=20, gate="head"),
    "queries without a key": cases.attention(9, 5, H=2, K=1, D=3, Dv=5, gate="elementwise", softcap=2.0),
    "banded": cases.attention(140, 140, H=2, K=1, window=20),
    "full, segments": cases.attention(33, 70, B=2, segments="unmatched", causal=False),
    "all keys in the second part": cases.attention(12, 7, B=2, K=1),
}


def draw(case, dtype=jnp.float32):
    """(arguments by name, segment ids or None, random cotangents of o and lse)."""
    inputs, aux, do = cases.draw(case)
    dlse = np.random.default_rng(2).standard_normal((case.B, case.T, case.H))
    arguments = {name: jnp.asarray(x, dtype) for name, x in inputs.items()}
    return arguments, aux.get("segment_ids"), (jnp.asarray(do, dtype), jnp.float32(dlse))


def run(implementation, f, *args):
    """Run f(implementation, *args); Pallas for TPUs in the NumPy evaluator."""
    if implementation != "pallas on TPU":
        return jax.jit(f, static_argnums=0)(implementation, *args)
    from bench import numpy_interpreter

    with target_device("tpu", "TPU v6 lite"):
        return numpy_interpreter.run(lambda *args: f("pallas", *args), *args)


def with_finite_lse(out):
    """Rows without a key have an lse of -inf, which no sum of results may contain."""
    return out[0], jnp.where(out[1] > -jnp.inf, out[1], 0), out[1] == -jnp.inf


def results(implementation, case, f, dtype=jnp.float32):
    """(o, lse, where it is -inf) of f(implementation, arguments by name, ids), and the gradients of the arguments."""
    arguments, ids, cotangent = draw(case, dtype)

    def run_both(implementation, arguments):
        outputs, pull, is_inf = jax.vjp(
            lambda arguments: (lambda o, lse, is_inf: ((o, lse), is_inf))(
                *with_finite_lse(f(implementation, arguments, ids))
            ),
            arguments,
            has_aux=True,
        )
        return *outputs, is_inf, pull(cotangent)[0]

    return run(implementation, run_both, arguments)


def call(case):
    def attention(implementation, arguments, ids):
        return kernels.attention(
            **arguments, **case.options(), segment_ids=ids, return_lse=True, implementation=implementation
        )

    return attention


def assert_close(actual, expected):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=3e-5, atol=3e-6)


@pytest.mark.parametrize("name", [*list(CASES)[:4]])
@pytest.mark.parametrize("implementation", EVERYWHERE)
@pytest.mark.sampled(12)
def test_lse_and_its_gradients(implementation, name):
    case = CASES[name]

    def by_formula(_, arguments, ids):
        q, k = (arguments[each].astype(jnp.float32) for each in "qk")
        k = jnp.repeat(k, case.H // case.K, axis=2)
        scores = jnp.einsum("bthd,bshd->bths", q, k) * case.D**-0.5
        if case.softcap is not None:
            scores = case.softcap * jnp.tanh(scores / case.softcap)
        distance = jnp.arange(case.T)[:, None] + case.S - case.T - jnp.arange(case.S)
        mask = (distance >= 0) | (not case.causal)
        mask &= distance < (case.window or case.S + case.T)
        mask = jnp.broadcast_to(mask[None, :, None], scores.shape)
        if ids is not None:
            mask &= ids[0][:, :, None, None] == ids[1][:, None, None]
        sees_key = jnp.any(mask, axis=-1)
        lse = jax.nn.logsumexp(jnp.where(mask, scores, -1e30), axis=-1)
        o = kernels.attention(**arguments, **case.options(), segment_ids=ids, implementation="reference")
        return o, jnp.where(sees_key, lse, -jnp.inf)

    assert_close(results(implementation, case, call(case)), results("reference", case, by_formula))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.sampled(2)
def test_lse_of_16_bits_is_float32(implementation, dtype):
    case = CASES["banded"]
    (o, lse, _, _), (_, expected, _, _) = (results(each, case, call(case), dtype) for each in (implementation, "xla"))
    assert o.dtype == dtype and lse.dtype == jnp.float32
    np.testing.assert_allclose(lse, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["queries without a key", "full, segments", "all keys in the second part"])
@pytest.mark.parametrize("implementation", EVERYWHERE)
@pytest.mark.sampled(6)
def test_merge_of_two_parts_equals_the_whole(implementation, name):
    case = CASES[name]

    def merged(implementation, arguments, ids):
        # A query's position counts from the last key: in the first part that is S - half tokens earlier.
        half = case.S // 2
        mask_first = (
            ids if ids is not None else (jnp.zeros((case.B, case.T), jnp.int32), jnp.zeros((case.B, case.S), jnp.int32))
        )
        q_ids, kv_ids = mask_first
        parts = []
        for keys in (slice(0, half), slice(half, case.S)):
            hidden = jnp.ones((case.B, case.S), bool).at[:, keys].set(False)
            part_ids = (q_ids, jnp.where(hidden, -7, kv_ids))
            parts.append(call(case)(implementation, arguments, part_ids))
        (o_a, lse_a), (o_b, lse_b) = parts
        return kernels.merge_attention(o_a, lse_a, o_b, lse_b)

    assert_close(results(implementation, case, merged), results("reference", case, call(case)))


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
@pytest.mark.sampled(2)
def test_sinks_that_are_nothing_and_sinks_that_are_all(implementation):
    case = CASES["queries without a key"]
    arguments, ids, _ = draw(case)
    plain, lse = call(case)(implementation, arguments, ids)
    nothing, same_lse = call(case)(implementation, arguments | {"sinks": jnp.full(case.H, -jnp.inf)}, ids)
    np.testing.assert_allclose(nothing, plain, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(same_lse, lse, rtol=1e-6)
    everything, large = call(case)(implementation, arguments | {"sinks": jnp.full(case.H, 200.0)}, ids)
    np.testing.assert_array_equal(everything, jnp.zeros_like(plain))
    np.testing.assert_array_equal(large, jnp.full_like(lse, 200.0))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_sinks_of_minus_infinity_have_no_gradient(implementation):
    case = CASES["queries without a key"]
    arguments, ids, (do, _) = draw(case)
    sinks = jnp.full(case.H, -jnp.inf)

    def loss(sinks, q):
        o = kernels.attention(
            **arguments | {"sinks": sinks, "q": q}, **case.options(), segment_ids=ids, implementation=implementation
        )
        return jnp.sum(o * do)

    dsinks, dq = jax.jit(jax.grad(loss, (0, 1)))(sinks, arguments["q"])
    np.testing.assert_array_equal(dsinks, 0)
    assert np.isfinite(dq).all()


def test_merge_is_the_same_in_either_order_and_checks_its_arguments():
    o, lse = jnp.ones((1, 3, 2, 4)), jnp.arange(6.0).reshape(1, 3, 2)
    other = -2 * o, lse[:, ::-1] - 3
    tolerance.assert_bit_equal(
        dict(enumerate(kernels.merge_attention(o, lse, *other))),
        dict(enumerate(kernels.merge_attention(*other, o, lse))),
    )
    for bad, words in (
        ((o, lse[..., :1], o, lse), "lse_a has shape"),
        ((o, lse, o[..., :2], lse), "o_b has shape"),
        ((o, lse, o.astype(jnp.bfloat16), lse), "o_b has dtype bfloat16"),
        ((o[0], lse, o, lse), "o_a has shape"),
    ):
        with pytest.raises(ValueError, match=words):
            kernels.merge_attention(*bad)


def test_bad_sinks_and_flags_are_refused():
    q = jnp.ones((1, 3, 2, 4))
    for options, words in (
        ({"sinks": jnp.ones(3)}, r"sinks has shape \(3,\); allowed: \(2,\)"),
        ({"sinks": jnp.ones((1, 2))}, "sinks has shape"),
        ({"sinks": jnp.ones(2, jnp.int32)}, "sinks has dtype int32; allowed: float32$"),
        ({"sinks": jnp.ones(2, jnp.bfloat16)}, "sinks has dtype bfloat16; allowed: float32$"),
        ({"return_lse": 1}, "return_lse is 1; allowed: True or False"),
    ):
        with pytest.raises(ValueError, match=words):
            kernels.attention(q, q, q, **options)


@pytest.mark.parametrize("op", ["attention", "decode_attention"])
def test_sinks_are_float32_or_of_the_dtype_of_the_queries(op):
    q = jnp.ones((1, 2, 4), jnp.bfloat16)
    if op == "attention":
        call = functools.partial(kernels.attention, q[:, None], q[:, None], q[:, None])
    else:
        call = functools.partial(kernels.decode_attention, q, q, q, kernels.KVCache.zeros(1, 2, 8, 4, jnp.bfloat16))
    outputs = [jax.tree.leaves(call(sinks=jnp.ones(2, dtype)))[0] for dtype in (jnp.float32, jnp.bfloat16)]
    np.testing.assert_array_equal(*(np.float32(o) for o in outputs))
    with pytest.raises(ValueError, match="sinks has dtype float16; allowed: float32 or bfloat16, the dtype of q"):
        call(sinks=jnp.ones(2, jnp.float16))


def test_kernels_from_elsewhere_get_one_head_dim_and_are_refused_without_lse(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})
    seen = []

    def without_lse(q, k, v, *, gate, causal, window, scale, softcap, segment_ids):
        seen.append(v.shape)
        return kernels.attention(q, k, v, gate=gate, causal=causal, window=window, scale=scale, implementation="xla")

    def swallows(q, k, v, **options):
        return q

    kernels.register("attention", "without_lse", without_lse)
    kernels.register("attention", "swallows", swallows)
    q, v = jnp.ones((1, 3, 2, 4)), jnp.ones((1, 3, 2, 2))
    o = kernels.attention(q, q, v, implementation="without_lse")
    assert o.shape == v.shape and seen == [q.shape]
    np.testing.assert_allclose(o, kernels.attention(q, q, v, implementation="reference"), rtol=1e-6)
    for name in ("without_lse", "swallows"):
        for options in ({"return_lse": True}, {"sinks": jnp.zeros(2)}):
            with pytest.raises(NotImplementedError, match="return_lse"):
                kernels.attention(q, q, q, **options, implementation=name)


@pytest.mark.parametrize("sizes", [(0, 3, 2, 4, 4), (3, 0, 2, 4, 4), (3, 3, 2, 0, 4), (3, 3, 2, 4, 0), (3, 3, 2, 0, 0)])
@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
def test_empty_arrays(implementation, sizes):
    T, S, H, D, Dv = sizes
    q, k, v = jnp.ones((1, T, H, D)), jnp.ones((1, S, H, D)), jnp.ones((1, S, H, Dv))
    o, lse = kernels.attention(q, k, v, causal=False, return_lse=True, implementation=implementation)
    assert o.shape == (1, T, H, Dv) and lse.shape == (1, T, H)
    np.testing.assert_array_equal(o, 1.0 if S else 0.0)
    np.testing.assert_allclose(lse, np.log(S) + D**0.5 if S else -np.inf, rtol=1e-6)


def test_vmap_and_remat_without_rank_promotion():
    case = CASES["window, gate per head"]
    arguments, _, _ = draw(case)
    arguments["sinks"] = jnp.linspace(-1.0, 1.0, case.H)

    def loss(arguments, implementation):
        o, lse = call(case)(implementation, arguments, None)
        return jnp.sum(o**2) + jnp.sum(lse)

    for implementation in ["reference", *IMPLEMENTATIONS]:
        grad = jax.grad(jax.checkpoint(lambda a, i=implementation: loss(a, i)))
        stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), arguments)
        batched = jax.jit(jax.vmap(grad))(stacked)
        for n in range(2):
            with jax.numpy_rank_promotion("raise"):
                alone = jax.jit(grad)(jax.tree.map(lambda x, n=n: x[n], stacked))
            assert_close(jax.tree.map(lambda x, n=n: x[n], batched), alone)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_under_strict_dtype_promotion(implementation):
    """With float32 sinks and log-sum-exps; two halves of the keys merge to the whole."""
    arguments, _, _ = draw(cases.attention(9, 12, H=4, K=2), jnp.bfloat16)
    q, k, v = (arguments[name] for name in "qkv")
    sinks = jnp.linspace(-1, 1, 4, dtype=jnp.float32)
    f = functools.partial(kernels.attention, causal=False, return_lse=True, implementation=implementation)
    with jax.numpy_dtype_promotion("strict"):
        whole = f(q, k, v, sinks=sinks)
        merged = kernels.merge_attention(*f(q, k[:, :5], v[:, :5], sinks=sinks), *f(q, k[:, 5:], v[:, 5:]))
    for a, b in zip(merged, whole, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=2e-2, atol=2e-2)
