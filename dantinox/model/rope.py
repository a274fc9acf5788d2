"""Rotary position embeddings (RoPE), and their scaling to contexts longer than the one trained on."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from dantinox.config import ModelConfig

Array = jax.Array
Ropes = dict[str, tuple[Array, Array]]
"""(cos, sin) of the positions of a text, each [..., T, D / 2], by `ModelConfig.layer_rope`; empty without any."""


def rope_frequencies(config: ModelConfig) -> tuple[np.ndarray, float]:
    """Return the rotary frequencies of a model.

    linear   divides every frequency by rope_factor
    ntk      enlarges the base: the highest frequency stays, the lowest is divided by rope_factor
    yarn     interpolates over the frequencies: those with 32 rotations or more over the original context stay, those
             with one or fewer are divided; rope_truncate rounds these bounds to whole pairs; scales the vectors too
             (Peng et al., 2023, as implemented by Hugging Face)
    llama3   as yarn, between 4 rotations and 1 and linear in the number of rotations; no scaling (Llama 3.1)

    Returns:
        (radians per token of each pair of features [D / 2] float32, factor on the rotated vectors).
    """
    D, theta, factor, scaling = config.resolved_head_dim, config.rope_theta, config.rope_factor, config.rope_scaling
    if scaling == "ntk" and D > 2:
        theta = theta * factor ** (D / (D - 2))
    inv_freq = theta ** -(np.arange(0, D, 2) / D)
    if scaling in ("none", "ntk") or factor == 1:
        return inv_freq.astype(np.float32), 1.0
    original = original_context(config)
    unscaled_fraction, attention_factor = 0.0, 1.0  # 1: the frequency stays, 0: it is divided by the factor
    if scaling == "yarn":
        # The pairs, perhaps fractional, with 32 rotations and with one.
        high, low = (
            D * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta)) for rotations in (32, 1)
        )
        if config.rope_truncate:
            high, low = math.floor(high), math.ceil(low)
        first, last = max(high, 0), min(low, D - 1)
        unscaled_fraction = 1 - np.clip((np.arange(D // 2) - first) / (last - first or 0.001), 0, 1)
        attention_factor = 0.1 * math.log(factor) + 1
    elif scaling == "llama3":
        num_rotations = original * inv_freq / (2 * math.pi)
        unscaled_fraction = np.clip((num_rotations - 1) / (4 - 1), 0, 1)
    scaled = inv_freq * unscaled_fraction + inv_freq / factor * (1 - unscaled_fraction)
    return scaled.astype(np.float32), attention_factor


def original_context(config: ModelConfig) -> int:
    """Return the context length, in tokens, that a model with scaled frequencies was trained on."""
    return config.rope_original_context or max(1, round(config.max_context / config.rope_factor))


def ropes_at(config: ModelConfig, positions: Array) -> Ropes:
    """Return (cos, sin) of int32 positions [...] for each kind of rotary positions that a layer has."""
    kinds = {config.layer_rope(layer) for layer in range(config.n_layers)}
    ropes = {}
    if "plain" in kinds:
        ropes["plain"] = rope_cos_sin(config, positions)
    if "windowed" in kinds:
        windowed = dataclasses.replace(config, rope_theta=config.rope_theta_windowed, rope_scaling="none")
        ropes["windowed"] = rope_cos_sin(windowed, positions)
    return ropes


def rope_cos_sin(config: ModelConfig, positions: Array) -> tuple[Array, Array]:
    """Return (cos, sin), each [..., D / 2] float32, of int32 positions [...]."""
    inv_freq, attention_factor = rope_frequencies(config)
    angles = positions[..., None].astype(jnp.float32) * np.expand_dims(inv_freq, tuple(range(positions.ndim)))
    return jnp.cos(angles) * attention_factor, jnp.sin(angles) * attention_factor


@jax.named_scope("rope")
def apply_rope(x: Array, cos: Array, sin: Array) -> Array:
    """Rotate each pair of features (i, i + D / 2) of x [..., T, H, D]; cos and sin are [..., T, D / 2]."""
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)


def positions_in_segments(segment_ids: Array) -> Array:
    """Return the position of each token in its segment, [B, T] int32, for contiguous segments."""
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
    begins = jnp.concatenate(
        [jnp.ones_like(segment_ids[:, :1], bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1
    )
    return index - jax.lax.cummax(jnp.where(begins, index, 0), axis=1)
