"""Which tiles of the score matrix hold a visible pair: the grid of a kernel, and nothing else is in it.

                    keys ->   0   1   2   3   4   5
    query tile 0              ▞   ░   ░   ░   ░   ░       ▞ visible in part: the mask is applied
    query tile 1              █   ▞   ░   ░   ░   ░       █ all visible: no mask
    query tile 2              ▞   █   ▞   ░   ░   ░       ░ not in the plan: no load, no work, no time
    query tile 3              ░   ▞   █   ▞   ░   ░

Query t stands at position S - T + t. A query tile that sees no key keeps one tile, to write its zeros.
"""

import functools
from typing import NamedTuple

import numpy as np

FIRST, LAST, MASKED, FRESH = 1, 2, 4, 8


class Plan(NamedTuple):
    """Visible tiles in the order of the grid, query tile by query tile; three int32 arrays of one length.

    Attributes:
        q: query tile. k: key tile.
        flags: FIRST and LAST tile of its query tile, MASKED where some pair is not visible, FRESH where its keys come
            for the first time.
    """

    q: np.ndarray
    k: np.ndarray
    flags: np.ndarray

    def __len__(self) -> int:  # type: ignore[override]
        return self.q.shape[0]


@functools.lru_cache(maxsize=512)
def plan(
    T: int,
    S: int,
    q_rows: int,
    k_rows: int,
    *,
    causal: bool,
    window: int | None,
    keys: tuple[int, int] | None = None,
    joined: int = 1,
) -> Plan:
    """The visible tiles of `q_rows` queries by `k_rows` keys; T and S are the true lengths, not padded ones.

    With `keys`, a range of key tiles, only the tiles there: query tiles that see none of them are absent. With
    `joined`, no fewer than any query tile sees, its key tiles are one step: so many tiles from `k` on.
    """
    q, k, flags = [], [], []
    met: set[int] = set()
    for i in range(-(-T // q_rows)):
        first = i * q_rows + S - T  # positions of the tile's first and last query
        last = min((i + 1) * q_rows, T) - 1 + S - T
        high = min(last, S - 1) if causal else S - 1
        low = 0 if window is None else max(0, first - window + 1)
        tiles = list(range(low // k_rows, high // k_rows + 1)) if high >= low else []
        if keys is not None:
            tiles = [j for j in tiles if keys[0] <= j < keys[1]]
        elif not tiles:
            tiles = [0]
        if joined > 1:
            assert len(tiles) <= joined, f"a query tile sees {len(tiles)} key tiles, {joined} are joined"
            tiles = [max(0, min(tiles[0], -(-S // k_rows) - joined))]
        for j in tiles:
            whole = (j + 1) * k_rows <= S and high >= low and joined == 1
            if causal:
                whole &= first >= (j + 1) * k_rows - 1
            if window is not None:
                whole &= last - j * k_rows < window
            q.append(i)
            k.append(j)
            ends = FIRST * (j == tiles[0]) + LAST * (j == tiles[-1])
            flags.append(ends + MASKED * (not whole) + FRESH * (j not in met))
            met.add(j)
    return Plan(*(np.array(column, np.int32) for column in (q, k, flags)))
