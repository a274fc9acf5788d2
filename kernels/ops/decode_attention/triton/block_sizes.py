"""Tiles of the Triton decode attention, by compute capability, dtype and head dim, and the number of splits.

They were chosen by compiling: with every feature they fit the 99 KiB of shared memory that a block has on 8.6, 8.9 and
12.x, and spill no register in 16 bits. They have not been timed on a GPU.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import triton

from dantinox.kernels.ops.decode_attention.num_splits import choose_num_splits
from dantinox.kernels.triton_math import head_block
from dantinox.kernels.tuning import tunable

MIN_ROWS = 16  # of a tile on the tensor cores


class TritonBlockSizes(NamedTuple):
    """Sizes of one kernel.

    Attributes:
        max_rows: queries per tile, at most.
        block_kv: tokens per tile.
        num_warps: warps per program.
        num_stages: stages of the software pipeline.
    """

    max_rows: int
    block_kv: int
    num_warps: int
    num_stages: int


Table = dict[tuple[int, int], TritonBlockSizes]  # by bytes per operand and columns of a tile
SIZES: Table = {
    (2, 16): TritonBlockSizes(64, 128, 4, 3),
    (2, 32): TritonBlockSizes(64, 128, 4, 3),
    (2, 64): TritonBlockSizes(64, 64, 4, 3),
    (2, 128): TritonBlockSizes(64, 64, 4, 2),
    (2, 256): TritonBlockSizes(32, 32, 4, 2),
    (4, 16): TritonBlockSizes(64, 64, 4, 3),
    (4, 32): TritonBlockSizes(64, 64, 4, 3),
    (4, 64): TritonBlockSizes(32, 64, 4, 2),
    (4, 128): TritonBlockSizes(32, 32, 4, 2),
    (4, 256): TritonBlockSizes(16, 16, 4, 2),
}
# Programs that run at a time: two per SM of the largest card of a capability.
RESIDENT_PROGRAMS = {(8, 0): 216, (8, 6): 168, (8, 7): 32, (8, 9): 284, (9, 0): 264, (10, 0): 296, (12, 0): 376}
OTHER_RESIDENT_PROGRAMS = 264


@tunable
def split_block_sizes(dtype: Any, D: int) -> TritonBlockSizes:
    """Return the sizes for queries of a dtype and head dim, which are the same on all GPUs."""
    return SIZES[jnp.dtype(dtype).itemsize, head_block(D)]


def rows_per_tile(num_rows: int, sizes: TritonBlockSizes) -> int:
    """Return the rows per tile for the queries of one KV head."""
    return min(sizes.max_rows, max(MIN_ROWS, triton.next_power_of_2(num_rows)))


def splits(capability: tuple[int, int], B: int, programs: int, num_visible: int, sizes: TritonBlockSizes) -> int:
    """Return the splits per sequence.

    Args:
        capability: compute capability of the device.
        B: sequences.
        programs: KV heads times tiles of rows.
        num_visible: tokens in the ring buffer that a query sees, at most.
        sizes: sizes of the kernel.
    """
    resident = RESIDENT_PROGRAMS.get(capability, OTHER_RESIDENT_PROGRAMS)
    return choose_num_splits(B, programs, triton.cdiv(num_visible, sizes.block_kv) + 1, resident)
