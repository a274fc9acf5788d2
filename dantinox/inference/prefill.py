"""What decoding remembers: one ring of keys and values a layer, filled from a prompt, then a token at a time.

    prompt   a b c d e f .     length 6; what is padded on the right is never seen, for attention is causal
    ring     e f c d           C = 4 slots: the token at position p lies in slot p % C, the newest one wins

A windowed layer needs no more slots than its window, so its cost and memory do not grow with the text.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dantinox.config import ModelConfig
from dantinox.kernels import KVCache
from dantinox.kernels.ops.decode_attention.kv_cache import dequantize, quantize
from dantinox.model.attention import PastKeyValues
from dantinox.model.layers import rms_norm
from dantinox.model.transformer import Transformer

Array = jax.Array

SMALLEST_PROMPT = 16  # tokens; below this a smaller program would save nothing
SMALLEST_CONTEXT = 64


def layer_cache_slots(config: ModelConfig, context: int) -> tuple[int, ...]:
    """Slots C of each layer's ring, for texts of up to `context` tokens."""
    return tuple(config.layer_slots(layer, context) for layer in range(config.n_layers))


def round_up_to_bucket(size: int, smallest: int, largest: int | None = None) -> int:
    """The power of two, from `smallest` to `largest`, that holds `size`: few sizes, few programs."""
    power = max(smallest, 1 << (size - 1).bit_length())
    return power if largest is None else min(power, largest)


def init_caches(config: ModelConfig, batch: int, slots: Sequence[int]) -> list[KVCache]:
    """Caches that no token has been written to, of so many slots a layer, in the dtype that the config asks for."""
    dtype = jnp.dtype({"auto": config.dtype, "int8": "int8", "fp8": "float8_e4m3fn"}[config.kv_cache_dtype])
    return [KVCache.zeros(batch, config.n_kv_heads, C, config.resolved_head_dim, dtype) for C in slots]


def append_to_cache(cache: KVCache, k: Array, v: Array, count: Array) -> KVCache:
    """Many tokens at once, in place where the cache is donated.

    Args:
        k: keys [B, T, K, D], rotated; v: values [B, T, K, D].
        count: tokens of each row that are real, [B] int32, 0 <= count <= T; what stands right of them is dropped.

    Returns:
        The cache with length + count tokens: slot c holds the newest position p with p % C == c.
    """
    (B, T), C = k.shape[:2], cache.k.shape[2]
    length = cache.length + count.astype(jnp.int32)
    place = jnp.arange(T)[None]
    position = cache.length[:, None] + place  # [B, T]
    # Of two tokens for one slot the newer one is written; what is dropped is sent past the ring.
    slot = jnp.where((place < count[:, None]) & (position >= length[:, None] - C), position % C, C + place)

    def written(ring: Array | None, x: Array | None) -> Array | None:
        if ring is None:
            return None
        # Split indices put their axes first: [B, T, K, ...], as x has them.
        return ring.at[jnp.arange(B)[:, None], :, slot].set(x, mode="drop", unique_indices=True)

    (k, k_scale), (v, v_scale) = (quantize(x, cache.k.dtype) for x in (k, v))
    rings = written(cache.k, k), written(cache.v, v), length
    return KVCache(*rings, written(cache.k_scale, k_scale), written(cache.v_scale, v_scale))


def gather_past(cache: KVCache, start: Array, count: int, dtype: jnp.dtype) -> PastKeyValues:
    """The `count` positions before position `start`, oldest first, in `dtype`; count <= C."""
    position = start - count + jnp.arange(count)
    slot = position % cache.k.shape[2]

    def read(ring: Array, scale: Array | None) -> Array:
        values = jnp.take(ring, slot, axis=2)
        scale = None if scale is None else jnp.take(scale, slot, axis=2)
        return dequantize(values, scale, dtype).swapaxes(1, 2)

    k, v = read(cache.k, cache.k_scale), read(cache.v, cache.v_scale)
    return k, v, jnp.broadcast_to(position >= 0, (cache.k.shape[0], count))


class PrefillState(NamedTuple):
    """How far prompts have been read.

    Attributes:
        last: final hidden state [B, M] of each row's last real token, once it has been read.
        caches: one a layer.
    """

    last: Array
    caches: list[KVCache]


def prefill_chunk(
    model: Transformer, tokens: Array, start: Array, length: Array, prefilled: PrefillState | Sequence[int], past: int
) -> PrefillState:
    """Read one chunk of the prompts: its memory is the caches' and the chunk's, however long they are.

    Args:
        tokens: [B, T] int32, positions start .. start + T - 1, padded on the right with any id in range.
        start: int32 scalar, a position of all rows.
        length: tokens of the whole prompts, [B] int32.
        reading: what the chunks before this one left; for the first chunk the slots of each layer's ring.
        past: positions before `start` that are looked at, at least `start` of them; 0 for the first chunk.

    Returns:
        The reading with this chunk in it.
    """
    B, T = tokens.shape
    if not isinstance(prefilled, PrefillState):
        unread = jnp.zeros((B, model.config.dim), jnp.dtype(model.config.dtype))
        prefilled = PrefillState(unread, init_caches(model.config, B, prefilled))
    before = None
    if past:
        dtype = prefilled.last.dtype
        before = [gather_past(cache, start, min(past, cache.k.shape[2]), dtype) for cache in prefilled.caches]
    h, _, kv = model.forward(tokens, start=start, past=before)
    place = length - 1 - start
    here = jnp.take_along_axis(h, jnp.clip(place, 0, T - 1)[:, None, None], axis=1)[:, 0]
    last = jnp.where(((place >= 0) & (place < T))[:, None], here, prefilled.last)
    count = jnp.clip(length - start, 0, T)
    return PrefillState(
        last, [append_to_cache(cache, k, v, count) for (k, v), cache in zip(kv, prefilled.caches, strict=True)]
    )


def prefill(model: Transformer, tokens: Array, length: Array, slots: Sequence[int]) -> tuple[Array, list[KVCache]]:
    """Read whole prompts at once.

    Args:
        tokens: [B, T] int32, padded on the right with any id in range.
        length: [B] int32, 1 <= length <= T.
        slots: slots of each layer's ring.

    Returns:
        (logits after each row's last real token [B, V] float32, the filled caches).
    """
    last, caches = prefill_chunk(model, tokens, jnp.int32(0), length, slots, 0)
    return model.logits(last), caches


def decode_step(model: Transformer, token: Array, caches: Sequence[KVCache]) -> tuple[Array, list[KVCache]]:
    """Append one token a row: ids [B] int32 -> (logits [B, V] float32 of the next, the longer caches)."""
    h, rope = model.embed(token[:, None], caches[0].length[:, None])
    longer = []
    for layer, (block, cache) in enumerate(zip(model.blocks, caches, strict=True)):
        with jax.named_scope(f"block{layer}"):
            h, cache = block.decode_step(h, rope, cache)
        longer.append(cache)
    return model.logits(rms_norm(h, model.final_norm, model.config.norm_eps))[:, 0], longer
