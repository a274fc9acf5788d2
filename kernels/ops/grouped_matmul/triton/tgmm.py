"""Transposed grouped matmul in Triton, the gradient of the matrices: a sum over the rows of each group.

Math      dw_e = sum of x_n^T dy_n over the rows n of group e; zero for empty groups
Tiling    A program per group and tile of its matrix, which goes over the rows of the group in steps of block_k, from
          the first on. All tiles of a group start before those of the next, in the order of `gmm.py`.

              rows ->          step 0     1      2
              dw of group 0    ██         ██     █░            █ rows of the group
              dw of group 1    ██         █░                   ░ rows of others, loaded as zeros, in x and in dy
              dw of group 2    no step: zeros

State     [block_n, block_j] accumulators in float32 registers; tiles of x and dy in stages of shared memory.
Traffic   a tile of 128 x 128 reads 128 columns of x and of dy, 64 FLOPs per byte in 16 bits, from L2. Writes dw once,
          without atomics: the sums have one order. 2 N M F FLOPs.
Limits    as `gmm.py`. Unassigned rows are not read. A group of all rows has no more programs than its matrix has tiles.
Source    as `gmm.py`.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from dantinox.kernels.ops.grouped_matmul.triton.block_sizes import sum_block_sizes
from dantinox.kernels.ops.grouped_matmul.triton.common import GROUP, TritonGmmConfig, load_operand, store_rows
from dantinox.kernels.triton_call import call_triton
from dantinox.kernels.triton_math import program_tile

Array = jax.Array


@triton.jit
def tgmm_kernel(
    x,
    dy,
    ends,
    M: tl.constexpr,
    F: tl.constexpr,
    M_BLOCKS: tl.constexpr,
    F_BLOCKS: tl.constexpr,
    GROUP_BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    dw,
):
    """Compute one tile of the dw of one group."""
    e = tl.program_id(0) // (M_BLOCKS * F_BLOCKS)
    m_block, f_block = program_tile(tl.program_id(0) % (M_BLOCKS * F_BLOCKS), M_BLOCKS, F_BLOCKS, GROUP_BLOCKS)
    m = m_block * BLOCK_M + tl.arange(0, BLOCK_M)
    f = f_block * BLOCK_F + tl.arange(0, BLOCK_F)
    first, end = tl.load(ends + e), tl.load(ends + e + 1)
    n = first + tl.arange(0, BLOCK_N)
    x_pointers = x + n.to(tl.int64)[:, None] * M + m[None, :]
    dy_pointers = dy + n.to(tl.int64)[:, None] * F + f[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_F), tl.float32)
    for start in tl.range(first, end, BLOCK_N):
        in_group = start + tl.arange(0, BLOCK_N) < end
        x_tile = load_operand(x_pointers, in_group, m < M, True, M % BLOCK_M != 0, PRECISION)
        dy_tile = load_operand(dy_pointers, in_group, f < F, True, F % BLOCK_F != 0, PRECISION)
        acc = tl.dot(tl.trans(x_tile), dy_tile, acc, input_precision=PRECISION)
        x_pointers += BLOCK_N * M
        dy_pointers += BLOCK_N * F
    store_rows(dw + e.to(tl.int64) * M * F, acc, m, M, f, F)


def tgmm(x: Array, dy: Array, group_sizes: Array, *, config: TritonGmmConfig, name: str = "grouped_matmul_dw") -> Array:
    """Return dw [E, M, F] in x's dtype.

    Args:
        x: [N, M], rows sorted by group.
        dy: [N, F].
        group_sizes: [E] int32.
        config: static parameters.
        name: name of the kernel.
    """
    M, F, E = x.shape[1], dy.shape[1], group_sizes.shape[0]
    sizes = sum_block_sizes(config.capability, x.dtype, config.precision, M, F)
    m_blocks, f_blocks = triton.cdiv(M, sizes.block_n), triton.cdiv(F, sizes.block_j)
    ends = jnp.cumsum(jnp.append(jnp.zeros(1, jnp.int32), group_sizes.astype(jnp.int32)))
    return call_triton(
        tgmm_kernel,
        x,
        dy,
        ends.astype(jnp.int32),
        out_type=jax.ShapeDtypeStruct((E, M, F), x.dtype),
        grid=(E * m_blocks * f_blocks,),
        capability=config.capability,
        num_warps=sizes.num_warps,
        num_stages=sizes.num_stages,
        name=name,
        M=M,
        F=F,
        M_BLOCKS=m_blocks,
        F_BLOCKS=f_blocks,
        GROUP_BLOCKS=GROUP,
        BLOCK_M=sizes.block_n,
        BLOCK_F=sizes.block_j,
        BLOCK_N=sizes.block_k,
        PRECISION=config.precision,
    )
