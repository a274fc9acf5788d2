"""Cached decoding equals the plain forward pass; sampling options, batches and limits of generation."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dantinox import kernels
from dantinox.config import ModelConfig
from dantinox.inference import decoding, prefill
from dantinox.inference.generate import generate, stream
from dantinox.model.transformer import Transformer

V = 23
SMALL = dict(vocab_size=V, dim=16, n_layers=2, n_heads=4, n_kv_heads=2, max_context=48, mlp_ratio=2.0)


def build(**changes) -> Transformer:
    """A tiny model whose logits differ well; numpy draws its weights, as that compiles nothing."""
    config = ModelConfig(**(SMALL | changes))
    graph, shapes = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    draw = lambda x: jnp.asarray((x.ndim == 1) + 0.2 * rng.normal(size=x.shape), x.dtype)
    weights = jax.tree.map(draw, shapes)
    return nnx.merge(graph, weights)


@pytest.fixture(scope="module")
def windowed() -> Transformer:
    return build(window=6)


@pytest.fixture(scope="module")
def learned() -> Transformer:
    return build(pos_encoding="learned")


def ids(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, V, shape, dtype=np.int32)


# --- cached = uncached ---------------------------------------------------------------------------


# Most of the time of these tests is LLVM's, and they run everything once.
quickly = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.partial(quickly, static_argnums=0)
def uncached_logits(graph, weights, tokens):
    return nnx.merge(graph, weights)(tokens)


@functools.partial(quickly, static_argnums=(0, 4))
def cached_logits(graph, weights, tokens, length, slots):
    """Logits [B, T, V] from prefill of `length` [B] tokens and steps for the rest; NaN inside the prompt."""
    model = nnx.merge(graph, weights)
    B, T = tokens.shape
    prompt = jnp.where(jnp.arange(8) < length[:, None], tokens[:, :8], V - 1)
    logits, caches = prefill.prefill(model, prompt, length, slots)
    rows = jnp.arange(B)
    out = jnp.full((B, T + 1, V), jnp.nan).at[rows, length - 1].set(logits)

    def step(carry, _):
        caches, at, out = carry
        logits, caches = prefill.decode_step(model, tokens[rows, jnp.minimum(at, T - 1)], caches)
        return (caches, at + 1, out.at[rows, jnp.minimum(at, T)].set(logits)), None

    return jax.lax.scan(step, (caches, length, out), length=T - 1)[0][2][:, :T]


@pytest.mark.parametrize(
    "changes",
    [
        dict(n_layers=1),
        dict(window=6),
        dict(n_layers=1, window=6, rope_scaling="ntk", rope_factor=2.0, n_kv_heads=1),
        dict(n_layers=1, rope_scaling="yarn", rope_factor=4.0, n_kv_heads=4),
        dict(n_layers=1, pos_encoding="learned", window=5),
        dict(n_layers=1, pos_encoding="none", head_dim=5),
        dict(n_layers=4, window_pattern="SSSL", window=3, attn_gate="elementwise", qk_norm=True),
        dict(
            n_layers=1,
            window=1,
            attn_gate="head",
            attn_softcap=5.0,
            logit_softcap=10.0,
            tie_embeddings=False,
            mlp="gelu",
        ),
        dict(n_layers=1, window=6, n_experts=4, experts_per_token=2, shared_expert=True),
        dict(n_layers=1, window=6, dtype="bfloat16"),
        dict(
            window=6,
            window_pattern="SL",
            attn_sinks=True,
            attn_bias=True,
            n_experts=4,
            mlp="swiglu_clamped",
            mlp_limit=1.0,
            moe_bias=True,
        ),
    ],
    ids=lambda changes: "-".join(f"{k}={v}" for k, v in changes.items()) or "plain",
)
@pytest.mark.sampled(8)
def test_cached_logits_equal_uncached_after_ring_buffer_wraps(changes):
    """Fault 13: learned positions take no note of the place in the cache: cached and uncached differ."""
    model = build(**changes)
    tokens, length = ids(1, 3, 24), np.array([1, 5, 8], np.int32)
    graph, weights = nnx.split(model)
    got = cached_logits(graph, weights, tokens, length, prefill.layer_cache_slots(model.config, 24))
    want = uncached_logits(graph, weights, tokens)
    tolerance = 0.3 if model.config.dtype == "bfloat16" else 2e-4
    for row, start in enumerate(length):
        np.testing.assert_allclose(got[row, start - 1 :], want[row, start - 1 :], rtol=0, atol=tolerance)
    assert np.std(want) > 0.1


@pytest.mark.parametrize(("T", "slots"), [(8, 3), (8, 8), (5, 12), (16, 1), (16, 7)])
@pytest.mark.sampled(2)
def test_append_keeps_the_newest_position_in_each_slot(T, slots):
    length = np.arange(T + 1)
    k = np.random.default_rng(0).normal(size=(len(length), T, 2, 3)).astype(np.float32)
    want = np.zeros((len(length), 2, slots, 3), np.float32)
    for row, n in enumerate(length):
        for p in range(n):
            want[row, :, p % slots] = k[row, p]
    poisoned = np.where((np.arange(T) < length[:, None])[:, :, None, None], k, np.nan)
    empty = kernels.KVCache.zeros(len(length), 2, slots, 3, jnp.float32)
    cache = prefill.append_to_cache(empty, jnp.asarray(poisoned), jnp.asarray(poisoned * 2), jnp.asarray(length))
    np.testing.assert_array_equal(cache.k, want)
    np.testing.assert_array_equal(cache.v, want * 2)
    assert cache.length.tolist() == length.tolist()


def test_padding_does_not_affect_output(windowed):
    slots = prefill.layer_cache_slots(windowed.config, 64)
    prompt, length = ids(2, 1, 7), np.array([7], np.int32)
    read = jax.jit(lambda tokens: prefill.prefill(windowed, tokens, length, slots))
    logits, caches = read(np.pad(prompt, ((0, 0), (0, 9))))
    other, other_caches = read(np.pad(prompt, ((0, 0), (0, 9)), constant_values=V - 1))
    jax.tree.map(np.testing.assert_array_equal, (logits, caches), (other, other_caches))
    longer, longer_caches = read(np.pad(prompt, ((0, 0), (0, 25))))
    for a, b in zip(jax.tree.leaves((logits, caches)), jax.tree.leaves((longer, longer_caches)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_empty_caches_and_bucket_sizes():
    config = build(n_layers=4, window_pattern="SSSL", window=6).config
    caches = prefill.init_caches(config, 3, prefill.layer_cache_slots(config, 40))
    assert [cache.k.shape for cache in caches] == [(3, 2, 8, 4)] * 3 + [(3, 2, 40, 4)]  # slots come in eights
    assert all(cache.v.shape == cache.k.shape and cache.length.tolist() == [0, 0, 0] for cache in caches)
    assert [prefill.round_up_to_bucket(n, 16, 100) for n in (1, 16, 17, 64, 65, 100)] == [16, 16, 32, 64, 100, 100]
    assert prefill.round_up_to_bucket(3000, 16) == 4096 and prefill.round_up_to_bucket(3, 16, 5) == 5


# --- generation ----------------------------------------------------------------------------------

PROMPTS = [ids(n, n).tolist() for n in (1, 9, 3, 14)]


@pytest.mark.parametrize("name", ["windowed", pytest.param("learned", marks=pytest.mark.slow)])
def test_greedy_ids_equal_argmax_of_uncached_model(name, request):
    model = request.getfixturevalue(name)
    new = 100 if name == "windowed" else 34  # past max_context, or up to its last place
    graph, weights = nnx.split(model)
    outs = generate(model, PROMPTS, max_new_tokens=new, temperature=0.0)
    texts = [prompt + out for prompt, out in zip(PROMPTS, outs, strict=True)]
    longest = max(map(len, texts))
    padded = np.array([text + [0] * (longest - len(text)) for text in texts], np.int32)
    logits = np.asarray(uncached_logits(graph, weights, padded))
    for row, prompt, out in zip(logits, PROMPTS, outs, strict=True):
        assert len(out) == new
        at = len(prompt) - 1 + np.arange(new)
        chosen, best = row[at, out], row[at].max(axis=-1)
        assert (best - chosen < 1e-3).all()


HOW = [dict(temperature=0.0), dict(temperature=1.0), dict(top_k=5, top_p=0.9, min_p=0.01)]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.sampled(2)
def test_batch_equals_each_prompt_alone(windowed, how):
    """Fault 14: a batch is padded on the left without a mask: a prompt gives another text than alone."""
    how = dict(max_new_tokens=20, seed=3, **how)
    together = generate(windowed, PROMPTS, **how)
    assert together == [generate(windowed, [prompt], **how)[0] for prompt in PROMPTS]
    assert together == [list(stream(windowed, prompt, **how)) for prompt in PROMPTS]


def test_experts_do_not_mix_rows_of_a_batch():
    model = build(n_layers=1, window=6, n_experts=4)
    together = generate(model, PROMPTS, max_new_tokens=12, seed=1)
    assert together == [generate(model, [prompt], max_new_tokens=12, seed=1)[0] for prompt in PROMPTS]


def test_samples_are_distinct_ordered_by_prompt_and_streamable(windowed):
    outs = generate(windowed, PROMPTS[:2], max_new_tokens=12, n=2, seed=5)
    assert len({tuple(out) for out in outs}) == 4
    assert outs[2:] == generate(windowed, PROMPTS[1:2], max_new_tokens=12, n=4, seed=5)[:2]
    assert outs[:1] == generate(windowed, PROMPTS[:1], max_new_tokens=12, seed=5)
    assert list(stream(windowed, PROMPTS[1], max_new_tokens=12, seed=5, sample=1)) == outs[3]


def test_same_seed_repeats_samples_and_other_seed_differs(windowed):
    outs = [generate(windowed, PROMPTS[:1], max_new_tokens=12, seed=seed) for seed in (0, 1, 0, 2**32 - 1)]
    assert outs[0] == outs[2] and outs[0] != outs[1] != outs[3]


def test_shorter_output_is_a_prefix_of_longer_output(windowed):
    long = generate(windowed, PROMPTS[1:2], max_new_tokens=2 * decoding.CHUNK + 7)[0]
    assert len(long) == 2 * decoding.CHUNK + 7
    for count in (1, 2, decoding.CHUNK, decoding.CHUNK + 1, decoding.CHUNK + 2):
        assert generate(windowed, PROMPTS[1:2], max_new_tokens=count)[0] == long[:count]


def test_stop_tokens_end_each_sequence_separately(windowed):
    free = generate(windowed, PROMPTS, max_new_tokens=40, seed=2)
    for stops in ([free[0][0]], [free[1][7], free[2][3]], range(12)):
        stopped = generate(windowed, PROMPTS, max_new_tokens=40, seed=2, stop_tokens=stops)
        for out, whole in zip(stopped, free, strict=True):
            end = next((i for i, token in enumerate(whole) if token in set(stops)), len(whole))
            assert out == whole[:end]
        streamed = list(stream(windowed, PROMPTS[1], max_new_tokens=40, seed=2, stop_tokens=stops))
        assert streamed == stopped[1]


def test_only_a_new_size_recompiles(windowed):
    generate(windowed, PROMPTS[2:3], max_new_tokens=8)
    programs = decoding.prefill_chunk, decoding.start_in_place, decoding.decode_chunk
    before = [program._cache_size() for program in programs]
    for count, prompt, how in (
        (1, PROMPTS[0], dict(temperature=0)),
        (33, PROMPTS[1], dict(top_k=3, seed=9)),
        (17, PROMPTS[2], dict(top_p=0.5, min_p=0.2, temperature=3, stop_tokens=(1, 2))),
        (300, PROMPTS[3], dict(max_context=9)),
    ):
        generate(windowed, [prompt], max_new_tokens=count, **how)
    list(stream(windowed, PROMPTS[0], max_new_tokens=9))
    assert [program._cache_size() for program in programs] == before


def test_bfloat16_weights_are_not_copied():
    """Not to cast them, and on a CPU not to multiply one row by them in float32."""
    config = ModelConfig(vocab_size=2048, dim=256, n_layers=1, n_heads=4, n_kv_heads=2, dtype="bfloat16")
    graph, weights = nnx.split(Transformer(config, rngs=nnx.Rngs(0)))
    weights = decoding.cast_weights(weights, "bfloat16")
    again = decoding.cast_weights(weights, "bfloat16")
    assert all(a is b for a, b in zip(jax.tree.leaves(weights), jax.tree.leaves(again), strict=True))
    caches, one = prefill.init_caches(config, 1, (8,)), jnp.zeros(1, jnp.int32)
    step = jax.jit(lambda w, caches: prefill.decode_step(nnx.merge(graph, w), one, caches)[0])
    memory = step.lower(weights, caches).compile().memory_analysis()
    assert memory.temp_size_in_bytes < min(w.size for w in jax.tree.leaves(weights) if w.ndim > 1)


def test_500_tokens_compile_each_program_once():
    """Fault 15: sampling parameters are static, so that each value recompiles."""
    compiled = []
    listen = lambda event, seconds, **_: compiled.append(event) if event.endswith("backend_compile_duration") else None
    model, prompts = build(n_layers=1, window=7), [ids(8, 40), ids(9, 17)]  # sizes that no other test has
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        whole = generate(model, prompts, max_new_tokens=500, n=2)
        assert len(compiled) == 3 and [len(out) for out in whole] == [500] * 4  # prefill, init, decode
        penalized = dict(repetition_penalty=1.2, stop_tokens=(1, 2, 3), seed=4)
        for how in (dict(temperature=0.0), dict(top_k=4, top_p=0.7), dict(min_p=0.1, temperature=1.5), penalized):
            generate(model, prompts, max_new_tokens=400, n=2, **how)
        assert len(compiled) == 3
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_all_samples_share_one_prefill(windowed, monkeypatch):
    read, starts = decoding.prefill_chunk, []
    monkeypatch.setattr(decoding, "prefill_chunk", lambda *args: (starts.append(int(args[5])), read(*args))[1])
    generate(windowed, PROMPTS, max_new_tokens=3, n=3, prefill_chunk=8)
    assert starts == [0, 8]


def test_repetition_penalty_follows_the_paper(windowed):
    """Greedy, beside an oracle that goes over what stands before each token; a batch gives what each gives alone."""
    graph, weights = nnx.split(windowed)
    outs = generate(windowed, PROMPTS[:2], max_new_tokens=30, temperature=0.0, repetition_penalty=1.5)
    for prompt, out in zip(PROMPTS, outs, strict=False):
        text = prompt + out
        padded = np.array([text + [0] * (44 - len(text))], np.int32)
        logits = np.asarray(uncached_logits(graph, weights, padded))[0]
        for at in range(len(prompt), len(text)):
            row, before = logits[at - 1].copy(), sorted(set(text[:at]))
            row[before] = np.where(row[before] > 0, row[before] / 1.5, row[before] * 1.5)
            assert row.max() - row[text[at]] < 1e-3
    assert outs != generate(windowed, PROMPTS[:2], max_new_tokens=30, temperature=0.0)
    alone = generate(windowed, PROMPTS[1:2], max_new_tokens=30, temperature=0.0, repetition_penalty=1.5, n=2)
    assert alone == [outs[1]] * 2


def test_text_longer_than_context_raises_before_running(learned):
    """Fault 17: generation stops silently at the longest context."""
    full = build(n_layers=1)
    message = "prompt of 14 tokens and max_new_tokens 40 make 54; allowed: max_context 48 "
    for model, why in (
        (learned, "(the model has learned positions)"),
        (full, "(every layer has full attention)"),
        (build(window_pattern="SL", window=6), "(layer 1 has full attention)"),
    ):
        with pytest.raises(ValueError, match=re.escape(message + why)):
            generate(model, PROMPTS, max_new_tokens=40)
        with pytest.raises(ValueError, match=re.escape(message + why)):
            stream(model, PROMPTS[3], max_new_tokens=40)
    with pytest.raises(ValueError, match="allowed: max_context 20"):
        generate(full, PROMPTS, max_new_tokens=10, max_context=20)
    with pytest.raises(ValueError, match=r"^max_context is 49; allowed: up to 48$"):
        generate(learned, PROMPTS, max_context=49)
    assert len(generate(full, [[1]], max_new_tokens=60, max_context=61)[0]) == 60


@pytest.mark.parametrize(
    ("name", "bad"),
    [("prompts", x) for x in ([], "text", None, [[]], [1, 2], [[1], []], [[V]], [[1, -1]], [[1.0]], ["a"])]
    + [("prompts", x) for x in ([[True]], [[[1]]], [None], [[1, [2]]])]
    + [("max_new_tokens", x) for x in (0, -1, 1.5, "3", None)]
    + [("n", x) for x in (0, -1, 1.0)]
    + [("seed", x) for x in (-1, 2**32, 0.5)]
    + [("stop_tokens", x) for x in ([V], [-1], [0.5], 3, "a")]
    + [("max_context", x) for x in (0, -3, 2.5)]
    + [("temperature", -1), ("top_k", 0), ("top_p", 0), ("min_p", 1), ("repetition_penalty", 0)],
)
def test_invalid_arguments_raise_one_line_with_their_name(windowed, name, bad):
    """Fault 15: ids out of range give NaN; an empty prompt and top_k 0 are accepted silently."""
    with pytest.raises(ValueError, match=f"^{name}.*; allowed: ") as error:
        generate(**(dict(model=windowed, prompts=[[1]]) | {name: bad}))
    assert "\n" not in str(error.value)


def test_numpy_ids_are_accepted(windowed):
    outs = generate(windowed, ids(3, 4, 2), max_new_tokens=np.int64(2), seed=np.uint32(1))
    assert outs == generate(windowed, tuple(map(tuple, ids(3, 4, 2))), max_new_tokens=2, seed=1)
    assert all(type(token) is int for out in outs for token in out)
