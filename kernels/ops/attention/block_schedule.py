"""The blocks of the score matrix that hold a visible pair: they are the grid of a kernel.

                   keys ->    0   1   2   3   4   5
    query block 0             ▞   ░   ░   ░   ░   ░       ▞ partly visible: the mask is applied
    query block 1             █   ▞   ░   ░   ░   ░       █ fully visible: no mask
    query block 2             ▞   █   ▞   ░   ░   ░       ░ not in the schedule: neither loaded nor computed
    query block 3             ░   ▞   █   ▞   ░   ░

Query t is at position S - T + t. A query block that sees no key has one step, which writes its zeros.
"""

import functools
from typing import NamedTuple

import numpy as np

FIRST_KV_BLOCK, LAST_KV_BLOCK, NEEDS_MASK, FIRST_USE_OF_KV = 1, 2, 4, 8


class BlockSchedule(NamedTuple):
    """The visible blocks in grid order, query block by query block: three int32 arrays of equal length.

    Attributes:
        q: query block of each step.
        kv: key block of each step.
        flags: FIRST_KV_BLOCK and LAST_KV_BLOCK mark the first and the last step of a query block, NEEDS_MASK marks
            blocks with an invisible pair, FIRST_USE_OF_KV marks the first step of a key block.
    """

    q: np.ndarray
    kv: np.ndarray
    flags: np.ndarray

    def __len__(self) -> int:  # type: ignore[override]
        return self.q.shape[0]


@functools.lru_cache(maxsize=512)
def make_block_schedule(
    T: int,
    S: int,
    block_q: int,
    block_kv: int,
    *,
    causal: bool,
    window: int | None,
    kv_block_range: tuple[int, int] | None = None,
) -> BlockSchedule:
    """List the visible blocks of `block_q` queries by `block_kv` keys.

    Args:
        T: number of queries, without padding.
        S: number of keys, without padding.
        block_q: queries per block.
        block_kv: keys per block.
        causal: whether a query sees no later key.
        window: keys that a query sees, or None.
        kv_block_range: restricts the schedule to these key blocks; query blocks that see none of them are absent.

    Returns:
        The schedule.
    """
    q, kv, flags = [], [], []
    visited: set[int] = set()
    for i in range(-(-T // block_q)):
        q_start = i * block_q + S - T  # positions of the block's first and last query
        q_last = min((i + 1) * block_q, T) - 1 + S - T
        kv_end = min(q_last, S - 1) if causal else S - 1
        kv_start = 0 if window is None else max(0, q_start - window + 1)
        kv_blocks = list(range(kv_start // block_kv, kv_end // block_kv + 1)) if kv_end >= kv_start else []
        if kv_block_range is not None:
            kv_blocks = [j for j in kv_blocks if kv_block_range[0] <= j < kv_block_range[1]]
        elif not kv_blocks:
            kv_blocks = [0]
        for j in kv_blocks:
            fully_visible = (j + 1) * block_kv <= S and kv_end >= kv_start
            if causal:
                fully_visible &= q_start >= (j + 1) * block_kv - 1
            if window is not None:
                fully_visible &= q_last - j * block_kv < window
            q.append(i)
            kv.append(j)
            ends = FIRST_KV_BLOCK * (j == kv_blocks[0]) + LAST_KV_BLOCK * (j == kv_blocks[-1])
            flags.append(ends + NEEDS_MASK * (not fully_visible) + FIRST_USE_OF_KV * (j not in visited))
            visited.add(j)
    return BlockSchedule(*(np.array(column, np.int32) for column in (q, kv, flags)))
