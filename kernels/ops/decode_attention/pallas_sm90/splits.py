"""Splits of a sequence: their number, the blocks that each reads, and the combination of their outputs."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

Array = jax.Array
BLOCK_KV = 64  # slots per block
RESIDENT_BLOCKS = {64: 396, 128: 264, 256: 132}  # by D, thread blocks that the 132 SMs of an H100 hold at a time


class SplitConfig(NamedTuple):
    """Static parameters of the kernel.

    Attributes:
        C: slots of a ring buffer.
        max_visible: bounds the tokens that a query attends to.
        num_splits: splits per sequence.
        scale, softcap: options of the scores.
        interpret: parameters of the interpreter, or None.
        T: new tokens per sequence.
        G: query heads per KV head.
    """

    C: int
    max_visible: int
    num_splits: int
    scale: float
    softcap: float | None
    interpret: plgpu.InterpretGPUParams | None
    T: int = 1
    G: int = 1

    @property
    def window(self) -> int | None:
        """The window, or None if it is the whole ring buffer."""
        return self.max_visible if self.max_visible < self.C else None


class SplitRange(NamedTuple):
    """The blocks of one split: first + i, modulo the ring buffer, for start <= i < stop.

    Attributes:
        num_visible: tokens that a query attends to, the new ones included.
        slot: slot of the newest token.
        first: block of the oldest visible token.
        start, stop: range of visited blocks of this split, counted from `first`.
    """

    num_visible: Any
    slot: Any
    first: Any
    start: Any
    stop: Any


def split_range(length: Any, split: Any, config: SplitConfig) -> SplitRange:
    """Return the blocks of one split, for a ring buffer to which `length` tokens have been appended."""
    C, num_blocks = jnp.int32(config.C), -(-config.C // BLOCK_KV)
    # The largest int32 has no successor.
    num_older, slot = lax.min(length, jnp.int32(config.max_visible - 1)), lax.rem(length, C)
    if config.T > 1:
        num_older, slot = lax.min(num_older, C - config.T), lax.rem(slot + (config.T - 1), C)
    oldest = lax.rem(length - num_older, C)
    first, last = lax.div(oldest, jnp.int32(BLOCK_KV)), lax.div(slot, jnp.int32(BLOCK_KV))
    wrapped_count = lax.min(jnp.int32(num_blocks), num_blocks - first + last + 1)
    count = jnp.where(oldest > slot, wrapped_count, last - first + 1)

    def split_start(n: Any) -> Any:
        return lax.div(count * n, jnp.int32(config.num_splits))

    return SplitRange(num_older + config.T, slot, first, split_start(split), split_start(split + 1))


def max_visible_blocks(C: int, max_visible: int) -> int:
    """Return the largest number of blocks that a sequence visits."""
    return min(-(-C // BLOCK_KV), -(-(max_visible - 1) // BLOCK_KV) + 1 + (C % BLOCK_KV > 0))


def combine_splits(o: Array, lse: Array, sinks: Array | None = None) -> Array:
    """Combine the outputs of the splits into [..., D].

    Args:
        o: outputs [splits, ..., D].
        lse: log2-sum-exps [splits, ...]; -inf marks a split without visible tokens.
        sinks: logits times log2(e), which broadcast to lse[0]; each joins as one more split without an output.
    """
    if o.shape[0] == 1 and sinks is None:
        return o[0]
    largest = jnp.max(lse, axis=0)
    largest = largest if sinks is None else jnp.maximum(largest, sinks)
    weight = jnp.exp2(lse - largest)
    total = jnp.sum(weight, axis=0)
    total = total if sinks is None else total + jnp.exp2(sinks - largest)
    weight = (weight / total)[..., None]
    # A split without visible tokens leaves its output unwritten, so it may be NaN.
    return jnp.sum(jnp.where(weight > 0, o, 0) * weight, axis=0)
