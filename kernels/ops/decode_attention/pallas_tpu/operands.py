"""The static parameters of the TPU decode kernel and the layout of its inputs."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from dantinox.kernels.ops.decode_attention.common import NewTokens, QuantizedToken, ScoreOptions, token_inputs

Array = jax.Array


class DecodeConfig(NamedTuple):
    """Static parameters of the kernel.

    Attributes:
        C: slots of a ring buffer.
        block_size: slots per block.
        tile_slots, tile_lanes: slots of a memory tile of k and v, and of their scales.
        heads_per_iteration: heads of a block that the core processes at a time.
        tokens_in_lanes: whether the ring buffers are [B, K, D, C] for the kernel; see `block_sizes.tokens_in_lanes`.
        scores: options of the scores.
        tokens: the new tokens.
    """

    C: int
    block_size: int
    tile_slots: int
    tile_lanes: int
    heads_per_iteration: int
    tokens_in_lanes: bool
    scores: ScoreOptions
    tokens: NewTokens


class TokenBlock(NamedTuple):
    """Inputs of one decode step: arrays, their block specs, or references to those of one sequence.

    Attributes:
        q: queries [B, K, T * G, D].
        vectors: keys and values of the new tokens, [B, K, n * T, D] in float32, which holds every other dtype exactly:
            k and v as later steps read them from the cache, then, for an 8-bit cache, k and v as it stores them.
        gate: logits [B, K, T * G, D] or [B, K, T * G, 1], or None.
        k_scale, v_scale: the new tokens' scales [B, K, T] for an 8-bit cache, or None.
        sinks: logits [1, K, T * G, 1], or None.
    """

    q: Any
    vectors: Any
    gate: Any = None
    k_scale: Any = None
    v_scale: Any = None
    sinks: Any = None

    def load(self, n: int, T: int) -> Array:
        """Return the n-th vectors of each head, [K, T, D]; a reference only."""
        return self.vectors[0, :, n * T : (n + 1) * T]

    def load_stored(self, T: int, t: Array | int) -> tuple[Array, Array]:
        """Return the key and the value of one token as the cache stores them, [K, 1, D]; references only."""
        first = self.vectors.shape[2] // T - 2
        return self.vectors[0, :, pl.ds(first * T + t, 1)], self.vectors[0, :, pl.ds((first + 1) * T + t, 1)]


def token_block(q: Array, stored: QuantizedToken, gate: Array | None, sinks: Array | None) -> TokenBlock:
    """Lay out the inputs of a step; one array of vectors takes less padding, and one copy, instead of four."""
    token = token_inputs(q, stored, gate)
    vectors = [token.new_k, token.new_v]
    if stored.k_scale is None:
        return TokenBlock(q, _stack(vectors), gate, sinks=sinks)
    return TokenBlock(q, _stack([*vectors, stored.k, stored.v]), gate, stored.k_scale, stored.v_scale, sinks)


def _stack(vectors: Sequence[Array]) -> Array:
    """Concatenate [B, K, T, D] arrays in float32."""
    return jnp.concatenate([x.astype(jnp.float32) for x in vectors], axis=2)
