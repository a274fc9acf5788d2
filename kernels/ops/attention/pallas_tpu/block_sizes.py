"""Block sizes of the attention kernels.

On a TPU a cost model picks the blocks with the fewest bundles. Its constants come from libtpu's schedules for v5e and
v6e, and `make aot` compiles the result. On a CPU a step costs XLA about forty small operations whatever its size, so
many heads share a step, and the scores of a step should fit in the caches. Under a window the forward pass processes
all keys that a query block sees in one step.
"""

import functools

import numpy as np

from dantinox.kernels.dispatch import Device, current_device
from dantinox.kernels.ops.attention.pallas_tpu.block_schedule import FIRST_KV_BLOCK, NEEDS_MASK, make_block_schedule
from dantinox.kernels.ops.attention.pallas_tpu.common import AttentionBlockSizes

MAX_CPU_SCORES = 2**18  # per step: 1 MiB of float32; twice that in a step of several key blocks
MAX_KEYS_PER_STEP, MAX_WASTE = 512, 1.25  # of a forward step; computed scores over needed scores
MAX_TPU_SCORES = 2**20  # per block: 12 MiB of scratch in the backward pass, and programs of about 7000 bundles
BUNDLES_PER_STEP, BUNDLES_PER_Q_BLOCK = 330, 160  # the latter for the start and end of a query block
BUNDLES_PER_SCORE = {128: 4400 / 2**20, 256: 2600 / 2**20}  # by the width of the matrix unit
BUNDLES_PER_MASKED_SCORE = {128: 1000 / 2**20, 256: 1600 / 2**20}  # on top
MAX_KV_SPAN_BYTES = 16 * 2**20  # of dk and dv: float32 sums, and their output blocks, double-buffered


def heuristic_block_sizes(
    device: Device, *, heads: int, G: int, T: int, S: int, D: int, causal: bool, window: int | None, itemsize: int
) -> AttentionBlockSizes:
    """Picks block sizes for these problem sizes; `heads` counts the key heads of all sequences."""
    if device.platform == "cpu":
        return _cpu_block_sizes(heads, G, T, S, causal, window)
    mxu_width = 128 if "v5" in device.kind.lower() else 256
    block_q, block_kv = _tpu_block_sizes(G, T, S, causal, window, mxu_width)
    span = MAX_KV_SPAN_BYTES // ((8 + 4 * itemsize) * D)
    return AttentionBlockSizes(
        kv_heads=1,
        block_q=block_q,
        block_kv=block_kv,
        block_q_compute=mxu_width if G * block_q % mxu_width == 0 else 128,
        block_kv_compute=min(256, block_kv),
        kv_span=max(1, span // block_kv) * block_kv,
    )


def xla_is_faster(B: int, T: int, S: int, H: int, window: int | None) -> bool:
    """Whether plain XLA beats the interpreted kernel: with few scores, the overhead of its steps dominates.

    Measured on 2 cores, forward and backward against `xla.py`: 1.2 to 1.5 times the time with 1 to 2 million scores,
    0.5 to 0.9 times with 5 to 8 million.
    """
    scores = B * H * T * min(S, (S if window is None else window) + 128)
    return current_device().platform == "cpu" and scores < 2**22


def _cpu_block_sizes(heads: int, G: int, T: int, S: int, causal: bool, window: int | None) -> AttentionBlockSizes:
    side = 64 if window is not None and window <= 256 else 128
    block_q = _next_power_of_2(T) if T <= 128 else max(16, min(side, 1024 // _next_power_of_2(G)))
    block_kv = _next_power_of_2(S) if S <= 128 else side if window is not None and window <= 256 else 256
    kv_blocks_per_step = _kv_blocks_per_step(T, S, block_q, block_kv, causal, window)
    max_heads = max(1, MAX_CPU_SCORES // (G * block_q * block_kv) * 2 // max(2, kv_blocks_per_step))
    return AttentionBlockSizes(
        kv_heads=max(h for h in range(1, min(heads, max_heads) + 1) if heads % h == 0),
        block_q=block_q,
        block_kv=block_kv,
        block_q_compute=G * block_q,
        block_kv_compute=block_kv,
        kv_span=_next_power_of_2(S) * block_kv,
        kv_blocks_per_step=kv_blocks_per_step,
    )


@functools.lru_cache(maxsize=512)
def _kv_blocks_per_step(T: int, S: int, block_q: int, block_kv: int, causal: bool, window: int | None) -> int:
    """All key blocks that a query block sees, if one step for them wastes few scores: fewer steps cost less."""
    visible = np.bincount(make_block_schedule(T, S, block_q, block_kv, causal=causal, window=window).q)
    most = int(visible.max())
    fits = most * block_kv <= MAX_KEYS_PER_STEP and most * len(visible) <= MAX_WASTE * visible.sum()
    return most if fits else 1


@functools.lru_cache(maxsize=512)
def _tpu_block_sizes(G: int, T: int, S: int, causal: bool, window: int | None, mxu_width: int) -> tuple[int, int]:
    """(block_q, block_kv) with the fewest bundles."""
    best: tuple[float, int, int] | None = None
    for block_q in (128, 256, 512, 1024):
        for block_kv in (256, 512, 1024):
            scores = G * block_q * block_kv
            fits = scores <= MAX_TPU_SCORES or (block_q, block_kv) == (128, 256)
            if not fits or block_q >= 2 * max(T, 128) or block_kv >= 2 * max(S, 256):
                continue
            schedule = make_block_schedule(T, S, block_q, block_kv, causal=causal, window=window)
            num_masked = int(((schedule.flags & NEEDS_MASK) != 0).sum())
            num_q_blocks = int(((schedule.flags & FIRST_KV_BLOCK) != 0).sum())
            bundles = (
                len(schedule) * (BUNDLES_PER_STEP + BUNDLES_PER_SCORE[mxu_width] * scores)
                + num_masked * BUNDLES_PER_MASKED_SCORE[mxu_width] * scores
                + num_q_blocks * BUNDLES_PER_Q_BLOCK
            )
            candidate = (bundles, block_q, block_kv)
            best = candidate if best is None else min(best, candidate)
    assert best is not None
    return best[1:]


def _next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
