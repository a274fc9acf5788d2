"""The compiled programs of generation: prefill a chunk, draw the first tokens, decode a chunk.

Weights, caches, seed and sampling settings are arguments, so that only a new size compiles. A token is drawn as soon as
its logits are known, and enters the caches with the next step: the last token of a text costs no step.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dantinox.inference import prefill
from dantinox.inference.chunk import DONE_TOKEN
from dantinox.inference.sampling import Sampling, apply_repetition_penalty, sample
from dantinox.kernels import KVCache

Array = jax.Array

PREFILL_CHUNK = 2048  # tokens per prompt and prefill step
CHUNK = 64  # tokens per sequence and host sync, which is also when Ctrl-C is handled


class Start(NamedTuple):
    """State after the prompts, with R = prompts * samples rows.

    Attributes:
        logits: logits of the next token, [R, V] float32.
        caches: one per layer, with R rows.
        keys: random keys [R].
        seen: which tokens occur in the prompt, bool [R, V].
    """

    logits: Array
    caches: list[KVCache]
    keys: Array
    seen: Array


class State(NamedTuple):
    """State of decoding between two steps of R rows.

    Attributes:
        caches: one per layer, with R rows.
        token: the token of each row that was drawn last and is not in the caches yet, [R] int32.
        done: whether each row has ended, bool [R].
        keys: random keys [R].
        step: number of tokens drawn so far per row, int32.
        seen: which tokens occur in the prompt and the text so far, bool [R, V].
    """

    caches: list[KVCache]
    token: Array
    done: Array
    keys: Array
    step: Array
    seen: Array

    @property
    def ids(self) -> Array:
        """The tokens that were drawn last, [R] int32; DONE_TOKEN for rows that have ended."""
        return jnp.where(self.done, DONE_TOKEN, self.token)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=7)
def prefill_chunk(
    graph: Any,
    slots: tuple[int, ...],
    past: int,
    weights: Any,
    tokens: Array,
    start: Array,
    lengths: Array,
    prefilled: prefill.PrefillState | None,
) -> prefill.PrefillState:
    """Prefill one more chunk [B, T] of the prompts."""
    return prefill.prefill_chunk(nnx.merge(graph, weights), tokens, start, lengths, prefilled or slots, past)


def _repeat(
    graph: Any, weights: Any, last: Array, seed: Array, samples: Array, caches: list[KVCache], seen: Array
) -> Start:
    """Repeat the state of each prompt for all its samples."""
    logits, prompts = nnx.merge(graph, weights).logits(last), last.shape[0]
    if samples.size > 1:
        logits, caches, seen = jax.tree.map(lambda x: jnp.repeat(x, samples.size, axis=0), (logits, caches, seen))
    root = jax.random.key(seed, impl="threefry2x32")
    keys = jax.vmap(jax.random.fold_in, (None, 0))(root, jnp.tile(samples, prompts))
    return Start(logits, caches, keys, seen)


def _start(
    graph: Any,
    weights: Any,
    last: Array,
    seed: Array,
    samples: Array,
    caches: list[KVCache],
    seen: Array,
    sampling: Sampling,
    stop_ids: Array,
) -> tuple[State, Array]:
    """Draw the first token of every row -> (state, ids [R])."""
    first = _repeat(graph, weights, last, seed, samples, caches, seen)
    R = first.keys.size
    state = State(first.caches, jnp.zeros(R, jnp.int32), jnp.zeros(R, bool), first.keys, jnp.int32(0), first.seen)
    state = _draw(first.logits, state, sampling, stop_ids)
    return state, state.ids


repeat_prompts = jax.jit(_repeat, static_argnums=0)
# A single sample per prompt decodes in the prefill caches themselves.
repeat_prompts_in_place = jax.jit(_repeat, static_argnums=0, donate_argnums=5)
start = jax.jit(_start, static_argnums=0)
start_in_place = jax.jit(_start, static_argnums=0, donate_argnums=5)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def decode_chunk(
    graph: Any, weights: Any, state: State, sampling: Sampling, stop_ids: Array, count: Array
) -> tuple[State, Array]:
    """Decode up to `count` tokens per row -> (state, ids [R, CHUNK]), DONE_TOKEN after the end of a row."""
    model = nnx.merge(graph, weights)
    first = state.step

    def is_running(carry: tuple[State, Array]) -> Array:
        state, _ = carry
        return (state.step - first < count) & ~jnp.all(state.done)

    def step(carry: tuple[State, Array]) -> tuple[State, Array]:
        state, out = carry
        logits, caches = prefill.decode_step(model, state.token, state.caches)
        new = _draw(logits, state._replace(caches=caches), sampling, stop_ids)
        return new, jax.lax.dynamic_update_slice(out, new.ids[:, None], (jnp.int32(0), state.step - first))

    out = jnp.full((state.done.size, CHUNK), DONE_TOKEN, jnp.int32)
    return jax.lax.while_loop(is_running, step, (state, out))


def _draw(logits: Array, state: State, sampling: Sampling, stop_ids: Array) -> State:
    """Draw the next token of every row."""
    keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, state.step)
    token = sample(apply_repetition_penalty(logits, state.seen, sampling), sampling, keys)
    done = state.done | jnp.any(token[:, None] == stop_ids[None], axis=-1)
    seen = state.seen.at[jnp.arange(token.size), token].set(True, unique_indices=True)
    return state._replace(token=token, done=done, step=state.step + 1, seen=seen)


def cast_weights(weights: Any, dtype: str) -> Any:
    """Cast the matrices once to the dtype that every matmul would cast them to at each step."""
    if dtype == "float32" or all(w.ndim < 2 or w.dtype == dtype for w in jax.tree.leaves(weights)):
        return weights
    return _cast(weights, dtype)


@functools.partial(jax.jit, static_argnums=1)
def _cast(weights: Any, dtype: str) -> Any:
    return jax.tree.map(lambda w: w.astype(dtype) if w.ndim > 1 else w, weights)
