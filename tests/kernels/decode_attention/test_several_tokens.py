"""Several new tokens per sequence at once: the same as one after another, as attention over all, and as never drafted.

The values themselves are compared with Python loops in `test_decode_attention.py`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from bench import numpy_interpreter
from bench.verification.fast_compile import jit_fast_compile
from dantinox import kernels
from dantinox.kernels import dispatch, registry
from dantinox.kernels.ops.decode_attention.kv_cache import quantize
from tests.helpers import tolerance

FORMS = ("reference", "xla", "pallas for a CPU", "pallas for a TPU")
B, H, K, D = 3, 4, 2, 8
Tokens = dict[str, np.ndarray]


def draw_tokens(T: int, gate: str = "none", seed: int = 0) -> Tokens:
    rng = np.random.default_rng(seed)
    widths = {"q": (H, D), "k": (K, D), "v": (K, D)} | {"elementwise": {"gate": (H, D)}, "head": {"gate": (H, 1)}}.get(
        gate, {}
    )
    return {name: rng.standard_normal((B, T, *shape)).astype(np.float32) for name, shape in widths.items()}


def draw_cache(C: int, lengths: list[int], dtype: str = "float32") -> kernels.KVCache:
    """A cache whose slots without a token hold NaN, if its dtype has one."""
    rng, rings = np.random.default_rng(1), []
    held = np.arange(C) < np.array(lengths)[:, None]
    for _ in "kv":
        values, scales = quantize(jnp.float32(rng.standard_normal((B, K, C, D))), dtype)
        if scales is None:
            rings.append((jnp.where(held[:, None, :, None], values, np.nan), None))
        else:
            rings.append((values, jnp.where(held[:, None], scales, np.nan)))
    return kernels.KVCache(rings[0][0], rings[1][0], jnp.int32(lengths), rings[0][1], rings[1][1])


def decode(form: str, tokens: Tokens, cache: kernels.KVCache, **options: Any) -> tuple[np.ndarray, kernels.KVCache]:
    """Runs without compiling anything; the length is traced, as under `jit`."""
    implementation, _, device = form.partition(" for a ")
    run = lambda tokens, cache: kernels.decode_attention(
        **tokens, cache=cache, **options, implementation=implementation
    )
    with dispatch.target_device(*tolerance.INTERPRETED_DEVICES[device or "CPU"]), np.errstate(all="ignore"):
        return numpy_interpreter.run(run, tokens, cache)


def token(tokens: Tokens, t: int) -> Tokens:
    return {name: x[:, t] for name, x in tokens.items()}


def assert_same_cache(a: kernels.KVCache, b: kernels.KVCache) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize("dtype", ["float32", "int8", "float8_e4m3fn"])
@pytest.mark.parametrize(
    ("T", "C", "lengths", "options"),
    [
        (2, 8, [0, 3, 6], {"gate": "head", "softcap": 2.0}),
        (5, 16, [0, 13, 100], {"window": 12, "gate": "elementwise"}),  # the second wraps in the middle of its tokens
        (5, 5, [0, 3, 7], {"window": 1, "sinks": True}),
        (7, 127, [0, 119, 121], {"window": 121, "scale": 0.7, "sinks": True}),
        (1, 8, [0, 7, 20], {"window": 3}),
    ],
    ids=["no window", "wraps", "window of one, whole ring", "window past the end", "one token"],
)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.sampled(20)
def test_tokens_at_once_equal_single_steps(form, T, C, lengths, options, dtype):
    options = dict(options)
    tokens = draw_tokens(T, options.pop("gate", "none"))
    if options.pop("sinks", False):
        options["sinks"] = np.linspace(-2.0, 3.0, H, dtype=np.float32)
    cache = single = draw_cache(C, lengths, dtype)
    o, cache = decode(form, tokens, cache, **options)
    assert o.shape == (B, T, H, D)
    for t in range(T):
        one, single = decode("xla", token(tokens, t), single, **options)
        np.testing.assert_allclose(o[:, t], one, rtol=2e-5, atol=2e-6, err_msg=f"token {t}")
    assert_same_cache(cache, single)


@pytest.mark.parametrize(("window", "C"), [(None, 37), (9, 15)], ids=["no window", "ring that wraps"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.sampled(8)
def test_prompt_in_chunks_equals_attention_over_the_prompt(form, window, C):
    S, chunk = 37, 7
    prompt = draw_tokens(S, gate="head")
    expected = numpy_interpreter.run(
        lambda x: kernels.attention(**x, causal=True, window=window, implementation="reference"), prompt
    )
    cache = kernels.KVCache.zeros(B, K, C, D, jnp.float32)
    for start in range(0, S, chunk):
        part = {name: x[:, start : start + chunk] for name, x in prompt.items()}
        o, cache = decode(form, part, cache, window=window)
        np.testing.assert_allclose(o, expected[:, start : start + chunk], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lengths", [[4, 5, 6], [10, 13, 40]], ids=["short", "ring that wraps"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.sampled(8)
def test_rewound_draft_leaves_no_trace(form, lengths):
    """Four tokens are drafted, of which each sequence accepts another number."""
    C, window, T = 12, 9, 4
    accepted = np.array([0, 1, 3])
    draft, right = draw_tokens(T, seed=2), draw_tokens(T, seed=3)
    for b, n in enumerate(accepted):
        for name in right:
            right[name][b, :n] = draft[name][b, :n]
    before = draw_cache(C, lengths)
    _, drafted = decode(form, draft, before, window=window)
    rewound = kernels.rewind(drafted, T - accepted)
    np.testing.assert_array_equal(rewound.length, lengths + accepted)
    expected, never_drafted = [], before
    for t in range(T):
        o, never_drafted = decode("xla", token(right, t), never_drafted, window=window)
        expected.append(o)
    for step in range(T):
        t = accepted + step  # the token of each sequence; those that are through repeat their last one
        tokens = {name: x[np.arange(B), np.minimum(t, T - 1)] for name, x in right.items()}
        o, rewound = decode(form, tokens, rewound, window=window)
        for b in np.flatnonzero(t < T):
            np.testing.assert_allclose(o[b], expected[t[b]][b], rtol=2e-5, atol=2e-6, err_msg=f"token {t[b]} of {b}")


@pytest.mark.parametrize("lengths", [[400, 590, 3000], [0, 512, 1807]], ids=["half full", "any length"])
def test_cpu_kernel_takes_several_tokens_block_by_block_and_all_blocks_at_once(lengths):
    tokens, cache, sinks = draw_tokens(3, "head"), draw_cache(600, lengths), np.linspace(-1, 1, H, dtype=np.float32)
    expected, o = (decode(form, tokens, cache, sinks=sinks)[0] for form in ("reference", "pallas for a CPU"))
    np.testing.assert_allclose(o, expected, rtol=2e-5, atol=2e-6)


def test_rewind_takes_integers_and_refuses_what_is_not_there():
    cache = kernels.KVCache.zeros(2, 1, 4, 8, jnp.float32)._replace(length=jnp.int32([3, 9]))
    for n, left in ((2, [1, 7]), (np.int64(0), [3, 9]), ([3, 1], [0, 8]), (jnp.int32(1), [2, 8])):
        after = kernels.rewind(cache, n)
        np.testing.assert_array_equal(after.length, left)
        assert after.length.dtype == jnp.int32 and after.k is cache.k
    for n, message in (
        (4, "n is 4 for a sequence of 3 tokens; allowed: 0 to 3"),
        ([0, -1], "n is -1 for a sequence of 9 tokens; allowed: 0 to 9"),
        ([1, 1, 1], r"n has shape \(3,\); allowed: an integer, or \(2,\) as cache.length has"),
        (1.5, "n is|n has"),
        (True, "n has dtype bool; allowed: int32"),
        (None, "n has"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.rewind(cache, n)
    clamped = jax.jit(kernels.rewind)(cache, jnp.int32([5, -2]))  # values under jit are not checked
    np.testing.assert_array_equal(clamped.length, [0, 9])


def call(T: int, C: int, lengths: Any = (0,), **options: Any) -> Any:
    cache = kernels.KVCache.zeros(1, 1, C, 8, jnp.float32)._replace(length=np.int32(lengths))
    x = jnp.ones((1, T, 1, 8))
    return kernels.decode_attention(x, x, x, cache, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"T": 9, "C": 8}, "q has 9 tokens; allowed: 1 to 8, the slots of the cache"),
        ({"T": 0, "C": 8}, "q has 0 tokens; allowed: 1 to 8"),
        ({"T": 3, "C": 8, "window": 7}, "cache has 8 slots; allowed with a window of 7 and 3 tokens: 9 or more"),
        (
            {"T": 3, "C": 8, "lengths": [6]},
            "cache.length holds 6; allowed with 3 tokens, 8 slots and no window: 0 to 5",
        ),
        ({"T": 2, "C": 8, "gate": jnp.ones((1, 1, 8))}, "gate has shape"),
        ({"T": 2, "C": 8, "sinks": jnp.ones(2)}, r"sinks has shape \(2,\); allowed: \(1,\)"),
        ({"T": 2, "C": 8, "sinks": jnp.int32([1])}, "sinks has dtype int32; allowed: float32"),
        ({"T": 2, "C": 8, "sinks": jnp.float16([1])}, "sinks has dtype float16; allowed: float32$"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_tokens_that_do_not_fit_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        call(**arguments)


def test_largest_sizes_that_fit_are_taken():
    """The lengths are on the host, so their values are checked in a trace too."""
    for arguments in ((8, 8), (3, 8, [5]), (3, 9, [100], 7), (1, 8, [100], 20)):
        T, C, lengths, window = (*arguments, *((), (), [0], None)[len(arguments) :])
        o, cache = jax.eval_shape(functools.partial(call, T, C, lengths, window=window))
        assert o.shape == (1, T, 1, 8) and cache.k.shape == (1, 1, C, 8)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.sampled(8)
def test_tokens_that_no_query_sees_do_not_matter(form):
    """Empty slots, tokens behind every window, and those that the new ones overwrite."""
    T, window, C, lengths = 3, 5, 12, [0, 11, 40]
    outputs = []
    for fill in (0.0, np.nan):
        cache = draw_cache(C, lengths)
        newest = np.array(lengths)[:, None] + T - 1
        age = (newest - np.arange(C)) % C
        seen = (age < window + T - 1) & (age >= T) & (age <= newest)
        rings = (jnp.where(seen[:, None, :, None], x, fill) for x in (cache.k, cache.v))
        o, _ = decode(form, draw_tokens(T), kernels.KVCache(*rings, cache.length), window=window)
        outputs.append({"o": jnp.asarray(o)})
    assert np.isfinite(outputs[0]["o"]).all()
    tolerance.assert_bit_equal(*outputs)


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_donated_cache_is_updated_in_place_by_several_tokens(implementation):
    C, T = 1024, 4
    cache = kernels.KVCache.zeros(B, K, C, 32, jnp.float32)
    q, k = jnp.ones((B, T, H, 32)), jnp.ones((B, T, K, 32))
    step = lambda q, k, cache: kernels.decode_attention(q, k, k, cache, window=64, implementation=implementation)
    memory = jax.jit(step, donate_argnums=2).lower(q, k, cache).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= cache.k.nbytes + cache.v.nbytes
    assert memory.temp_size_in_bytes < cache.k.nbytes + cache.v.nbytes, "the cache is copied on the way"


@pytest.mark.parametrize("T", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_gradients_match_reference_in_float64(T):
    """Those of q, k, v, gate, the sinks and the cached tokens."""
    with jax.enable_x64(True), jax.numpy_rank_promotion("raise"):
        tokens = {name: jnp.float64(x) for name, x in draw_tokens(T, "elementwise").items()}
        cache = draw_cache(8, [0, 4, 70])
        rings, sinks = (jnp.float64(cache.k), jnp.float64(cache.v)), jnp.linspace(-1.0, 2.0, H)
        weights = jnp.cos(jnp.arange(B * T * H * D, dtype=jnp.float64)).reshape(B, T, H, D)

        def loss(tokens: Any, rings: Any, sinks: jax.Array, implementation: str) -> jax.Array:
            options = {"sinks": sinks, "window": 4, "softcap": 1.5, "implementation": implementation}
            o, _ = kernels.decode_attention(**tokens, cache=kernels.KVCache(*rings, cache.length), **options)
            return jnp.sum(o * weights)

        gradients = [
            jax.tree.leaves(jit_fast_compile(jax.grad(lambda *x, f=name: loss(*x, f), (0, 1, 2)))(tokens, rings, sinks))
            for name in ("reference", "xla")
        ]
    for expected, found in zip(*gradients, strict=True):
        assert np.isfinite(expected).all() and np.abs(expected).max() > 0
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.sampled(8)
def test_vmap_and_two_runs_equal_a_loop(implementation):
    tokens = [draw_tokens(3, "head", seed) for seed in (4, 5)]
    cache, sinks = draw_cache(12, [0, 11, 30]), jnp.linspace(-1.0, 1.0, H)

    def run(tokens: Any) -> tuple[jax.Array, kernels.KVCache]:
        return kernels.decode_attention(**tokens, cache=cache, window=8, sinks=sinks, implementation=implementation)

    run_once = jit_fast_compile(run)
    loop = [run_once(x) for x in tokens]
    for a, b in zip(jax.tree.leaves(loop[0]), jax.tree.leaves(run_once(tokens[0])), strict=True):
        np.testing.assert_array_equal(a, b)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *tokens)
    batched, expected = jit_fast_compile(jax.vmap(run))(stacked), jax.tree.map(lambda *x: jnp.stack(x), *loop)
    for a, b in zip(jax.tree.leaves(batched), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["shard_map", "explicit axes"])
@pytest.mark.parametrize("implementation", ["xla", "pallas"])
@pytest.mark.sampled(8)
def test_sharded_tokens_with_gate_and_sinks_equal_unsharded_ones(implementation, kind):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(kind,), devices=jax.devices()[:1])
    tokens, cache, sinks = draw_tokens(3, "head"), draw_cache(12, [0, 11, 30]), np.linspace(-1, 1, H, dtype=np.float32)
    data, whole = P("data"), P()

    def run(tokens: Any, cache: Any, sinks: Any) -> Any:
        return kernels.decode_attention(**tokens, cache=cache, window=8, sinks=sinks, implementation=implementation)

    arguments, expected = (tokens, cache, sinks), numpy_interpreter.run(run, tokens, cache, sinks)
    if kind == AxisType.Auto:
        specs = (data, data, whole)
        result = jit_fast_compile(jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=data))(*arguments)
    else:
        put = lambda x, spec: jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(mesh, spec)), x)
        with jax.set_mesh(mesh):
            result = jit_fast_compile(run)(put(tokens, data), put(cache, data), put(sinks, whole))
    for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        assert a.sharding.is_equivalent_to(NamedSharding(mesh, data), a.ndim)


def test_xla_exports_with_symbolic_batch_and_slots_and_pallas_refuses_them():
    T, scope = 3, export.SymbolicScope()
    tokens, cache = draw_tokens(T), draw_cache(12, [0, 11, 30])
    shape = lambda text: jax.ShapeDtypeStruct(export.symbolic_shape(text, scope=scope), jnp.float32)
    shapes = {"q": shape("b, 3, 4, 8"), "k": shape("b, 3, 2, 8"), "v": shape("b, 3, 2, 8")}
    rings = [shape("b, 2, c, 8")] * 2
    length = jax.ShapeDtypeStruct(export.symbolic_shape("b", scope=scope), jnp.int32)

    def run(implementation: str, tokens: Any, *cache: Any) -> jax.Array:
        options = {"window": 8, "implementation": implementation}
        return kernels.decode_attention(**tokens, cache=kernels.KVCache(*cache), **options)[0]

    exported = export.export(jax.jit(functools.partial(run, "xla")))(shapes, *rings, length)
    expected = numpy_interpreter.run(functools.partial(run, "reference"), tokens, *cache[:3])
    np.testing.assert_allclose(exported.call(tokens, *cache[:3]), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(NotImplementedError, match="implementation='xla' takes symbolic sizes"):
        export.export(jax.jit(functools.partial(run, "pallas")))(shapes, *rings, length)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.sampled(8)
def test_sinks_of_any_size_give_the_exact_softmax(form):
    """A sink of -inf is none; a large one takes all; scales and soft caps leave it as it is."""
    tokens, cache = draw_tokens(2), draw_cache(8, [0, 4, 6])
    plain, _ = decode(form, tokens, cache, softcap=0.5, scale=3.0)
    without, _ = decode(form, tokens, cache, softcap=0.5, scale=3.0, sinks=np.full(H, -np.inf, np.float32))
    np.testing.assert_allclose(without, plain, rtol=1e-6)
    o, _ = decode(form, tokens, cache, softcap=0.5, scale=3.0, sinks=np.float32([-1e30, -1.5, 60, 1e30]))
    np.testing.assert_allclose(o[:, :, 0], plain[:, :, 0], rtol=1e-6)
    assert (o[:, :, 3] == 0).all()
    # Scores are within the cap: one token, of weight e^s, beside a sink.
    s = 0.5 * np.tanh(3.0 * np.sum(tokens["q"][0, 0] * np.repeat(tokens["k"][0, 0], H // K, axis=0), axis=-1) / 0.5)
    kept = np.exp(s[1:3].astype(np.float64)) / (np.exp(s[1:3]) + np.exp(np.float64([-1.5, 60])))
    expected = kept[:, None] * np.repeat(tokens["v"][0, 0], H // K, axis=0)[1:3]
    np.testing.assert_allclose(o[0, 0, 1:3], expected, rtol=2e-5)


def test_registered_implementation_gets_sinks_only_from_a_call_with_sinks(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})
    calls = []

    def mine(q: Any, k: Any, v: Any, cache: Any, **options: Any) -> Any:
        calls.append((q.ndim, sorted(options)))
        return q, cache

    kernels.register("decode_attention", "mine", mine)
    names = ["gate", "scale", "softcap", "window"]
    call(2, 8, implementation="mine")
    call(1, 8, implementation="mine", sinks=jnp.ones(1))
    assert calls == [(4, names), (3, sorted([*names, "sinks"]))]
