"""What decoding remembers: one ring of keys and values a layer, filled from a prompt, then a token at a time.

    prompt   a b c d e f .     length 6; what is padded on the right is never seen, for attention is causal
    ring     e f c d           C = 4 slots: the token at position p lies in slot p % C, the newest one wins

A windowed layer needs no more slots than its window, so its cost and memory do not grow with the text.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from dantinox.config import ModelConfig
from dantinox.layers import rms_norm
from dantinox.model import Transformer
from kernels import KVCache

Array = jax.Array

SMALLEST_PROMPT = 16  # tokens; below this a smaller program would save nothing
SMALLEST_CONTEXT = 64


def slots(config: ModelConfig, context: int) -> tuple[int, ...]:
    """Slots C of each layer's ring, for texts of up to `context` tokens."""
    return tuple(config.layer_slots(layer, context) for layer in range(config.n_layers))


def bucket(size: int, smallest: int, largest: int | None = None) -> int:
    """The power of two, from `smallest` to `largest`, that holds `size`: few sizes, few programs."""
    power = max(smallest, 1 << (size - 1).bit_length())
    return power if largest is None else min(power, largest)


def empty(config: ModelConfig, batch: int, context: int) -> list[KVCache]:
    """Caches that no token has been written to, one a layer, in the model's dtype."""
    return [
        KVCache.zeros(batch, config.kv_heads, C, config.head_dim, jnp.dtype(config.dtype))
        for C in slots(config, context)
    ]


def fill(k: Array, v: Array, length: Array, slots: int) -> KVCache:
    """A ring of `slots` slots C that holds a prompt.

    Args:
        k: keys [B, T, K, D], rotated; v: values [B, T, K, D].
        length: tokens of each row that are real, [B] int32, 0 <= length <= T; the rest is padding.

    Returns:
        The cache: slot c holds the newest position p < length with p % C == c, or zeros where there is none.
    """
    used = min(slots, k.shape[1])
    slot = jnp.arange(used)[None]  # [1, used]
    newest = slot + (length[:, None] - 1 - slot) // slots * slots  # [B, used]; negative where there is none

    def ring(x: Array) -> Array:
        x = jnp.take_along_axis(x, jnp.maximum(newest, 0)[:, :, None, None], axis=1)
        x = jnp.where((newest >= 0)[:, :, None, None], x, 0).swapaxes(1, 2)  # [B, K, used, D]
        return jnp.pad(x, ((0, 0), (0, 0), (0, slots - used), (0, 0)))

    return KVCache(ring(k), ring(v), length.astype(jnp.int32))


def prefill(model: Transformer, tokens: Array, length: Array, slots: Sequence[int]) -> tuple[Array, list[KVCache]]:
    """Read whole prompts at once.

    Args:
        tokens: [B, T] int32, padded on the right with any id in range.
        length: [B] int32, 1 <= length <= T.
        slots: slots of each layer's ring.

    Returns:
        (logits after each row's last real token [B, V] float32, the filled caches).
    """
    h, _, kv = model.forward(tokens)
    last = jnp.take_along_axis(h, (length - 1)[:, None, None], axis=1)  # [B, 1, M]
    caches = [fill(k, v, length, C) for (k, v), C in zip(kv, slots, strict=True)]
    return model.logits(last)[:, 0], caches


def step(model: Transformer, token: Array, caches: Sequence[KVCache]) -> tuple[Array, list[KVCache]]:
    """Append one token a row: ids [B] int32 -> (logits [B, V] float32 of the next, the longer caches)."""
    h, rope = model.embed(token[:, None], caches[0].length[:, None])
    longer = []
    for layer, (block, cache) in enumerate(zip(model.blocks, caches, strict=True)):
        with jax.named_scope(f"block{layer}"):
            h, cache = block.step(h, rope, cache)
        longer.append(cache)
    return model.logits(rms_norm(h, model.norm, model.config.norm_eps))[:, 0], longer
