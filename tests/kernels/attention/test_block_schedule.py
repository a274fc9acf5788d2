"""The plan of the Pallas attention: the tiles that hold a visible pair, in order, each once."""

import itertools

import numpy as np
import pytest

from dantinox.kernels.ops.attention.pallas_tpu.block_schedule import FIRST, FRESH, LAST, MASKED, plan

LENGTHS = (1, 2, 5, 8, 13)
WINDOWS = ((False, None), *((True, window) for window in (None, 1, 2, 4, 7, 100)))


@pytest.mark.parametrize(("causal", "window"), WINDOWS)
@pytest.mark.parametrize("keys", [None, (0, 1), (1, 3), (0, 100)])
def test_the_plan_is_the_visible_tiles(causal, window, keys):
    for T, S, bq, bk in itertools.product(LENGTHS, LENGTHS, (1, 2, 4, 8), (1, 2, 4)):
        distance = np.arange(T)[:, None] + S - T - np.arange(S)
        seen = (distance >= 0) | (not causal)
        seen &= distance < (10**9 if window is None else window)
        expected, met = [], set()
        for i in range(-(-T // bq)):
            pairs = {j: seen[i * bq : (i + 1) * bq, j * bk : (j + 1) * bk] for j in range(-(-S // bk))}
            mine = [j for j in pairs if pairs[j].any() and (keys is None or keys[0] <= j < keys[1])]
            mine = mine or ([0] if keys is None else [])
            for j in mine:
                flags = FIRST * (j == mine[0]) + LAST * (j == mine[-1]) + FRESH * (j not in met)
                whole = pairs[j].all() and pairs[j].shape[1] == bk
                expected.append((i, j, flags + MASKED * (not whole)))
                met.add(j)
        found = plan(T, S, bq, bk, causal=causal, window=window, keys=keys)
        assert list(zip(*(x.tolist() for x in found), strict=True)) == expected, (T, S, bq, bk)


@pytest.mark.parametrize(("causal", "window"), WINDOWS)
def test_joined_tiles_hold_every_visible_pair_once(causal, window):
    for T, S, bq, bk in itertools.product(LENGTHS, LENGTHS, (1, 4, 8), (1, 2, 4)):
        tiles = plan(T, S, bq, bk, causal=causal, window=window)
        joined = int(np.bincount(tiles.q).max())
        if joined == 1:
            continue
        found = plan(T, S, bq, bk, causal=causal, window=window, joined=joined)
        assert found.q.tolist() == list(range(-(-T // bq)))
        assert set(found.flags & (FIRST | LAST | MASKED)) == {FIRST | LAST | MASKED}
        assert (found.k >= 0).all() and (found.k + joined <= -(-S // bk)).all()
        assert all(found.k[i] <= j < found.k[i] + joined for i, j in zip(tiles.q, tiles.k, strict=True))


def test_the_plan_grows_with_the_sequence_not_its_square():
    for S in (1024, 4096, 16384):
        assert len(plan(S, S, 128, 256, causal=True, window=512)) <= S // 128 * 4
    # Queries that see nothing cost one tile, not a row of tiles.
    assert len(plan(4096, 256, 128, 128, causal=True, window=None)) == 30 + 1 + 2
