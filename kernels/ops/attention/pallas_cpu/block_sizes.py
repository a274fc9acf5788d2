"""Block sizes of the interpreted attention kernels.

A step takes XLA about forty small operations at any size, so many heads share a step, and the scores of a step should
fit in the caches. Under a window the forward pass processes all keys that a query block sees in one step.
"""

import functools
from typing import NamedTuple

import numpy as np

from dantinox.kernels.ops.attention.block_schedule import make_block_schedule
from dantinox.kernels.tuning import tunable

MAX_SCORES = 2**18  # per step: 1 MiB of float32; twice that in a step of several key blocks
MAX_KEYS_PER_STEP, MAX_WASTE = 512, 1.25  # of a forward step; computed scores over needed scores


class CpuBlockSizes(NamedTuple):
    """The amount of work of one grid step.

    Attributes:
        kv_heads: key heads per step.
        block_q: queries per block, of each of the G heads of a key head; a power of two.
        block_kv: keys per block.
        kv_blocks_per_step: key blocks that a step of the forward kernel processes as one. Above 1 it is at least as
            many as a query block sees.
    """

    kv_heads: int
    block_q: int
    block_kv: int
    kv_blocks_per_step: int = 1

    def subtile(self, G: int) -> tuple[int, int]:
        """Return (packed queries, keys) of a block, which is one subtile."""
        return G * self.block_q, self.block_kv


@tunable
def heuristic_block_sizes(*, heads: int, G: int, T: int, S: int, causal: bool, window: int | None) -> CpuBlockSizes:
    """Choose the block sizes of a problem; `heads` is the number of key heads of all sequences."""
    side = 64 if window is not None and window <= 256 else 128
    block_q = _next_power_of_2(T) if T <= 128 else max(16, min(side, 1024 // _next_power_of_2(G)))
    block_kv = _next_power_of_2(S) if S <= 128 else side if window is not None and window <= 256 else 256
    kv_blocks_per_step = _kv_blocks_per_step(T, S, block_q, block_kv, causal, window)
    max_heads = max(1, MAX_SCORES // (G * block_q * block_kv) * 2 // max(2, kv_blocks_per_step))
    kv_heads = max(h for h in range(1, min(heads, max_heads) + 1) if heads % h == 0)
    return CpuBlockSizes(kv_heads, block_q, block_kv, kv_blocks_per_step)


def xla_is_faster(B: int, T: int, S: int, H: int, window: int | None) -> bool:
    """Return whether plain XLA is faster: with few scores, the overhead of the interpreted steps dominates.

    Measured on 2 cores, forward and backward against `xla.py`: 1.2 to 1.5 times the time with 1 to 2 million scores,
    0.5 to 0.9 times with 5 to 8 million.
    """
    scores = B * H * T * min(S, (S if window is None else window) + 128)
    return scores < 2**22


@functools.lru_cache(maxsize=512)
def _kv_blocks_per_step(T: int, S: int, block_q: int, block_kv: int, causal: bool, window: int | None) -> int:
    """Return all key blocks that a query block sees if one step for them wastes few scores, else 1."""
    visible = np.bincount(make_block_schedule(T, S, block_q, block_kv, causal=causal, window=window).q)
    max_visible = int(visible.max())
    fits = max_visible * block_kv <= MAX_KEYS_PER_STEP and max_visible * len(visible) <= MAX_WASTE * visible.sum()
    return max_visible if fits else 1


def _next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
