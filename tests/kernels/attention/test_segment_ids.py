"""Which blocks share a segment, compared with the segment ids themselves."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from dantinox.kernels.ops.attention import segment_ids

RNG = np.random.default_rng(0)
ORDERS = {
    "ascending": lambda n: np.sort(RNG.integers(0, 5, (2, n))),
    "runs": lambda n: np.repeat([[2, 0, 3, 1], [7, 7, -1, 7]], -(-n // 4), axis=1)[:, :n],
    "any": lambda n: RNG.integers(0, 3, (2, n)),
    "padded": lambda n: np.where(np.arange(n) < n - 9, np.sort(RNG.integers(1, 4, (2, n))), 0),
}


def split_into_blocks(ids: np.ndarray, block: int) -> list[set[int]]:
    return [set(ids[n : n + block]) for n in range(0, len(ids), block)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.sampled(2)
def test_kv_block_ranges_cover_segments_and_mark_full_blocks(order):
    for (n, m), (block, other_block) in itertools.product(((200, 200), (37, 130), (130, 1)), ((32, 16), (16, 64))):
        ids, other_ids = (ORDERS[order](size).astype(np.int32) for size in (n, m))
        ranges = np.asarray(segment_ids.kv_block_ranges(jnp.asarray(ids), block, jnp.asarray(other_ids), other_block))
        for sequence in zip(ranges, ids, other_ids):
            block_ranges, blocks = sequence[0], split_into_blocks(sequence[1], block)
            other_blocks = split_into_blocks(sequence[2], other_block)
            for held, (start, left, right, stop) in zip(blocks, block_ranges, strict=True):
                shared = [j for j, other_held in enumerate(other_blocks) if held & other_held]
                assert all(start <= j < stop for j in shared)
                assert all(len(held) == 1 and other_blocks[j] == held for j in range(left, right))
                if order == "ascending":  # exactly the overlapping blocks, and all that need no mask
                    assert shared == list(range(start, stop))
                    full = [j for j in shared if len(held) == 1 and other_blocks[j] == held]
                    assert full == list(range(left, right))


def test_attended_segment_keys_match_the_mask():
    q_ids, kv_ids = (RNG.integers(0, 6, (2, n)) for n in (150, 300))
    for causal, window in ((True, None), (True, 40), (False, None)):
        distance = np.arange(150)[:, None] + 150 - np.arange(300)
        mask = (q_ids[:, :, None] == kv_ids[:, None]) & ((distance >= 0) | (not causal)) & (distance < (window or 999))
        attended = segment_ids.attended_keys(jnp.asarray(q_ids), jnp.asarray(kv_ids), causal=causal, window=window)
        assert np.array_equal(attended, mask.any(1))


def test_unattended_segment_keys_are_cut_off_or_zeroed():
    q_ids, kv_ids = jnp.zeros((1, 3), jnp.int32), jnp.asarray([[0, 0, 0, 1, 0, 0, 0, 0]], jnp.int32)
    x = jnp.full((1, 8, 1, 2), jnp.nan).at[:, jnp.asarray([4, 5, 6, 7])].set(1.0)
    k, v, ids = segment_ids.zero_unattended_keys(x, x, (q_ids, kv_ids), T=3, causal=True, window=3)
    assert k.shape == v.shape == (1, 5, 1, 2) and ids[1].shape == (1, 5)
    assert np.array_equal(k[0, :, 0, 0], [0, 1, 1, 1, 1])
