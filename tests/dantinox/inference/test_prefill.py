"""Chunked prefill: the results of a single pass, in the memory of one chunk."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bench import numpy_interpreter
from dantinox.config import ModelConfig
from dantinox.inference import decoding, prefill
from dantinox.inference.generate import generate
from dantinox.inference.sampling import Sampling
from dantinox.model.transformer import Transformer
from tests.dantinox.inference.test_generate import V, build, ids

T, CHUNK = 40, 7


def read(graph, weights, tokens, length, slots, chunk):
    """(logits [B, V] after each prompt, the caches), `chunk` tokens at a time, in NumPy."""

    def program(weights, tokens, length):
        model, prefilled = nnx.merge(graph, weights), slots
        for start in range(0, tokens.shape[1], chunk):
            piece = jnp.pad(tokens, ((0, 0), (0, chunk)))[:, start : start + chunk]
            past = prefill.round_up_to_bucket(start, 1) if start else 0
            prefilled = prefill.prefill_chunk(model, piece, jnp.int32(start), length, prefilled, past)
        return model.logits(prefilled.last), prefilled.caches

    return numpy_interpreter.run(program, weights, tokens, length)


@pytest.mark.parametrize(
    "changes",
    [
        dict(attn="pallas"),
        dict(window=6, attn_gate="elementwise", attn_softcap=5.0, attn="pallas"),
        dict(window=11, pos_encoding="learned", n_kv_heads=1),
        dict(n_layers=4, window_pattern="SSSL", window=3, qk_norm=True),
        dict(n_layers=1, window=6, n_experts=4, experts_per_token=2),
        dict(n_layers=1, window=100, pos_encoding="none"),
        dict(window=6, window_pattern="SL", attn_sinks=True, attn_bias=True, attn="pallas"),
    ],
    ids=lambda changes: "-".join(f"{k}={v}" for k, v in changes.items()),
)
@pytest.mark.sampled(4)
def test_chunked_prefill_equals_single_pass(changes):
    """Ragged prompts: one ends in the first chunk, one at a chunk's end, one is as long as it gets."""
    model = build(**changes)
    tokens, length = ids(1, 4, T), np.array([1, CHUNK, 5 * CHUNK, T], np.int32)
    graph, weights = nnx.split(model)
    slots = prefill.layer_cache_slots(model.config, 48)
    whole, caches = read(graph, weights, tokens, length, slots, T)
    pieces, in_pieces = read(graph, weights, tokens, length, slots, CHUNK)
    assert np.std(whole) > 0.1
    np.testing.assert_allclose(pieces, whole, atol=2e-4)
    for one, other in zip(caches, in_pieces, strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), other, one)
        assert one.length.tolist() == length.tolist()


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        (dict(window=6), dict(temperature=0)),
        (dict(window=6), dict(temperature=0, speculate=3)),
        (dict(pos_encoding="learned"), dict(temperature=0.7, seed=3, n=2)),
        (dict(n_experts=4, experts_per_token=2, window=20), dict(temperature=1.0, seed=5, repetition_penalty=1.3)),
        (dict(n_layers=2, window_pattern="SL", window=6, kv_cache_dtype="int8"), dict(temperature=0)),
        (dict(kv_cache_dtype="int8", window=6), dict(temperature=1.0, seed=7, speculate=2)),
    ],
    ids=lambda x: "-".join(f"{k}={v}" for k, v in x.items()),
)
@pytest.mark.slow
def test_generated_ids_do_not_depend_on_chunk_size(changes, options):
    """Ragged prompts: one ends within its last chunk, one within the first, one at the end of a chunk."""
    model = build(**({"n_layers": 1} | changes))
    prompts = [ids(3, 33), ids(4, 3), ids(5, 16)]
    whole, *chunked = (
        generate(model, prompts, max_new_tokens=9, prefill_chunk=chunk, **options) for chunk in (None, 16, 5)
    )
    assert chunked == [whole] * 2 and all(whole)


@pytest.mark.parametrize(("kv_cache_dtype", "most"), [("int8", 0.05), ("fp8", 0.2)])
@pytest.mark.sampled(2)
def test_eight_bit_cache_gives_close_logits(kv_cache_dtype, most):
    """Prompt in chunks and steps after it, logits of a standard deviation near 1; and it is a cache in 8 bits."""
    found = {}
    for kind in ("auto", kv_cache_dtype):
        model = build(window_pattern="SL", window=6, kv_cache_dtype=kind)
        slots = prefill.layer_cache_slots(model.config, 48)

        def program(tokens, length, model=model, slots=slots):
            prefilled = slots
            for start in (0, 12):
                piece = tokens[:, start : start + 12]
                prefilled = prefill.prefill_chunk(model, piece, jnp.int32(start), length, prefilled, start)
            logits, caches = [], prefilled.caches
            for t in range(7):
                more, caches = prefill.decode_step(model, tokens[:, t], caches)
                logits.append(more)
            return jnp.stack(logits), caches

        found[kind], caches = numpy_interpreter.run(program, ids(1, 2, 30), np.array([5, 23], np.int32))
    assert caches[0].k.dtype.itemsize == 1 and caches[1].v_scale.dtype == jnp.float32
    error = np.abs(found[kv_cache_dtype] - found["auto"]).max() / np.std(found["auto"])
    assert 1e-4 < error < most


def test_short_prompt_cost_does_not_depend_on_max_context(monkeypatch):
    """Fault 12: a prompt is padded to the longest context: seconds to the first token."""
    seen, read = [], decoding.prefill_chunk

    def spy(graph, slots, past, weights, tokens, *rest):
        seen.append((tokens.shape, slots, past))
        return read(graph, slots, past, weights, tokens, *rest)

    monkeypatch.setattr(decoding, "prefill_chunk", spy)
    for max_context in (64, 4096):
        generate(build(n_layers=1, max_context=max_context), [ids(1, 8)], max_new_tokens=4)
    assert seen == [((1, 16), (64,), 0)] * 2


def test_prefill_memory_is_that_of_one_chunk():
    """Of the temporaries, by XLA's own count: the caches are arguments, which stay where they are."""
    config = ModelConfig(vocab_size=V, dim=64, n_layers=2, n_heads=4, n_kv_heads=2, window=32, max_context=2**16)
    graph, weights = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
    slots = prefill.layer_cache_slots(config, 2**14)
    numbers = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)

    def temporaries(T: int, past: int) -> int:
        program = decoding.prefill_chunk
        prefilled = None
        if past:
            prefilled = jax.eval_shape(
                lambda: prefill.PrefillState(jnp.zeros((1, config.dim)), prefill.init_caches(config, 1, slots))
            )
        lowered = program.lower(graph, slots, past, weights, numbers(1, T), numbers(), numbers(1), prefilled)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    later = [temporaries(256, past) for past in (512, 2**13)]
    assert later[1] <= 1.1 * later[0]  # where every layer has a window, the place does not matter
    assert later[1] < temporaries(2**13, 0) / 8


def test_single_sample_reuses_the_prefilled_caches():
    model = build(n_layers=1)
    graph, weights = nnx.split(model)
    caches = prefill.init_caches(model.config, 1, (48,))
    arguments = jnp.zeros((1, 16)), jnp.uint32(0), jnp.zeros(1, jnp.int32), caches, jnp.zeros((1, V), bool)
    how = Sampling.create(), jnp.zeros(1, jnp.int32)
    compiled = decoding.start_in_place.lower(graph, weights, *arguments, *how).compile()
    assert compiled.memory_analysis().alias_size_in_bytes >= 2 * caches[0].k.nbytes


@pytest.mark.parametrize("bad", [0, -1, 2.5, True])
def test_invalid_chunk_size_raises(bad):
    with pytest.raises(ValueError, match=r"prefill_chunk is .*; allowed: an integer, 1 or more, or None"):
        generate(build(n_layers=1), [[1, 2]], max_new_tokens=1, prefill_chunk=bad)
