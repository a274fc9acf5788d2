"""The blocks of the ring buffers that one decode step visits: the grid of the TPU and CPU kernels, made on the device.

A ring buffer of C = 6 blocks and a window that wraps around its end; `n` marks the block that receives the new token:

    slots ->     0   1   2   3   4   5
    sequence 0   ▓   n   ░   ░   ▞   █        visits 4, 5, 0, 1
    sequence 1   █   n   ░   ░   ░   ░        short: visits 0, 1
                                                            ░ neither loaded nor computed
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class BlockTable(NamedTuple):
    """The grid steps, sequence by sequence, from the oldest visible block to the newest; int32.

    Several new tokens may be in several blocks; the output of a step is the block that `written` says.

    Attributes:
        num_steps: number of steps, a scalar.
        sequence: sequence of each step, [maximum number of steps]; entries from `num_steps` on are unused.
        block: block of each step, as long.
        ends: number of steps up to and including each sequence, [B].
        num_visible: tokens that a query attends to, the new ones included, [B].
        slot: slot of the newest token, [B].
        written: with several new tokens, the step's block if it holds one of them, or else the block of the last
            step that does, or of the first one, [maximum number of steps]; None for one token.
    """

    num_steps: Array
    sequence: Array
    block: Array
    ends: Array
    num_visible: Array
    slot: Array
    written: Array | None = None


def make_block_table(length: Array, C: int, max_visible: int, block_size: int, T: int = 1) -> BlockTable:
    """List the blocks that hold the tokens that any of T new ones sees: of one, the last min(length + 1, max_visible).

    Args:
        length: tokens before the new ones, [B] int32.
        C: slots of a ring buffer.
        max_visible: upper bound on the tokens that a query sees, at most C.
        block_size: slots per block.
        T: new tokens.
    """
    num_blocks = -(-C // block_size)
    if T > 1:  # as the last of them: it sees what the first one sees, and those between
        length = jnp.where(length < C, length, C + length % C) + (T - 1)
        max_visible = min(C, max_visible + T - 1)
    # One block more than contiguous tokens need if the ring buffer ends inside a block.
    max_blocks = min(num_blocks, -(-(max_visible - 1) // block_size) + 1 + (C % block_size > 0))
    length = length.astype(jnp.int32)
    # The largest int32 has no successor.
    num_older, slot = jnp.minimum(length, max_visible - 1), length % C
    oldest = (length - num_older) % C
    first, last = oldest // block_size, slot // block_size
    wrapped = oldest > slot
    visited = jnp.where(wrapped, jnp.minimum(num_blocks, num_blocks - first + last + 1), last - first + 1)
    ends = jnp.cumsum(visited, dtype=jnp.int32)
    step = jnp.arange(length.shape[0] * max_blocks, dtype=jnp.int32)[:, None]
    # Compared with all sequences at once: on a TPU, a search or a gather takes as long as the kernel.
    sequence = jnp.minimum(jnp.sum(ends[None] <= step, axis=1, dtype=jnp.int32), length.shape[0] - 1)
    is_sequence = sequence[:, None] == jnp.arange(length.shape[0], dtype=jnp.int32)[None]

    def of_step(per_sequence: Array) -> Array:
        return jnp.sum(jnp.where(is_sequence, per_sequence[None], 0), axis=1, dtype=jnp.int32)

    block = ((of_step(first - ends + visited) + step[:, 0]) % num_blocks).astype(jnp.int32)
    table = BlockTable(ends[-1], sequence, block, ends, num_older + 1, slot)
    if T == 1:
        return table
    first_new = (slot - (T - 1)) % C
    first_written = first_new // block_size
    start, stop = of_step(first_written), of_step(last)
    holds_new = jnp.where(
        of_step(first_new) <= of_step(slot), (block >= start) & (block <= stop), (block >= start) | (block <= stop)
    )
    # The first block that is visited holds new tokens if it holds the newest one.
    return table._replace(written=jnp.where(holds_new, block, of_step(jnp.where(first == last, last, first_written))))
