"""Rotary positions, and the ways to stretch them to contexts longer than trained on."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from dantinox.config import ModelConfig

Array = jax.Array


def frequencies(config: ModelConfig) -> tuple[np.ndarray, float]:
    """(radians a token of each pair of features [D / 2] float32, factor on the rotated vectors).

    linear   every pair turns rope_factor times slower
    ntk      stretches the base, so that the fastest pair stays and the slowest turns rope_factor times slower
    yarn     a ramp over the pairs: those that turn 32 times over the original context stay, those that turn once or
             less slow down (Peng et al., 2023, as its authors' code and Hugging Face have it); warms the softmax
    llama3   the same between 4 turns and 1, the ramp linear in the turns (Llama 3.1)
    """
    D, theta, factor, kind = config.head_dim, config.rope_theta, config.rope_factor, config.rope_scaling
    if kind == "ntk" and D > 2:
        theta = theta * factor ** (D / (D - 2))
    inverse = theta ** -(np.arange(0, D, 2) / D)
    if kind in ("none", "ntk") or factor == 1:
        return inverse.astype(np.float32), 1.0
    original = original_context(config)
    keep, magnitude = 0.0, 1.0  # keep: 1 for a pair that is left alone, 0 for one that slows down
    if kind == "yarn":
        # The pair, perhaps between two, that turns so many times.
        fast, slow = (D * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta)) for turns in (32, 1))
        first, last = max(math.floor(fast), 0), min(math.ceil(slow), D - 1)
        keep = 1 - np.clip((np.arange(D // 2) - first) / (last - first or 0.001), 0, 1)
        magnitude = 0.1 * math.log(factor) + 1
    elif kind == "llama3":
        keep = np.clip((original * inverse / (2 * math.pi) - 1) / (4 - 1), 0, 1)
    return (inverse * keep + inverse / factor * (1 - keep)).astype(np.float32), magnitude


def original_context(config: ModelConfig) -> int:
    """Tokens of the context that a stretched model was trained on."""
    return config.rope_original_context or max(1, round(config.max_context / config.rope_factor))


def rope_cos_sin(config: ModelConfig, positions: Array) -> tuple[Array, Array]:
    """(cos, sin), each [..., D / 2] float32, for int32 positions [...]."""
    inverse, magnitude = frequencies(config)
    angle = positions[..., None].astype(jnp.float32) * inverse
    return jnp.cos(angle) * magnitude, jnp.sin(angle) * magnitude


@jax.named_scope("rope")
def apply_rope(x: Array, cos: Array, sin: Array) -> Array:
    """Turn feature i with feature i + D / 2. x [..., T, H, D]; cos and sin [..., T, D / 2]."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
