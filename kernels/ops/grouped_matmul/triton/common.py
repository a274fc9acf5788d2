"""Static parameters, tables of tiles and the device functions that the Triton grouped matmuls share.

A tile has rows of one group, from the group's first on. The sizes of the groups are known on the device only, so the
grid has as many tiles as any sizes can need, ceil(N / block) + E, and the last ones have no rows:

    groups    |   0   | 1|       2       | unassigned |
    tiles     |  0 | 1|2 |  3 |  4 |  5  |  6  |   7  | 8 ░ 9 ░
                                            zeros        no rows
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from dantinox.kernels.ops.grouped_matmul.group_metadata import make_group_metadata
from dantinox.kernels.ops.grouped_matmul.triton.block_sizes import TritonBlockSizes
from dantinox.kernels.triton_call import call_triton
from dantinox.kernels.triton_math import program_tile, round_operand

Array = jax.Array
GROUP = 8  # tiles of rows that run at the same time with all columns


class TritonGmmConfig(NamedTuple):
    """Static parameters of the kernels; the arrays hold the sizes.

    Attributes:
        precision: how the kernels multiply float32 operands, as `tl.dot` names it: tf32 or tf32x3.
        capability: compute capability of the device, (major, minor).
    """

    precision: str
    capability: tuple[int, int]


def row_tiles(group_sizes: Array, N: int, block_n: int) -> Array:
    """Return the group, the first row and the end of the rows of each tile, [3, tiles] int32.

    Unassigned rows have the group E; a tile without rows ends at row 0.
    """
    metadata = make_group_metadata(group_sizes, N, block_n, align=1)
    in_use = jnp.arange(metadata.group.shape[0], dtype=jnp.int32) < metadata.count
    return jnp.stack([metadata.group, metadata.row, jnp.where(in_use, metadata.row_end, 0)]).astype(jnp.int32)


@triton.jit
def program_rows(
    tiles, E: tl.constexpr, K: tl.constexpr, TILES: tl.constexpr, J_BLOCKS: tl.constexpr, GROUP_BLOCKS: tl.constexpr
):
    """Return a program's group, first row, end of rows, block of columns, and K, or 0 if it multiplies nothing."""
    tile, j_block = program_tile(tl.program_id(0), TILES, J_BLOCKS, GROUP_BLOCKS)
    e = tl.load(tiles + tile)
    first = tl.load(tiles + TILES + tile)
    end = tl.load(tiles + 2 * TILES + tile)
    depth = tl.where((e < E) & (first < end), K, 0)
    return tl.minimum(e, E - 1).to(tl.int64), first, end, j_block, depth


@triton.jit
def load_operand(pointers, rows, columns, MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr, PRECISION: tl.constexpr):
    """Load a tile for a product, with zeros outside the masks that apply."""
    if MASK_ROWS and MASK_COLUMNS:
        tile = tl.load(pointers, mask=rows[:, None] & columns[None, :], other=0.0)
    elif MASK_ROWS:
        tile = tl.load(pointers, mask=rows[:, None], other=0.0)
    elif MASK_COLUMNS:
        tile = tl.load(pointers, mask=columns[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return round_operand(tile, PRECISION)


@triton.jit
def add_products(
    acc,
    x,
    w,
    n,
    j,
    depth,
    N: tl.constexpr,
    K: tl.constexpr,
    J: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add x[n] w[:, j], or x[n] w[j]^T if TRANSPOSED; rows past the end are the last one again."""
    k = tl.arange(0, BLOCK_K)
    x_pointers = x + tl.minimum(n, N - 1).to(tl.int64)[:, None] * K + k[None, :]
    if TRANSPOSED:
        w_pointers = w + tl.minimum(j, J - 1)[:, None] * K + k[None, :]
    else:
        w_pointers = w + k[:, None] * J + j[None, :]
    for start in tl.range(0, depth, BLOCK_K):
        in_depth = start + k < K
        x_tile = load_operand(x_pointers, n < N, in_depth, False, K % BLOCK_K != 0, PRECISION)
        if TRANSPOSED:
            w_tile = tl.trans(load_operand(w_pointers, j < J, in_depth, False, K % BLOCK_K != 0, PRECISION))
            w_pointers += BLOCK_K
        else:
            w_tile = load_operand(w_pointers, in_depth, j < J, K % BLOCK_K != 0, J % BLOCK_J != 0, PRECISION)
            w_pointers += BLOCK_K * J
        x_pointers += BLOCK_K
        acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION)
    return acc


@triton.jit
def store_rows(out, value, n, end, j, J: tl.constexpr):
    """Store a tile's rows before `end`."""
    mask = (n < end)[:, None] & (j < J)[None, :]
    tl.store(out + n.to(tl.int64)[:, None] * J + j[None, :], value.to(out.dtype.element_ty), mask=mask)


def call_on_rows(
    kernel: Any,
    config: TritonGmmConfig,
    sizes: TritonBlockSizes,
    group_sizes: Array,
    arrays: tuple[Array, ...],
    dims: tuple[int, int, int, int],
    out_type: Any,
    name: str,
    **constants: Any,
) -> Any:
    """Call a kernel with a program per tile of rows and block of columns.

    Args:
        kernel: a function of `arrays`, the tiles, constants and the outputs.
        config: static parameters.
        sizes: sizes of the tiles.
        group_sizes: [E] int32.
        arrays: the kernel's arrays.
        dims: (N, E, K, J).
        out_type: shapes and dtypes of the outputs.
        name: name of the kernel.
        constants: further constants of the kernel.
    """
    N, E, K, J = dims
    tiles = row_tiles(group_sizes, N, sizes.block_n)
    j_blocks = triton.cdiv(J, sizes.block_j)
    return call_triton(
        kernel,
        *arrays,
        tiles,
        out_type=out_type,
        grid=(tiles.shape[1] * j_blocks,),
        capability=config.capability,
        num_warps=sizes.num_warps,
        num_stages=sizes.num_stages,
        name=name,
        N=N,
        E=E,
        K=K,
        J=J,
        TILES=tiles.shape[1],
        J_BLOCKS=j_blocks,
        GROUP_BLOCKS=GROUP,
        BLOCK_N=sizes.block_n,
        BLOCK_J=sizes.block_j,
        BLOCK_K=sizes.block_k,
        PRECISION=config.precision,
        **constants,
    )
