"""The block schedule of the Pallas attention: the blocks that hold a visible pair, in order, each once."""

import itertools

import numpy as np
import pytest

from dantinox.kernels.ops.attention.block_schedule import (
    FIRST_KV_BLOCK,
    FIRST_USE_OF_KV,
    LAST_KV_BLOCK,
    NEEDS_MASK,
    make_block_schedule,
)
from dantinox.kernels.ops.attention.pallas_cpu.common import merge_kv_blocks

LENGTHS = (1, 2, 5, 8, 13)
WINDOWS = {
    "full": (False, None),
    "causal": (True, None),
    **{f"window={window}": (True, window) for window in (1, 2, 4, 7, 100)},
}
EACH_WINDOW = pytest.mark.parametrize(("causal", "window"), WINDOWS.values(), ids=WINDOWS)
RANGES = {"all blocks": None, **{f"blocks {start}-{end}": (start, end) for start, end in ((0, 1), (1, 3), (0, 100))}}


@EACH_WINDOW
@pytest.mark.parametrize("kv_block_range", RANGES.values(), ids=RANGES)
def test_schedule_lists_the_visible_blocks(causal, window, kv_block_range):
    for T, S, bq, bk in itertools.product(LENGTHS, LENGTHS, (1, 2, 4, 8), (1, 2, 4)):
        distance = np.arange(T)[:, None] + S - T - np.arange(S)
        visible = (distance >= 0) | (not causal)
        visible &= distance < (10**9 if window is None else window)
        expected, visited = [], set()
        for i in range(-(-T // bq)):
            pairs = {j: visible[i * bq : (i + 1) * bq, j * bk : (j + 1) * bk] for j in range(-(-S // bk))}
            kv_blocks = [
                j
                for j in pairs
                if pairs[j].any() and (kv_block_range is None or kv_block_range[0] <= j < kv_block_range[1])
            ]
            kv_blocks = kv_blocks or ([0] if kv_block_range is None else [])
            for j in kv_blocks:
                flags = (
                    FIRST_KV_BLOCK * (j == kv_blocks[0])
                    + LAST_KV_BLOCK * (j == kv_blocks[-1])
                    + FIRST_USE_OF_KV * (j not in visited)
                )
                fully_visible = pairs[j].all() and pairs[j].shape[1] == bk
                expected.append((i, j, flags + NEEDS_MASK * (not fully_visible)))
                visited.add(j)
        schedule = make_block_schedule(T, S, bq, bk, causal=causal, window=window, kv_block_range=kv_block_range)
        assert list(zip(*(x.tolist() for x in schedule), strict=True)) == expected, (T, S, bq, bk)


@EACH_WINDOW
def test_multi_block_steps_cover_every_visible_pair_once(causal, window):
    for T, S, bq, bk in itertools.product(LENGTHS, LENGTHS, (1, 4, 8), (1, 2, 4)):
        single = make_block_schedule(T, S, bq, bk, causal=causal, window=window)
        blocks_per_step = int(np.bincount(single.q).max())
        if blocks_per_step == 1:
            continue
        schedule = merge_kv_blocks(single, -(-S // bk), blocks_per_step)
        assert schedule.q.tolist() == list(range(-(-T // bq)))
        assert set(schedule.flags & (FIRST_KV_BLOCK | LAST_KV_BLOCK | NEEDS_MASK)) == {
            FIRST_KV_BLOCK | LAST_KV_BLOCK | NEEDS_MASK
        }
        assert (schedule.kv >= 0).all() and (schedule.kv + blocks_per_step <= -(-S // bk)).all()
        assert all(
            schedule.kv[i] <= j < schedule.kv[i] + blocks_per_step for i, j in zip(single.q, single.kv, strict=True)
        )


def test_schedule_grows_linearly_with_sequence_length():
    for S in (1024, 4096, 16384):
        assert len(make_block_schedule(S, S, 128, 256, causal=True, window=512)) <= S // 128 * 4
    # Query blocks that see no key cost one block, not a row of blocks.
    assert len(make_block_schedule(4096, 256, 128, 128, causal=True, window=None)) == 30 + 1 + 2
