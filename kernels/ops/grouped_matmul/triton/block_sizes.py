"""Tiles of the Triton grouped matmuls, those of the mixture of experts included.

They were chosen by compiling: every kernel fits the shared memory of a block, 99 KiB on 8.6, 8.9 and 12.x, and those of
16 bits spill no register. They have not been timed on a GPU.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import triton

MIN_BLOCK = 32  # columns, and summands per step
FEW_ROWS = 32  # per group


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


def _table(sixteen_bits: TritonBlockSizes, tf32: TritonBlockSizes, tf32x3: TritonBlockSizes) -> Table:
    """Return a table of the same sizes on every GPU."""
    sizes = {"16 bits": sixteen_bits, "tf32": tf32, "tf32x3": tf32x3}
    return {(major, kind): size for major in MAJORS for kind, size in sizes.items()}


PRODUCT: Table = _table(
    TritonBlockSizes(128, 128, 64, 8, 3), TritonBlockSizes(128, 128, 32, 8, 3), TritonBlockSizes(64, 128, 32, 8, 3)
) | {(9, "16 bits"): TritonBlockSizes(128, 256, 64, 8, 3)}
SUM_OVER_ROWS: Table = PRODUCT
TWO_PRODUCTS: Table = _table(
    TritonBlockSizes(128, 64, 64, 8, 3), TritonBlockSizes(128, 64, 32, 8, 3), TritonBlockSizes(64, 64, 32, 8, 3)
)
SWIGLU_BWD: Table = _table(
    TritonBlockSizes(128, 64, 64, 8, 3), TritonBlockSizes(128, 64, 32, 8, 3), TritonBlockSizes(64, 64, 32, 8, 3)
)
# Groups of a few rows are bound by reading their matrices: their tiles have few rows and more stages.
PRODUCT_OF_FEW_ROWS: Table = _table(
    TritonBlockSizes(32, 128, 64, 4, 4), TritonBlockSizes(32, 128, 32, 4, 4), TritonBlockSizes(32, 64, 32, 4, 4)
)
TWO_PRODUCTS_OF_FEW_ROWS: Table = _table(
    TritonBlockSizes(32, 64, 64, 4, 4), TritonBlockSizes(32, 64, 32, 4, 4), TritonBlockSizes(32, 32, 32, 4, 4)
)


def product_block_sizes(
    capability: tuple[int, int], dtype: Any, precision: str, N: int, E: int, K: int, J: int
) -> TritonBlockSizes:
    """Return the sizes of the product of N rows, [N, K], with the matrices [K, J] of their E groups."""
    table = PRODUCT_OF_FEW_ROWS if N <= FEW_ROWS * E else PRODUCT
    return _fit(table[_key(capability, dtype, precision)], J, K)


def two_products_block_sizes(
    capability: tuple[int, int], dtype: Any, precision: str, N: int, E: int, K: int, J: int
) -> TritonBlockSizes:
    """Return the sizes of the products of rows with two matrices."""
    table = TWO_PRODUCTS_OF_FEW_ROWS if N <= FEW_ROWS * E else TWO_PRODUCTS
    return _fit(table[_key(capability, dtype, precision)], J, K)


def swiglu_bwd_block_sizes(
    capability: tuple[int, int], dtype: Any, precision: str, N: int, E: int, K: int, J: int
) -> TritonBlockSizes:
    """Return the sizes of the product whose epilogue is the derivative of SwiGLU."""
    table = TWO_PRODUCTS_OF_FEW_ROWS if N <= FEW_ROWS * E else SWIGLU_BWD
    return _fit(table[_key(capability, dtype, precision)], J, K)


def sum_block_sizes(capability: tuple[int, int], dtype: Any, precision: str, M: int, F: int) -> TritonBlockSizes:
    """Return the sizes of the sums [M, F] over rows."""
    sizes = SUM_OVER_ROWS[_key(capability, dtype, precision)]
    return _fit(sizes._replace(block_n=_limit(sizes.block_n, M)), F)


def _key(capability: tuple[int, int], dtype: Any, precision: str) -> tuple[int, str]:
    return capability[0], precision if dtype == jnp.float32 else "16 bits"


def _fit(sizes: TritonBlockSizes, J: int, K: int | None = None) -> TritonBlockSizes:
    """Return the sizes, no larger than narrow matrices need."""
    block_k = sizes.block_k if K is None else _limit(sizes.block_k, K)
    return sizes._replace(block_j=_limit(sizes.block_j, J), block_k=block_k)


def _limit(block: int, size: int) -> int:
    return min(block, max(MIN_BLOCK, triton.next_power_of_2(size)))
