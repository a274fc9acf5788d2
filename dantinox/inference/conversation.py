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
from dantinox.inference import decoding, prefill
from dantinox.inference.checks import check_stop_tokens
from dantinox.inference.chunk import DONE_TOKEN
from dantinox.inference.generate import STREAM_LATENCY_S, context_limit, why_context_limited
from dantinox.inference.sampling import Sampling
from dantinox.kernels import KVCache, rewind
from dantinox.model.transformer import Transformer

SMALLEST_CONTEXT = 256


class ContextFullError(ValueError):
    """The text and the new tokens do not fit in the context of the model; the text is as it was."""


class Conversation:
    """A text of which the model writes every other part.

    Attributes:
        tokens: ids of the text, all of which are in the cache but for the last one of an answer.
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
        self.chunk = decoding.PREFILL_CHUNK
        if prefill_chunk is not None:
            self.chunk = check_int("prefill_chunk", prefill_chunk, 1, off="None")
        self.graph, weights = nnx.split(model)
        self.weights = decoding.cast_weights(weights, self.config.dtype)
        self.limit = context_limit(self.config)
        self.turns, self.ended = 0, "stop"
        self.reset()

    def reset(self) -> None:
        """Forget the text."""
        self.tokens: list[int] = []
        self.caches: list[KVCache] | None = None
        self.context, self._unread = 0, 0  # tokens at the end that are not in the cache

    def keep(self, count: int) -> None:
        """Forget all but the first tokens, `count` of them or none: as many as the cache can be rewound to."""
        cached = len(self.tokens) - self._unread
        taken_back = max(cached - count, 0)
        # The ring buffer of a window that has wrapped lost the tokens that the last ones overwrote, of which the next
        # query would see all but the first.
        has_wrapped = any(cached > cache.k.shape[2] for cache in self.caches or [])
        if count == 0 or (taken_back > 1 and has_wrapped):
            self.reset()
            return
        if self.caches is not None and taken_back:
            self.caches = [rewind(cache, taken_back) for cache in self.caches]
        del self.tokens[count:]
        self._unread = max(count - cached, 0)

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
        self.ended = "interrupt" if count else "count"
        if not count or interrupted():
            return
        model = self.graph, self.weights
        with kernels_on(self.mesh):
            state, new = decoding.start_in_place(
                *model, last, self.seed, samples, self.caches, seen, self.sampling, self.stop_ids
            )
        drawn, size = np.asarray(new), 1
        while True:
            ids = drawn[drawn != DONE_TOKEN].tolist()
            is_done = len(ids) < len(drawn)
            self.caches, self._unread = state.caches, int(not is_done)  # a stop token is not part of the text
            self.tokens += ids
            count -= len(ids)
            room = decoding.CHUNK if self.limit is None else self.limit - len(self.tokens)
            self.ended = "stop" if is_done else "count" if not count else "context"
            if ids:
                yield ids
            if is_done or not count or not room:
                return
            if interrupted():
                self.ended = "interrupt"
                return
            start, size = time.perf_counter(), min(size, count, room)
            state = state._replace(caches=self._with_room(state.caches, size))
            with kernels_on(self.mesh):
                state, new = decoding.decode_chunk(*model, state, self.sampling, self.stop_ids, np.int32(size))
            drawn = np.asarray(new)[0, :size]
            size = max(1, min(decoding.CHUNK, int(size * STREAM_LATENCY_S / (time.perf_counter() - start))))

    def _prefill(self, new_tokens: np.ndarray) -> jax.Array:
        """Append tokens to the cache and return the final hidden state [1, M] of the last one."""
        first = len(self.tokens) - self._unread
        new_tokens = np.concatenate([np.array(self.tokens[first:], np.int32), new_tokens])
        del self.tokens[first:]
        end, self._unread = first + len(new_tokens), 0
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
                state = decoding.prefill_chunk(
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
