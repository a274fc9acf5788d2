"""Speculative decoding gives the ids of plain decoding, in fewer steps where a text repeats itself."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from dantinox.inference import speculation
from dantinox.inference.generate import MAX_SPECULATE, Request, generate, generate_chunks, stream
from dantinox.inference.sampling import Sampling
from tests.dantinox.inference.test_generate import build, ids

model = functools.cache(build)
PROMPTS = [ids(0, 3).tolist(), ids(1, 17).tolist(), ([1, 2, 3, 4, 5] * 5)[:23]]


@pytest.mark.parametrize(
    ("text", "length", "draft"),
    [
        ([1, 2, 3, 4, 1, 2], 6, [3, 4, 1]),
        ([1, 2, 3, 1, 2, 9, 1, 2], 8, [9, 1, 2]),  # the latest of two
        ([1, 2, 3, 7, 2, 3, 8, 1, 2, 3], 10, [7, 2, 3]),  # the longer match, though an earlier one
        ([5, 6, 7, 8], 4, [8, 8, 8]),  # none
        ([4, 4, 4, 4], 3, [4, 4, 4]),  # past the end of the text
        ([3, 0, 0, 0], 1, [3, 3, 3]),
        ([1, 2, 9, 2, 1, 2], 4, [9, 2, 2]),  # what follows the length does not count
    ],
)
@pytest.mark.sampled(2)
def test_draft(text, length, draft):
    got = speculation.propose(jnp.asarray([text]), jnp.asarray([length]), 3)
    np.testing.assert_array_equal(got[0], draft)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="full", marks=pytest.mark.slow),
        pytest.param({"window": 6}, id="ring that wraps"),
        pytest.param({"window": 6, "decode": "pallas", "attn_gate": "head"}, id="pallas", marks=pytest.mark.slow),
        pytest.param({"kv_cache_dtype": "int8"}, id="int8", marks=pytest.mark.slow),
        pytest.param({"n_experts": 4}, id="experts", marks=pytest.mark.slow),
        pytest.param({"attn_sinks": True, "attn_bias": True, "window": 6}, id="sinks", marks=pytest.mark.slow),
        pytest.param({"pos_encoding": "learned"}, id="learned positions", marks=pytest.mark.slow),
    ],
)
def test_ids_are_those_of_plain_decoding(changes):
    network = model(**changes)
    for options in (
        {"temperature": 0.0, "stop_tokens": [4, 7]},
        {"temperature": 0.9, "repetition_penalty": 1.2, "stop_tokens": [4, 7], "seed": 5},
    ):
        plain = generate(network, PROMPTS, max_new_tokens=25, **options)
        assert generate(network, PROMPTS, max_new_tokens=25, speculate=3, **options) == plain
        assert options["temperature"] == 0 or any(len(row) < 25 for row in plain)  # some row stops


def test_steps_are_fewer_and_counted():
    network = model()
    repeated = (PROMPTS[1] * 2)[:23]

    def run(speculate, count):
        request = Request([repeated], count, Sampling.create(0.0, None, 1.0, 0.0, 1.0), speculate=speculate)
        chunks = list(generate_chunks(network, request))
        return [token for chunk in chunks for token in chunk.ids[0]], sum(chunk.steps[0] for chunk in chunks)

    plain, steps = run(0, 25)
    assert steps == 25 == len(plain)
    drafted, fewer = run(4, 25)
    assert drafted == plain and fewer < 25
    assert run(4, 1) == (plain[:1], 1)


def test_streamed_ids_are_the_same_ids():
    options = {"max_new_tokens": 20, "temperature": 0.8, "seed": 2, "speculate": 3}
    assert list(stream(model(), PROMPTS[2], **options)) == generate(model(), PROMPTS[2:], **options)[0]


@pytest.mark.parametrize("speculate", [-1, MAX_SPECULATE + 1, 1.5, True, "4"])
def test_bad_numbers_of_drafts_are_refused(speculate):
    with pytest.raises(ValueError, match="speculate is"):
        generate(model(), [[1]], max_new_tokens=4, speculate=speculate)
