"""Rotary positions, with NTK and YaRN stretching to contexts longer than trained on."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from dantinox.config import ModelConfig

Array = jax.Array


def frequencies(config: ModelConfig) -> tuple[np.ndarray, float]:
    """(radians a token of each pair of features [D / 2] float32, factor on the rotated vectors).

    ntk stretches the base so that the slowest pair turns rope_factor times slower; yarn slows only the pairs that turn
    less than a few times over the original context and warms the softmax (Peng et al., 2023).
    """
    D, theta, factor = config.head_dim, config.rope_theta, config.rope_factor
    pair = np.arange(0, D, 2) / D
    if config.rope_scaling == "ntk" and D > 2:
        theta = theta * factor ** (D / (D - 2))
    inverse = theta**-pair
    if config.rope_scaling != "yarn" or factor == 1:
        return inverse.astype(np.float32), 1.0
    original = config.rope_original_context or max(1, round(config.max_context / factor))
    turns = original * inverse / (2 * math.pi)
    keep = np.clip((turns - 1) / (32 - 1), 0, 1)  # 1: fast pair, left alone; 0: slow pair, interpolated
    inverse = inverse * keep + inverse / factor * (1 - keep)
    return inverse.astype(np.float32), 0.1 * math.log(factor) + 1


def rotation(config: ModelConfig, positions: Array) -> tuple[Array, Array]:
    """(cos, sin), each [..., D / 2] float32, for int32 positions [...]."""
    inverse, magnitude = frequencies(config)
    angle = positions[..., None].astype(jnp.float32) * inverse
    return jnp.cos(angle) * magnitude, jnp.sin(angle) * magnitude


@jax.named_scope("rope")
def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Turn feature i with feature i + D / 2. x [..., T, H, D]; cos and sin [..., T, D / 2]."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
