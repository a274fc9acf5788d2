"""Grouped matmul in Triton: every row times the matrix of its group.

Math      y_n = p_n sum over i of x^i_n w^i_e for the rows n of group e, or x^i_n w^i_e^T without transposing in memory;
          0 for unassigned rows. Only a mixture of experts has two pairs x, w (its dx) or weights p (its outputs).
Tiling    A program per tile of rows of one group (`common.py`) and block of columns. Programs that run at the same time
          have a group of 8 tiles of rows and all columns: rows and matrices are read from L2, and each column from
          memory once per 8 tiles.

              columns ->               0    1    2    3
              tile 0, group 0          0    2    4    6       the order in which programs start, for two tiles at a time
              tile 1, group 0 ▞        1    3    5    7       ▞ the last rows are those of group 1, not stored
              tile 2, group 1          8   10   12   14
              tile 3, unassigned ░     9   11   13   15       ░ zeros are written, nothing is loaded or multiplied

State     [block_n, block_j] accumulators in float32 registers; tiles of x and w, block_k summands wide, in stages of
          shared memory.
Traffic   a tile of 128 x 128 reads 128 rows of x and 128 columns of w, 64 FLOPs per byte in 16 bits, from L2. Writes y
          once. 2 N K J FLOPs, and wasted ones for the rows that a group's last tile lacks.
Limits    float32 (rounded to TF32, or in three passes where the matmul precision asks for it), bfloat16, float16; any
          N, K, J and E. Rows of other groups, NaN included, only enter accumulator rows that are not stored.
Source    Gale et al., MegaBlocks (arXiv:2211.15841), for tiles of one group's rows; Tillet et al., Triton, for the
          order of the programs.
"""

from collections.abc import Sequence

import jax
import triton
import triton.language as tl

from dantinox.kernels.ops.grouped_matmul.triton.block_sizes import product_block_sizes
from dantinox.kernels.ops.grouped_matmul.triton.common import (
    TritonGmmConfig,
    add_products,
    call_on_rows,
    program_rows,
    store_rows,
)

Array = jax.Array


@triton.jit
def gmm_kernel(
    x,
    w,
    second_x,
    second_w,
    row_weights,
    tiles,
    N: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    J: tl.constexpr,
    TILES: tl.constexpr,
    J_BLOCKS: tl.constexpr,
    GROUP_BLOCKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PAIRS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    y,
):
    """Compute one tile of y."""
    e, first, end, j_block, depth = program_rows(tiles, E, K, TILES, J_BLOCKS, GROUP_BLOCKS)
    n = first + tl.arange(0, BLOCK_N)
    j = j_block * BLOCK_J + tl.arange(0, BLOCK_J)
    acc = tl.zeros((BLOCK_N, BLOCK_J), tl.float32)
    acc = add_products(acc, x, w + e * K * J, n, j, depth, N, K, J, BLOCK_J, BLOCK_K, TRANSPOSED, PRECISION)
    if PAIRS == 2:
        second = second_w + e * K * J
        acc = add_products(acc, second_x, second, n, j, depth, N, K, J, BLOCK_J, BLOCK_K, TRANSPOSED, PRECISION)
    if WEIGHTED:
        acc *= tl.load(row_weights + n, mask=n < end, other=0.0)[:, None]
    store_rows(y, acc, n, end, j, J)


def gmm(
    xs: Sequence[Array],
    ws: Sequence[Array],
    group_sizes: Array,
    row_weights: Array | None = None,
    *,
    config: TritonGmmConfig,
    transposed: bool = False,
    name: str = "grouped_matmul",
) -> Array:
    """Return y [N, J], zeros in unassigned rows.

    Args:
        xs: one or two arrays [N, K], rows sorted by group.
        ws: as many arrays [E, K, J], or [E, J, K] if transposed.
        group_sizes: [E] int32.
        row_weights: factors [N] float32, or None.
        config: static parameters.
        transposed: whether to multiply by the transposes of the matrices.
        name: name of the kernel.
    """
    x, w = xs[0], ws[0]
    (N, K), E = x.shape, w.shape[0]
    J = w.shape[1] if transposed else w.shape[2]
    dims = N, E, K, J
    return call_on_rows(
        gmm_kernel,
        config,
        product_block_sizes(config.capability, x.dtype, config.precision, dims),
        group_sizes,
        (x, w, xs[-1], ws[-1], group_sizes if row_weights is None else row_weights),
        dims,
        jax.ShapeDtypeStruct((N, J), x.dtype),
        name,
        TRANSPOSED=transposed,
        PAIRS=len(xs),
        WEIGHTED=row_weights is not None,
    )
