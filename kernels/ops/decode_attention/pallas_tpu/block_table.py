"""Which blocks of the rings one decoding step visits: the grid of the kernel, made on the device from the lengths.

A ring of C = 6 blocks, a window that reaches back over the ring's end; `n` is where the new token goes:

    slots ->     0   1   2   3   4   5
    sequence 0   ▓   n   ░   ░   ▞   █        visits 4, 5, 0, 1
    sequence 1   █   n   ░   ░   ░   ░        short: visits 0, 1
                                                            ░ neither loaded nor computed
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class Visits(NamedTuple):
    """The steps of the grid, sequence by sequence, from its oldest visible block to its newest; int32.

    Attributes:
        count: steps, a scalar. sequence, block: of each step, [the most there can be]; past `count` they mean nothing.
        ends: steps up to and with each sequence, [B].
        seen: tokens that the query sees, the new one included, [B]. slot: where that one goes, [B].
    """

    count: Array
    sequence: Array
    block: Array
    ends: Array
    seen: Array
    slot: Array


def visits(length: Array, slots: int, limit: int, block: int) -> Visits:
    """The blocks of `block` slots that hold the last min(length + 1, limit) tokens of each ring.

    Args:
        length: tokens before the new one, [B] int32. slots: C. limit: of the tokens seen, at most C.
    """
    blocks = -(-slots // block)
    # One more than a line of tokens needs, where the ring ends within a block.
    most = min(blocks, -(-(limit - 1) // block) + 1 + (slots % block > 0))
    length = length.astype(jnp.int32)
    seen, slot = jnp.minimum(length + 1, limit), length % slots
    oldest = (length + 1 - seen) % slots
    first, last = oldest // block, slot // block
    wrapped = oldest > slot
    each = jnp.where(wrapped, jnp.minimum(blocks, blocks - first + last + 1), last - first + 1)
    ends = jnp.cumsum(each, dtype=jnp.int32)
    step = jnp.arange(length.shape[0] * most, dtype=jnp.int32)
    sequence = jnp.minimum(jnp.searchsorted(ends, step, side="right").astype(jnp.int32), length.shape[0] - 1)
    at = (first[sequence] + step - (ends - each)[sequence]) % blocks
    return Visits(ends[-1], sequence, at.astype(jnp.int32), ends, seen, slot)
