"""A conversation prefills only what is new, and gives the tokens of a model that reads the whole text."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

import dantinox
from dantinox.inference import conversation as module
from dantinox.inference import decoding
from dantinox.inference.conversation import ContextFullError, Conversation
from dantinox.inference.sampling import Sampling
from tests.dantinox.inference.test_generate import V, build

GREEDY = Sampling.create(0.0)
SIZE = 80


def say(talk: Conversation, tokens: list[int], count: int, **options) -> list[int]:
    return [i for ids in talk.reply(tokens, count, **options) for i in ids]


def greedy(model, text: list[int], count: int, stop=()) -> list[int]:
    """The likeliest tokens, by the logits of the whole text without a cache."""
    forward, text, begin = logits_of(model), list(text), len(text)
    for _ in range(count):
        padded = np.zeros((1, SIZE), np.int32)
        padded[0, : len(text)] = text
        text.append(int(np.argmax(forward(padded)[0, len(text) - 1])))
        if text[-1] in stop:
            return text[begin:-1]
    return text[begin:]


@functools.lru_cache(maxsize=1)
def logits_of(model):
    graph, weights = nnx.split(model)
    forward = jax.jit(lambda weights, tokens: nnx.merge(graph, weights)(tokens))
    return lambda tokens: np.asarray(forward(weights, tokens))


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(dict(window=6), marks=pytest.mark.slow),
        pytest.param(dict(max_context=80), marks=pytest.mark.slow),
        dict(window=6, window_pattern="SL", max_context=80),
        pytest.param(
            dict(window=6, window_pattern="SL", kv_cache_dtype="int8", max_context=80), marks=pytest.mark.slow
        ),
        pytest.param(dict(pos_encoding="learned", max_context=80), marks=pytest.mark.slow),
    ],
)
def test_turns_equal_the_whole_text_and_prefill_new_tokens_only(settings, monkeypatch):
    """The smallest cache has 32 slots, so it grows; the window's ring buffer wraps."""
    monkeypatch.setattr(module, "SMALLEST_CONTEXT", 32)
    read, prefilled = decoding.prefill_chunk, []
    monkeypatch.setattr(decoding, "prefill_chunk", lambda *args: (prefilled.append(args[4].shape[1]), read(*args))[1])
    model, draw, text = build(n_layers=2, **settings), np.random.default_rng(0), []
    # A stop token that the model does say: the third of its first answer.
    stop = greedy(model, draw.integers(0, V, 5).tolist(), 3)[2]
    talk, draw = Conversation(model, GREEDY, stop_tokens=[stop], prefill_chunk=16), np.random.default_rng(0)
    endings = set()
    for size in (5, 1, 30):
        new = draw.integers(0, V, size).tolist()
        answer = say(talk, new, 6)
        text += new
        want = greedy(model, text, 6, [stop])
        assert answer == want or "kv_cache_dtype" in settings
        text += answer
        cached = len(text) - (talk.ended == "count")  # the last token drawn enters the cache with what follows
        assert talk.tokens == text and all(int(cache.length[0]) == cached for cache in talk.caches)
        endings.add(talk.ended)
    assert "stop" in endings and prefilled == [16] * len(prefilled) and len(prefilled) == 4


@pytest.mark.slow
def test_full_context_changes_nothing_and_reset_empties_it():
    model = build(n_layers=1, max_context=32)
    talk = Conversation(model, GREEDY)
    answer = say(talk, [1, 2, 3], 100)
    assert (len(answer), talk.ended, len(talk.tokens)) == (29, "context", 32)
    with pytest.raises(
        ContextFullError, match=r"the context of 32 tokens is full \(every layer has full attention\): 32 so"
    ):
        talk.reply([4], 5)
    assert len(talk.tokens) == 32
    talk.reset()
    assert say(talk, [1, 2, 3], 4) == answer[:4] and talk.ended == "count"


@pytest.mark.slow
def test_interrupted_reply_keeps_what_was_said():
    model, asked = build(n_layers=1, window=6), []
    talk = Conversation(model, GREEDY)
    answer = say(talk, [1, 2, 3], 50, interrupted=lambda: asked.append(1) or len(asked) > 2)
    assert talk.ended == "interrupt" and 2 <= len(answer) < 50 and talk.tokens == [1, 2, 3, *answer]
    assert say(talk, [4], 5) == greedy(model, [1, 2, 3, *answer, 4], 5)


@pytest.mark.slow
def test_tokens_taken_back_are_forgotten_or_all_are():
    model = build(n_layers=2, window=6, window_pattern="SL", max_context=64)
    # The ring buffer of the window wraps after six tokens; it can be rewound by one then, and of 23 tokens it has 22.
    for length, count, kept in ((3, 2, 2), (3, 0, 0), (20, 22, 22), (20, 21, 21), (20, 20, 0), (20, 23, 23)):
        talk = Conversation(model, GREEDY)
        say(talk, list(range(length)), 3)
        text = list(talk.tokens)
        talk.keep(count)
        assert len(talk.tokens) == kept, (length, count)
        new = [*text[len(talk.tokens) : count], 7, 8]
        assert say(talk, new, 4) == greedy(model, [*text[:count], 7, 8], 4), (length, count)


@pytest.mark.slow
def test_answers_are_drawn_anew_each_turn_and_repeat_with_the_seed():
    model, sampling = build(n_layers=1, window=6), Sampling.create(2.0)
    first, second = (Conversation(model, sampling, seed=3) for _ in range(2))
    assert say(first, [1], 8) == say(second, [1], 8)
    first.reset()
    assert (
        say(first, [1], 8)
        == say(second, [5], 0)
        + say(first, [1], 0)
        + dantinox.generate(model, [[1]], max_new_tokens=8, temperature=2.0, seed=3, n=3)[2]
    )
