"""Tile sizes of the attention kernels.

On a TPU the tiles are those of the least bundles by a model whose numbers were read off libtpu's schedules for v5e and
v6e: `make aot` compiles what comes out. On a CPU a step costs XLA some forty small operations whatever is in it, so
many heads share a step; its scores should stay in the caches. Under a window the forward pass takes all that a query
tile sees in one step.
"""

import functools

import numpy as np

from dantinox.kernels.dispatch import Device, current_device
from dantinox.kernels.ops.attention.pallas_tpu.block_schedule import FIRST, MASKED, plan
from dantinox.kernels.ops.attention.pallas_tpu.common import Tiles

CPU_SCORES = 2**18  # of a step: 1 MiB of float32; twice that in a step of joined tiles
JOINED_KEYS, IN_VAIN = 512, 1.25  # of a forward step; times the scores that are needed
TPU_SCORES = 2**20  # of a tile: 12 MiB of scratch in the backward pass, and programs of some 7000 bundles
STEP, QUERY_TILE = 330, 160  # bundles: of a step, of a query tile's start and end
SCORE = {128: 4400 / 2**20, 256: 2600 / 2**20}  # and of a score, by the width of the matrix unit
MASK = {128: 1000 / 2**20, 256: 1600 / 2**20}  # of its mask
SPAN_BYTES = 16 * 2**20  # of dk and dv: float32 sums, and the blocks they leave in, twice


def choose(
    device: Device, *, heads: int, G: int, T: int, S: int, D: int, causal: bool, window: int | None, itemsize: int
) -> Tiles:
    """Tiles for these sizes; `heads` key heads over all sequences."""
    if device.platform == "cpu":
        return _cpu(heads, G, T, S, causal, window)
    wide = 128 if "v5" in device.kind.lower() else 256  # columns of the matrix unit
    q, k = _tpu(G, T, S, causal, window, wide)
    span = SPAN_BYTES // ((8 + 4 * itemsize) * D)
    return Tiles(1, q, k, wide if G * q % wide == 0 else 128, min(256, k), max(1, span // k) * k)


def interpreted_slow(B: int, T: int, S: int, H: int, window: int | None) -> bool:
    """Whether the interpreted kernel is slower than plain XLA: so few scores that its steps cost more than they do.

    Measured on 2 cores, forward and backward against `xla.py`: 1.2 to 1.5 times the time with 1 to 2 million scores,
    0.5 to 0.9 times with 5 to 8 million.
    """
    scores = B * H * T * min(S, (S if window is None else window) + 128)
    return current_device().platform == "cpu" and scores < 2**22


def _cpu(heads: int, G: int, T: int, S: int, causal: bool, window: int | None) -> Tiles:
    side = 64 if window is not None and window <= 256 else 128
    q = _up(T) if T <= 128 else max(16, min(side, 1024 // _up(G)))
    k = _up(S) if S <= 128 else side if window is not None and window <= 256 else 256
    joined = _joined(T, S, q, k, causal, window)
    most = max(1, CPU_SCORES // (G * q * k) * 2 // max(2, joined))
    per = max(h for h in range(1, min(heads, most) + 1) if heads % h == 0)
    return Tiles(per, q, k, G * q, k, _up(S) * k, joined)


@functools.lru_cache(maxsize=512)
def _joined(T: int, S: int, q: int, k: int, causal: bool, window: int | None) -> int:
    """All key tiles that a query tile sees as one, where few scores are computed in vain: few steps cost less."""
    seen = np.bincount(plan(T, S, q, k, causal=causal, window=window).q)
    most = int(seen.max())
    return most if most * k <= JOINED_KEYS and most * len(seen) <= IN_VAIN * seen.sum() else 1


@functools.lru_cache(maxsize=512)
def _tpu(G: int, T: int, S: int, causal: bool, window: int | None, wide: int) -> tuple[int, int]:
    """(queries, keys) of a tile."""
    best: tuple[float, int, int] | None = None
    for q in (128, 256, 512, 1024):
        for k in (256, 512, 1024):
            largest = G * q * k <= TPU_SCORES or (q, k) == (128, 256)
            if not largest or q >= 2 * max(T, 128) or k >= 2 * max(S, 256):
                continue
            tiles = plan(T, S, q, k, causal=causal, window=window)
            masked = int(((tiles.flags & MASKED) != 0).sum())
            starts = int(((tiles.flags & FIRST) != 0).sum())
            scores = G * q * k
            bundles = len(tiles) * (STEP + SCORE[wide] * scores) + masked * MASK[wide] * scores + starts * QUERY_TILE
            best = min(best or (bundles, q, k), (bundles, q, k))
    assert best is not None
    return best[1:]


def _up(n: int) -> int:
    """The next power of two."""
    return 1 << max(0, n - 1).bit_length()
