"""Tiles of the Hopper linear cross-entropy, and how the forward kernel divides the vocabulary.

A tile has the rows and the contraction of a grouped matmul's, and 256 words: 85 FLOPs per byte read from L2. A task of
the forward kernel is a block of rows and a split of several tiles, whose maxima and sums stay in registers. Long splits
write less; short ones leave fewer SMs idle at the end. The table lists the share of the time of 132 SMs, until the last
one ends, that the tiles take:

    rows x words      tiles per split   splits   share    with one split
    8192 x 32768             64            2      97.0%      48.5%
    8192 x 151936            18           33     100.0%      48.5%
    4096 x 50257              6           33      99.5%      24.2%
    1024 x 32000              8           16      94.7%       6.1%
    512 x 151936             18           33     100.0%       3.0%
    500 x 2100                1            9      27.3%       3.0%
"""

from dantinox.kernels.ops.grouped_matmul.pallas_sm90.block_sizes import BLOCK_K as BLOCK_K
from dantinox.kernels.ops.grouped_matmul.pallas_sm90.block_sizes import BLOCK_M as BLOCK_N
from dantinox.kernels.ops.grouped_matmul.pallas_sm90.block_sizes import WARPGROUP_ROWS as WARPGROUP_ROWS

BLOCK_V = 256  # words per tile: 128 accumulators per thread
STAGES = 4  # of 48 KiB, as many as fit in SMEM; a power of two
TASK_OVERHEAD = 0.1  # tiles: to start a task and to write its sums; a guess


def tiles_per_split(N: int, V: int, block_v: int, num_sms: int) -> int:
    """Return the tiles of a split for which the slowest SM ends first; of equals, the most.

    Args:
        N: rows.
        V: words.
        block_v: words per tile.
        num_sms: SMs of the device.
    """
    num_n_blocks, num_v_blocks = -(-N // BLOCK_N), -(-V // block_v)

    def slowest_sm(tiles: int) -> float:
        tasks = num_n_blocks * -(-num_v_blocks // tiles)
        return -(-tasks // num_sms) * (tiles + TASK_OVERHEAD)

    return min(range(num_v_blocks, 0, -1), key=slowest_sm)
