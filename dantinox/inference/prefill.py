"""Prefill: the KV cache is one ring buffer of keys and values per layer, filled from a prompt, then by decoding.

    prompt   a b c d e f .     length 6; causal attention never attends to the padding on the right
    ring     e f c d           C = 4 slots: the token at position p is in slot p % C, where it replaces older ones

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
from dantinox.model.layers import norm
from dantinox.model.transformer import Transformer

Array = jax.Array

SMALLEST_PROMPT = 16  # tokens; a smaller program would not be faster
SMALLEST_CONTEXT = 64


def layer_cache_slots(config: ModelConfig, context: int, drafts: int = 0) -> tuple[int, ...]:
    """Return the slots C of each layer's ring buffer, for texts of up to `context` tokens.

    Drafts that are not accepted must not overwrite what the window still shows, so they have slots of their own.
    """
    return tuple(config.layer_slots(layer, context, drafts) for layer in range(config.n_layers))


def round_up_to_bucket(size: int, smallest: int, largest: int | None = None) -> int:
    """Round `size` up to a power of two from `smallest` to `largest`, so that few sizes are compiled."""
    power = max(smallest, 1 << (size - 1).bit_length())
    return power if largest is None else min(power, largest)


def init_caches(config: ModelConfig, batch: int, slots: Sequence[int]) -> list[KVCache]:
    """Return empty caches with `slots` per layer, in the dtype of `config.kv_cache_dtype`."""
    dtype = jnp.dtype({"auto": config.resolved_dtype, "int8": "int8", "fp8": "float8_e4m3fn"}[config.kv_cache_dtype])
    return [KVCache.zeros(batch, config.n_kv_heads, C, config.resolved_head_dim, dtype) for C in slots]


def append_to_cache(cache: KVCache, k: Array, v: Array, count: Array) -> KVCache:
    """Append several tokens per row, in place if the cache is donated.

    Args:
        cache: the cache.
        k: keys [B, T, K, D], rotated.
        v: values [B, T, K, D].
        count: number of tokens per row, [B] int32, 0 <= count <= T; the padding after them is dropped.

    Returns:
        The cache with length + count tokens: slot c has the newest position p with p % C == c.
    """
    (B, T), C = k.shape[:2], cache.k.shape[2]
    length = cache.length + count.astype(jnp.int32)
    index = jnp.arange(T)[None]
    position = cache.length[:, None] + index  # [B, T]
    # Of two tokens for one slot the newer one is written. Slots past the ring buffer are dropped.
    slot = jnp.where((index < count[:, None]) & (position >= length[:, None] - C), position % C, C + index)

    def write_slots(ring: Array | None, x: Array | None) -> Array | None:
        if ring is None:
            return None
        # Separated advanced indices put their axes first: [B, T, K, ...], as in x.
        return ring.at[jnp.arange(B)[:, None], :, slot].set(x, mode="drop", unique_indices=True)

    (k, k_scale), (v, v_scale) = (quantize(x, cache.k.dtype) for x in (k, v))
    return KVCache(
        write_slots(cache.k, k),
        write_slots(cache.v, v),
        length,
        write_slots(cache.k_scale, k_scale),
        write_slots(cache.v_scale, v_scale),
    )


def gather_past(cache: KVCache, start: Array, count: int, dtype: jnp.dtype) -> PastKeyValues:
    """Return keys and values of the `count` positions before `start`, oldest first, in `dtype`; count <= C."""
    position = start - count + jnp.arange(count)
    slot = position % cache.k.shape[2]

    def read_slots(ring: Array, scale: Array | None) -> Array:
        values = jnp.take(ring, slot, axis=2)
        scale = None if scale is None else jnp.take(scale, slot, axis=2)
        return dequantize(values, scale, dtype).swapaxes(1, 2)

    k, v = read_slots(cache.k, cache.k_scale), read_slots(cache.v, cache.v_scale)
    return k, v, jnp.broadcast_to(position >= 0, (cache.k.shape[0], count))


class PrefillState(NamedTuple):
    """State of the prefill between two chunks.

    Attributes:
        last: final hidden state [B, M] of the last token of each prompt; zeros until that token is prefilled.
        caches: one per layer.
    """

    last: Array
    caches: list[KVCache]


def prefill_chunk(
    model: Transformer, tokens: Array, start: Array, length: Array, prefilled: PrefillState | Sequence[int], past: int
) -> PrefillState:
    """Prefill one chunk of the prompts, in the memory of the caches and of the chunk.

    Args:
        model: the model.
        tokens: [B, T] int32, positions start .. start + T - 1, padded on the right with any valid id.
        start: int32 scalar, the first position of the chunk in all rows.
        length: number of tokens per prompt, [B] int32.
        prefilled: state after the previous chunk; for the first chunk the slots of each layer's ring buffer.
        past: number of positions before `start` to attend to, at least `start`; 0 for the first chunk.

    Returns:
        The state after this chunk.
    """
    B, T = tokens.shape
    if not isinstance(prefilled, PrefillState):
        last = jnp.zeros((B, model.config.dim), jnp.dtype(model.config.dtype))
        prefilled = PrefillState(last, init_caches(model.config, B, prefilled))
    past_kv = None
    if past:
        dtype = prefilled.last.dtype
        past_kv = [gather_past(cache, start, min(past, cache.k.shape[2]), dtype) for cache in prefilled.caches]
    h, _, kv = model.forward(tokens, start=start, past=past_kv)
    last_index = length - 1 - start
    h_last = jnp.take_along_axis(h, jnp.clip(last_index, 0, T - 1)[:, None, None], axis=1)[:, 0]
    last = jnp.where(((last_index >= 0) & (last_index < T))[:, None], h_last, prefilled.last)
    count = jnp.clip(length - start, 0, T)
    return PrefillState(
        last, [append_to_cache(cache, k, v, count) for (k, v), cache in zip(kv, prefilled.caches, strict=True)]
    )


def prefill(model: Transformer, tokens: Array, length: Array, slots: Sequence[int]) -> tuple[Array, list[KVCache]]:
    """Prefill the prompts in one chunk.

    Args:
        model: the model.
        tokens: [B, T] int32, padded on the right with any valid id.
        length: number of tokens per prompt, [B] int32, 1 <= length <= T.
        slots: slots of each layer's ring buffer.

    Returns:
        (logits [B, V] float32 after the last token of each prompt, the filled caches).
    """
    last, caches = prefill_chunk(model, tokens, jnp.int32(0), length, slots, 0)
    return model.logits(last), caches


def decode_step(model: Transformer, token: Array, caches: Sequence[KVCache]) -> tuple[Array, list[KVCache]]:
    """Decode one token per row: ids [B] int32 -> (logits [B, V] float32 of the next token, the longer caches)."""
    logits, caches = decode_tokens(model, token[:, None], caches)
    return logits[:, 0], caches


def decode_tokens(model: Transformer, tokens: Array, caches: Sequence[KVCache]) -> tuple[Array, list[KVCache]]:
    """Decode T tokens per row: ids [B, T] int32 -> (logits [B, T, V] float32 after each token, the longer caches)."""
    length = caches[0].length  # of every layer: as one array, so that layers share the tables of their kernels
    h, ropes = model.embed(tokens, length[:, None] + jnp.arange(tokens.shape[1])[None])
    new_caches = []
    for layer, (block, cache) in enumerate(zip(model.blocks, caches, strict=True)):
        with jax.named_scope(f"block{layer}"):
            h, cache = block.decode_step(h, ropes, cache._replace(length=length))
        new_caches.append(cache)
    return model.logits(norm(h, model.final_norm, model.config)), new_caches
