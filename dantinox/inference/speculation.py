"""Speculative decoding with n-gram drafts: several tokens per step where the text repeats itself.

A draft is what followed the last earlier occurrence of the newest tokens, in the prompt or in the text so far:

    the cat sat on the mat . the cat        newest tokens: the cat; draft: sat on the

One step of the model scores the newest token and the draft together, which takes little longer than one token while
reading the weights takes the time. Each position draws its token from the model's own distribution with its own random
key, as without drafts; a draft is accepted up to the first token that differs from the draw. So the ids are those of
plain decoding, at any temperature, up to rounding. The tokens that were not accepted leave the caches by `rewind`.

Source  Leviathan et al., Fast Inference from Transformers via Speculative Decoding (arXiv:2211.17192), for the
        verification; Saxena, Prompt Lookup Decoding (2023), for the drafts.
"""

import functools
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dantinox.inference import prefill
from dantinox.inference.chunk import DONE_TOKEN, Chunk
from dantinox.inference.sampling import Sampling, apply_repetition_penalty, sample
from dantinox.kernels import KVCache, rewind

Array = jax.Array
NGRAM = 3  # newest tokens that are looked up; fewer where they never occurred together
STEPS = 32  # steps per host sync, which is also when Ctrl-C is handled


class State(NamedTuple):
    """State between two steps of R rows.

    Attributes:
        caches: one per layer.
        logits: of the next token, [R, V] float32.
        done: whether each row has ended, bool [R].
        keys: random keys [R].
        num: new tokens of each row so far, int32 [R].
        seen: which tokens occur in the prompt and the text so far, bool [R, V].
        text: ids of the prompt and the text so far, int32 [R, L]; what follows them is arbitrary.
        length: number of those ids, int32 [R].
    """

    caches: list[KVCache]
    logits: Array
    done: Array
    keys: Array
    num: Array
    seen: Array
    text: Array
    length: Array


def propose(text: Array, length: Array, num_tokens: int) -> Array:
    """Draft `num_tokens` tokens for each row: what followed the last earlier occurrence of its newest tokens.

    Args:
        text: ids [R, L] int32.
        length: number of ids of each row that exist, [R] int32, at least 1.
        num_tokens: length of the drafts.

    Returns:
        ids [R, num_tokens] int32. The occurrence of most of the newest tokens wins, then the latest one. Without any,
        and past the end of the text, a draft repeats the newest token.
    """
    L = text.shape[1]
    place = jnp.arange(L)[None]
    matched = jnp.zeros_like(text)  # newest tokens that also end at each place
    equal = jnp.ones(text.shape, bool)
    for back in range(NGRAM):
        newest = jnp.take_along_axis(text, jnp.maximum(length[:, None] - 1 - back, 0), axis=1)
        equal &= (jnp.roll(text, back, axis=1) == newest) & (place >= back) & (length[:, None] > back)
        matched += equal
    matched = jnp.where(place < length[:, None] - 1, matched, 0)
    best = jnp.argmax(matched * L + place * (matched > 0), axis=1)  # places are below L
    follows = best[:, None] + 1 + jnp.arange(num_tokens)[None]
    exists = (follows < length[:, None]) & (jnp.max(matched, axis=1) > 0)[:, None]
    draft = jnp.take_along_axis(text, jnp.minimum(follows, L - 1), axis=1)
    newest = jnp.take_along_axis(text, length[:, None] - 1, axis=1)
    return jnp.where(exists, draft, newest)


def decode(
    model: tuple[Any, Any],
    state: State,
    sampling: Sampling,
    stop_ids: np.ndarray,
    *,
    num_drafts: int,
    count: int,
    latency: float | None,
) -> Iterator[Chunk]:
    """Decode up to `count` tokens per row.

    Args:
        model: (graph, weights) of the model.
        state: the state after the prompts; it is donated.
        sampling: the sampling settings.
        stop_ids: ids that end a row.
        num_drafts: tokens of a draft.
        count: maximum number of new tokens per row.
        latency: seconds between two outputs; None: `STEPS` steps.
    """
    size, done = STEPS if latency is None else 1, False
    while not done:
        start = time.perf_counter()
        state, out, steps = _steps(
            model[0], num_drafts, model[1], state, sampling, stop_ids, np.int32(size), np.int32(count)
        )
        ids, row_done = np.asarray(out).reshape(len(out), -1), np.asarray(state.done)
        done = bool(row_done.all())
        new = [row[row != DONE_TOKEN].tolist() for row in ids]
        yield Chunk(new, row_done.tolist(), np.asarray(steps).tolist())
        if latency is not None:
            size = max(1, min(STEPS, int(size * latency / (time.perf_counter() - start))))


def initial_state(
    caches: list[KVCache],
    logits: Array,
    keys: Array,
    seen: Array,
    tokens: np.ndarray,
    lengths: np.ndarray,
    samples: int,
    size: int,
) -> State:
    """Return the state after the prompts, for `samples` rows per prompt and texts of up to `size` tokens.

    `tokens` [B, T], T <= size, are the ids of the prompts, padded; `lengths` [B] is the number of ids of each.
    """
    text = np.pad(tokens, ((0, 0), (0, size - tokens.shape[1])))
    text, length = (np.repeat(x, samples, axis=0) for x in (text, lengths))
    done, num = np.zeros(length.shape, bool), np.zeros(length.shape, np.int32)
    return _as_outputs(State(caches, logits, done, keys, num, seen, text, length))


@functools.partial(jax.jit, donate_argnums=0)
def _as_outputs(state: State) -> State:
    """Return the state as results of a program, or `_steps` would be compiled twice, first for arrays of the host."""
    return state


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _steps(
    graph: Any,
    num_drafts: int,
    weights: Any,
    state: State,
    sampling: Sampling,
    stop_ids: Array,
    max_steps: Array,
    count: Array,
) -> tuple[State, Array, Array]:
    """Take up to `max_steps` steps -> (state, ids [R, STEPS, 1 + num_drafts] or DONE_TOKEN, steps of each row)."""
    model = nnx.merge(graph, weights)
    R = state.done.size
    rows = jnp.arange(R)

    def draw(logits: Array, seen: Array, keys: Array, index: Array) -> Array:
        keys = jax.vmap(jax.random.fold_in)(keys, index)
        return sample(apply_repetition_penalty(logits, seen, sampling), sampling, keys)

    def is_running(carry: tuple[Any, ...]) -> Array:
        state, _, _, step = carry
        return (step < max_steps) & ~jnp.all(state.done)

    def step(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        state, out, steps, number = carry
        first = draw(state.logits, state.seen, state.keys, state.num)
        text = state.text.at[rows, state.length].set(first)
        drafts = propose(text, state.length + 1, num_drafts)
        tokens = jnp.concatenate([first[:, None], drafts], axis=1)  # [R, 1 + num_drafts]
        logits, caches = prefill.decode_tokens(model, tokens, state.caches)

        # What the model draws after each of the tokens, if those before it are right.
        seen = [state.seen.at[rows, first].set(True)]
        for n in range(num_drafts):
            seen.append(seen[-1].at[rows, drafts[:, n]].set(True))
        seen = jnp.stack(seen, axis=1)  # [R, 1 + num_drafts, V]: after each token
        index = state.num[:, None] + 1 + jnp.arange(num_drafts)[None]
        drawn = draw(
            logits[:, :-1].reshape(R * num_drafts, -1),
            seen[:, :-1].reshape(R * num_drafts, -1),
            jnp.repeat(state.keys, num_drafts),
            index.reshape(-1),
        ).reshape(R, num_drafts)

        # A row keeps its tokens up to the first wrong draft, up to a stop token and up to `count`.
        stops = jnp.any(tokens[..., None] == stop_ids, axis=-1)
        right = jnp.concatenate([jnp.ones((R, 1), bool), (drawn == drafts) & ~stops[:, :-1]], axis=1)
        kept = jnp.cumprod(right, axis=1, dtype=jnp.int32)
        kept *= state.num[:, None] + jnp.arange(1 + num_drafts)[None] < count
        kept *= ~state.done[:, None]
        num_kept = jnp.sum(kept, axis=1)
        ended = jnp.any((kept == 1) & stops, axis=1)
        num = state.num + num_kept
        out = out.at[:, number].set(jnp.where((kept == 1) & ~stops, tokens, DONE_TOKEN))

        last = jnp.maximum(num_kept - 1, 0)
        text = text.at[rows[:, None], state.length[:, None] + jnp.arange(1 + num_drafts)[None]].set(tokens, mode="drop")
        caches = [rewind(cache, 1 + num_drafts - num_kept) for cache in caches]
        new = State(
            caches,
            logits[rows, last],
            state.done | ended | (num >= count),
            state.keys,
            num,
            seen[rows, last],
            text,
            state.length + num_kept,
        )
        return new, out, steps + ~state.done, number + 1

    out = jnp.full((R, STEPS, 1 + num_drafts), DONE_TOKEN, jnp.int32)
    carry = state, out, jnp.zeros(R, jnp.int32), jnp.int32(0)
    state, out, steps, _ = jax.lax.while_loop(is_running, step, carry)
    return state, out, steps
