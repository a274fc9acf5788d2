"""Which tiles share a segment, against the ids themselves."""

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


def cut(ids: np.ndarray, tile: int) -> list[set[int]]:
    return [set(ids[n : n + tile]) for n in range(0, len(ids), tile)]


@pytest.mark.parametrize("order", ORDERS)
def test_a_span_holds_all_that_share_an_id_and_its_middle_one_id_alone(order):
    for (n, m), (tile, other) in itertools.product(((200, 200), (37, 130), (130, 1)), ((32, 16), (16, 64))):
        of, to = (ORDERS[order](size).astype(np.int32) for size in (n, m))
        found = np.asarray(segment_ids.kv_block_ranges(jnp.asarray(of), tile, jnp.asarray(to), other))
        for row, here, there in zip(found, of, to):
            mine, theirs = cut(here, tile), cut(there, other)
            for ids, (start, left, right, stop) in zip(mine, row, strict=True):
                shared = [j for j, each in enumerate(theirs) if ids & each]
                assert all(start <= j < stop for j in shared)
                assert all(len(ids) == 1 and theirs[j] == ids for j in range(left, right))
                if order == "ascending":  # no tile too many, and all that need no mask
                    assert shared == list(range(start, stop))
                    alike = [j for j in shared if len(ids) == 1 and theirs[j] == ids]
                    assert alike == list(range(left, right))


def test_keys_that_nobody_sees_are_found():
    q_ids, kv_ids = (RNG.integers(0, 6, (2, n)) for n in (150, 300))
    for causal, window in ((True, None), (True, 40), (False, None)):
        distance = np.arange(150)[:, None] + 150 - np.arange(300)
        mask = (q_ids[:, :, None] == kv_ids[:, None]) & ((distance >= 0) | (not causal)) & (distance < (window or 999))
        found = segment_ids.attended_keys(jnp.asarray(q_ids), jnp.asarray(kv_ids), causal=causal, window=window)
        assert np.array_equal(found, mask.any(1))


def test_what_nobody_sees_is_cut_off_or_cleared():
    q_ids, kv_ids = jnp.zeros((1, 3), jnp.int32), jnp.asarray([[0, 0, 0, 1, 0, 0, 0, 0]], jnp.int32)
    x = jnp.full((1, 8, 1, 2), jnp.nan).at[:, jnp.asarray([4, 5, 6, 7])].set(1.0)
    k, v, ids = segment_ids.zero_unattended_keys(x, x, (q_ids, kv_ids), T=3, causal=True, window=3)
    assert k.shape == v.shape == (1, 5, 1, 2) and ids[1].shape == (1, 5)
    assert np.array_equal(k[0, :, 0, 0], [0, 1, 1, 1, 1])
