"""Block sizes of the attention kernels on TPU: a cost model picks the blocks with the fewest bundles.

Its constants come from libtpu's schedules for v5e and v6e, and `make aot` compiles the result.
"""

import functools
from typing import NamedTuple

from dantinox.kernels.dispatch import Device
from dantinox.kernels.mosaic_tpu import SMEM_BYTES
from dantinox.kernels.ops.attention.block_schedule import FIRST_KV_BLOCK, NEEDS_MASK, make_block_schedule
from dantinox.kernels.tuning import tunable

MAX_SCORES = 2**20  # per block: 12 MiB of scratch in the backward pass, and programs of about 7000 bundles
BUNDLES_PER_STEP, BUNDLES_PER_Q_BLOCK = 330, 160  # the latter for the start and end of a query block
BUNDLES_PER_SCORE = {128: 4400 / 2**20, 256: 2600 / 2**20}  # by the width of the matrix unit
BUNDLES_PER_MASKED_SCORE = {128: 1000 / 2**20, 256: 1600 / 2**20}  # on top
VMEM_LIMIT_BYTES = 56 * 2**20  # of the smallest chip's 64 MiB
MAX_KV_SPAN_BYTES = 16 * 2**20  # of dk and dv: float32 sums, and their output blocks, double-buffered


class TpuBlockSizes(NamedTuple):
    """The amount of work of one grid step and of each of its matmuls.

    Attributes:
        block_q: queries per block, of each of the G heads of a key head; a power of two.
        block_kv: keys per block.
        block_q_compute: packed queries per matmul; divides G block_q, and divides block_q or is a multiple of it.
        block_kv_compute: keys per matmul; divides block_kv.
        kv_span: keys whose gradients stay in VMEM together; a multiple of block_kv.
    """

    block_q: int
    block_kv: int
    block_q_compute: int
    block_kv_compute: int
    kv_span: int

    def subtile(self, G: int) -> tuple[int, int]:
        """Return (packed queries, keys) per matmul."""
        return self.block_q_compute, self.block_kv_compute


@tunable
def heuristic_block_sizes(
    device: Device,
    *,
    G: int,
    T: int,
    S: int,
    D: int,
    causal: bool,
    window: int | None,
    itemsize: int,
    num_tables: int = 1,
) -> TpuBlockSizes:
    """Choose the block sizes of a problem; its tables have `num_tables` words per visible block."""
    mxu_width = 128 if "v5" in device.kind.lower() else 256
    block_q, block_kv = _fewest_bundles(G, T, S, causal, window, mxu_width, num_tables)
    span = MAX_KV_SPAN_BYTES // ((8 + 4 * itemsize) * D)
    return TpuBlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_q_compute=mxu_width if G * block_q % mxu_width == 0 else 128,
        block_kv_compute=min(256, block_kv),
        kv_span=max(1, span // block_kv) * block_kv,
    )


@functools.lru_cache(maxsize=512)
def _fewest_bundles(
    G: int, T: int, S: int, causal: bool, window: int | None, mxu_width: int, num_tables: int
) -> tuple[int, int]:
    """Return the (block_q, block_kv) with the fewest bundles among those whose tables fit in scalar memory."""
    best: tuple[bool, float, int, int] | None = None
    for block_q in (128, 256, 512, 1024):
        for block_kv in (256, 512, 1024):
            scores = G * block_q * block_kv
            fits = scores <= MAX_SCORES or (block_q, block_kv) == (128, 256)
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
            tables_fit = 4 * num_tables * len(schedule) <= SMEM_BYTES
            candidate = (not tables_fit, bundles if tables_fit else len(schedule), block_q, block_kv)
            best = candidate if best is None else min(best, candidate)
    assert best is not None
    return best[2:]


def bwd_vmem_bytes(sizes: TpuBlockSizes, *, G: int, S: int, D: int, itemsize: int) -> int:
    """Return the VMEM of the backward kernel, which takes more than the forward kernel, about."""
    rows, lanes = G * sizes.block_q, -(-D // 128) * 128
    span = min(sizes.kv_span, -(-S // sizes.block_kv) * sizes.block_kv)
    scores = rows * sizes.block_kv * (8 + 2 * itemsize)  # s and dp in float32, p and ds
    queries = rows * (D * (4 + 2 * itemsize) + lanes * 6 * itemsize)  # dq, q^T and do^T; blocks of q, do and dq twice
    keys = sizes.block_kv * (4 * lanes + D) * itemsize + span * (8 * D + 4 * itemsize * lanes)
    statistics = rows * 512  # of rows: log-sum-exp, delta and segment ids, twice, each padded to 8 sublanes, and more
    return scores + queries + keys + statistics
