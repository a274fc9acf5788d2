"""One text that grows by turns: its keys and values stay in the cache, so each turn prefills its new tokens only.

The ring buffers of layers without a window have a power of two of slots, and grow with the text.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dantinox.config.validation import check_int
from dantinox.distributed.inference import kernels_on, mesh_of
from dantinox.inference import prefill
from dantinox.inference.checks import check_stop_tokens
from dantinox.inference.chunk import DONE_TOKEN
from dantinox.inference.generate import (
    CHUNK,
    PREFILL_CHUNK,
    STREAM_LATENCY_S,
    _cast_weights,
    _decode_steps,
    _init_decode_in_place,
    _prefill_chunk,
    context_limit,
    why_context_limited,
)
from dantinox.inference.sampling import Sampling
from dantinox.kernels import KVCache, rewind
from dantinox.model.transformer import Transformer

SMALLEST_CONTEXT = 256


class ContextFullError(ValueError):
    """The text and the new tokens do not fit in the context of the model; the text is as it was."""


class Conversation:
    """A text of which the model writes every other part.

    Attributes:
        tokens: ids of the text, all of which are in the cache.
        limit: maximum number of tokens; None: unlimited.
        ended: why the last reply ended: "stop" (a stop token), "count", "context" or "interrupt".
    """

    def __init__(
        self,
        model: Transformer,
        sampling: Sampling,
        *,
        seed: int = 0,
        stop_tokens: Iterable[int] = (),
        prefill_chunk: int | None = None,
    ) -> None:
        """Start an empty text; arguments as those of `generate`, which are checked here."""
        self.config, self.sampling, self.mesh = model.config, sampling, mesh_of(nnx.state(model))
        self.seed = np.uint32(check_int("seed", seed, 0, 2**32))
        self.stop_ids = check_stop_tokens(stop_tokens, self.config.vocab_size)
        self.chunk = PREFILL_CHUNK
        if prefill_chunk is not None:
            self.chunk = check_int("prefill_chunk", prefill_chunk, 1, off="None")
        self.graph, weights = nnx.split(model)
        self.weights = _cast_weights(weights, self.config.dtype)
        self.limit = context_limit(self.config)
        self.turns, self.ended = 0, "stop"
        self.reset()

    def reset(self) -> None:
        """Forget the text."""
        self.tokens: list[int] = []
        self.caches: list[KVCache] | None = None
        self.context = 0

    def keep(self, count: int) -> None:
        """Forget all but the first tokens, `count` of them or none: as many as the cache can be rewound to."""
        taken_back = len(self.tokens) - count
        if not taken_back or self.caches is None:
            return
        # The ring buffer of a window that has wrapped lost the tokens that the last ones overwrote, of which the next
        # query would see all but the first.
        if count == 0 or (taken_back > 1 and any(len(self.tokens) > cache.k.shape[2] for cache in self.caches)):
            self.reset()
            return
        self.caches = [rewind(cache, taken_back) for cache in self.caches]
        del self.tokens[count:]

    def reply(
        self, new_tokens: Sequence[int], max_new_tokens: int, interrupted: Callable[[], bool] = lambda: False
    ) -> Iterator[list[int]]:
        """Append tokens, and yield the ids with which the model continues, in chunks as they are decoded.

        Args:
            new_tokens: at least one id.
            max_new_tokens: maximum number of ids of the reply.
            interrupted: asked between two chunks; True ends the reply.

        Raises:
            ContextFullError: the tokens leave no place for a reply.
        """
        length = len(self.tokens) + len(new_tokens)
        if self.limit is not None and length >= self.limit:
            raise ContextFullError(
                f"the context of {self.limit} tokens is full ({why_context_limited(self.config)}): "
                f"{len(self.tokens)} so far and {len(new_tokens)} new ones leave no place for an answer"
            )
        return self._reply(np.asarray(new_tokens, np.int32), max_new_tokens, interrupted)

    def _reply(self, new_tokens: np.ndarray, count: int, interrupted: Callable[[], bool]) -> Iterator[list[int]]:
        last = self._prefill(new_tokens)
        seen = np.zeros((1, self.config.vocab_size), bool)
        seen[0, self.tokens] = True
        self.turns += 1
        samples = np.array([self.turns], np.int32)
        with kernels_on(self.mesh):
            state = _init_decode_in_place(self.graph, self.weights, last, self.seed, samples, self.caches, seen)
        size, self.ended = 1, "count"
        while count:
            room = CHUNK if self.limit is None else self.limit - len(self.tokens)
            if interrupted() or not room:
                self.ended = "context" if not room else "interrupt"
                break
            start, size = time.perf_counter(), min(size, count, room)
            state = state._replace(caches=self._with_room(state.caches, size))
            with kernels_on(self.mesh):
                state, new = _decode_steps(
                    self.graph, self.weights, state, self.sampling, self.stop_ids, np.int32(size)
                )
            ids = np.asarray(new)[0, :size]
            ids = ids[ids != DONE_TOKEN].tolist()
            self.caches = state.caches
            self.tokens += ids
            count -= len(ids)
            if is_done := len(ids) < size:
                # The stop token is in the cache; what comes next says it again.
                self.caches, self.ended, count = [rewind(cache, 1) for cache in state.caches], "stop", 0
            if ids:
                yield ids
            if not is_done:
                size = max(1, min(CHUNK, int(size * STREAM_LATENCY_S / (time.perf_counter() - start))))

    def _prefill(self, new_tokens: np.ndarray) -> jax.Array:
        """Append tokens to the cache and return the final hidden state [1, M] of the last one."""
        first, end = len(self.tokens), len(self.tokens) + len(new_tokens)
        self.caches = self._with_room(self.caches, len(new_tokens) + 1)
        last = jnp.zeros((1, self.config.dim), jnp.dtype(self.config.dtype))
        length = np.array([end], np.int32)
        for start in range(first, end, self.chunk):
            part = new_tokens[start - first : start - first + self.chunk]
            size = prefill.round_up_to_bucket(len(part), prefill.SMALLEST_PROMPT, self.limit)
            padded = np.zeros((1, size), np.int32)
            padded[0, : len(part)] = part
            state, slots = prefill.PrefillState(last, self.caches), prefill.layer_cache_slots(self.config, self.context)
            with kernels_on(self.mesh):
                state = _prefill_chunk(
                    self.graph,
                    slots,
                    self.context if start else 0,
                    self.weights,
                    padded,
                    np.int32(start),
                    np.minimum(length, start + len(part)),
                    state,
                )
            last, self.caches = state.last, state.caches
            self.tokens += part.tolist()
        return last

    def _with_room(self, caches: list[KVCache] | None, count: int) -> list[KVCache]:
        """Return caches with slots for `count` more tokens."""
        needed = len(self.tokens) + count
        if caches is not None and needed <= self.context:
            return caches
        self.context = prefill.round_up_to_bucket(needed, SMALLEST_CONTEXT, self.limit)
        slots = prefill.layer_cache_slots(self.config, self.context)
        if caches is None:
            return prefill.init_caches(self.config, 1, slots)
        return [_grown(cache, C) for cache, C in zip(caches, slots, strict=True)]


def _grown(cache: KVCache, slots: int) -> KVCache:
    """Return a cache with more slots; one that has wrapped, which is as large as its window, stays."""

    def grow(x: jax.Array | None) -> jax.Array | None:
        if x is None or x.shape[2] == slots:
            return x
        return jnp.pad(x, [(0, slots - size if axis == 2 else 0) for axis, size in enumerate(x.shape)])

    return KVCache(grow(cache.k), grow(cache.v), cache.length, grow(cache.k_scale), grow(cache.v_scale))
