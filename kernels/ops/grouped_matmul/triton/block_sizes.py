"""Tiles of the Triton grouped matmuls, those of the mixture of experts included.

They were chosen by compiling: every kernel fits the shared memory of a block, 99 KiB on 8.6, 8.9 and 12.x, and those of
16 bits spill no register. They have not been timed on a GPU.
"""

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import triton

from dantinox.kernels.tuning import tunable

MIN_BLOCK = 32  # columns, and summands per step
MAX_NARROW_TILE, NARROW_WARPS = 64 * 128, 4  # of a sum over rows
MAX_FEW_ROWS = 32  # per group, on average


class TritonBlockSizes(NamedTuple):
    """Sizes of one kernel.

    Attributes:
        block_n: rows per tile of the output; of a sum over rows, columns of x.
        block_j: columns per tile of the output, of each matrix.
        block_k: summands per step of the product.
        num_warps: warps per program.
        num_stages: stages of the software pipeline.
    """

    block_n: int
    block_j: int
    block_k: int
    num_warps: int
    num_stages: int


Table = dict[tuple[int, str], TritonBlockSizes]  # by major compute capability and kind of operands
MAJORS = (8, 9, 10, 12)
ALIGNMENT = 8  # columns of 16 bits; others are copied through registers, which hold a pointer per element


def _table(
    sixteen_bits: TritonBlockSizes, unaligned: TritonBlockSizes, tf32: TritonBlockSizes, tf32x3: TritonBlockSizes
) -> Table:
    """Return a table of the same sizes on every GPU."""
    sizes = {"16 bits": sixteen_bits, "16 bits, unaligned": unaligned, "tf32": tf32, "tf32x3": tf32x3}
    return {(major, kind): size for major in MAJORS for kind, size in sizes.items()}


MANY_ROWS: Table = _table(
    TritonBlockSizes(128, 128, 64, 8, 3),
    TritonBlockSizes(128, 128, 32, 8, 3),
    TritonBlockSizes(128, 128, 32, 8, 3),
    TritonBlockSizes(64, 128, 32, 8, 3),
) | {(9, "16 bits"): TritonBlockSizes(128, 256, 64, 8, 3)}
MANY_ROWS_OF_TWO: Table = _table(
    TritonBlockSizes(128, 64, 64, 8, 3),
    TritonBlockSizes(64, 64, 32, 8, 3),
    TritonBlockSizes(128, 64, 32, 8, 3),
    TritonBlockSizes(64, 64, 32, 8, 3),
) | {(8, "16 bits"): TritonBlockSizes(128, 64, 32, 8, 4)}
# With an epilogue of four more tiles in float32, TF32 operands leave registers for 64 rows.
MANY_ROWS_OF_FIVE: Table = MANY_ROWS_OF_TWO | {(major, "tf32"): TritonBlockSizes(64, 64, 32, 8, 3) for major in MAJORS}
# Groups of a few rows are bound by reading their matrices: their tiles have few rows and more stages.
FEW_ROWS: Table = _table(
    TritonBlockSizes(32, 128, 64, 4, 4),
    TritonBlockSizes(32, 128, 32, 4, 4),
    TritonBlockSizes(32, 128, 32, 4, 4),
    TritonBlockSizes(32, 64, 32, 4, 4),
)
FEW_ROWS_OF_TWO: Table = _table(
    TritonBlockSizes(32, 64, 64, 4, 4),
    TritonBlockSizes(32, 64, 32, 4, 4),
    TritonBlockSizes(32, 64, 32, 4, 4),
    TritonBlockSizes(32, 32, 32, 4, 4),
)
SUM_OVER_ROWS: Table = MANY_ROWS


@tunable
def product_block_sizes(
    capability: tuple[int, int],
    dtype: Any,
    precision: str,
    dims: tuple[int, int, int, int],
    *,
    tiles: Literal[1, 2, 5] = 1,
) -> TritonBlockSizes:
    """Return the sizes of a product of rows with the matrices of their groups.

    Args:
        capability: compute capability of the device.
        dtype: dtype of the operands.
        precision: how float32 is multiplied.
        dims: (N, E, K, J), of rows [N, K] and matrices [E, K, J].
        tiles: tiles that a program holds in float32: accumulators, and what its epilogue reads and computes.
    """
    N, E, K, J = dims
    if N <= MAX_FEW_ROWS * E:
        table = FEW_ROWS if tiles == 1 else FEW_ROWS_OF_TWO
    else:
        table = {1: MANY_ROWS, 2: MANY_ROWS_OF_TWO, 5: MANY_ROWS_OF_FIVE}[tiles]
    sizes = table[_key(capability, dtype, precision, K, J)]
    return sizes._replace(block_j=_limit(sizes.block_j, J), block_k=_limit(sizes.block_k, K))


@tunable
def sum_block_sizes(capability: tuple[int, int], dtype: Any, precision: str, M: int, F: int) -> TritonBlockSizes:
    """Return the sizes of the sums [M, F] over rows."""
    sizes = SUM_OVER_ROWS[_key(capability, dtype, precision, M, F)]
    block_n, block_j = _limit(sizes.block_n, M), _limit(sizes.block_j, F)
    is_narrow = (block_n, block_j) != sizes[:2] and block_n * block_j <= MAX_NARROW_TILE
    num_warps = NARROW_WARPS if is_narrow else sizes.num_warps
    return sizes._replace(block_n=block_n, block_j=block_j, num_warps=num_warps)


def _key(capability: tuple[int, int], dtype: Any, precision: str, *widths: int) -> tuple[int, str]:
    if dtype == jnp.float32:
        return capability[0], precision
    return capability[0], "16 bits" if all(width % ALIGNMENT == 0 for width in widths) else "16 bits, unaligned"


def _limit(block: int, size: int) -> int:
    return min(block, max(MIN_BLOCK, triton.next_power_of_2(size)))
