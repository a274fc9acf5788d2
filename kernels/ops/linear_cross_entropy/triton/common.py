"""Static parameters and the device functions that both Triton kernels of the linear cross-entropy share.

A program has a block of rows and goes over tiles of the vocabulary. The product of a tile is a loop over M. Programs
that run at the same time have a group of blocks of rows and many parts of the vocabulary, so that the rows stay in L2
and each word is read from memory once per group (`triton_math.program_tile`):

    vocabulary ->          0    1    2    3
    rows, group 0     0    0    2    4    6        the order in which programs start, for groups of two blocks
                      1    1    3    5    7
    rows, group 1     2    8    9   10   11
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from dantinox.kernels.ops.linear_cross_entropy.triton.block_sizes import TritonBlockSizes
from dantinox.kernels.triton_call import call_triton
from dantinox.kernels.triton_math import round_operand, score_constants

Array = jax.Array
GROUP = 8  # blocks of rows


class TritonConfig(NamedTuple):
    """Static parameters of the kernels; the arrays hold the sizes.

    Attributes:
        softcap: bound of the logits, or None.
        z_loss: weight of the squared logsumexp.
        precision: how the kernels multiply float32 operands, as `tl.dot` names it: tf32 or tf32x3.
        capability: compute capability of the device, (major, minor).
    """

    softcap: float | None
    z_loss: float
    precision: str
    capability: tuple[int, int]


@triton.jit
def tile_products(
    h,
    w,
    n,
    v,
    N: tl.constexpr,
    V: tl.constexpr,
    M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute h[n] w[v]^T; rows and words past the end are the last ones again."""
    m = tl.arange(0, BLOCK_M)
    h_pointers = h + tl.minimum(n, N - 1).to(tl.int64)[:, None] * M + m[None, :]
    w_pointers = w + tl.minimum(v, V - 1).to(tl.int64)[:, None] * M + m[None, :]
    s = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for start in tl.range(0, M, BLOCK_M):
        if M % BLOCK_M == 0:
            h_tile = tl.load(h_pointers)
            w_tile = tl.load(w_pointers)
        else:
            in_bounds = (start + m < M)[None, :]
            h_tile = tl.load(h_pointers, mask=in_bounds, other=0.0)
            w_tile = tl.load(w_pointers, mask=in_bounds, other=0.0)
        h_tile, w_tile = round_operand(h_tile, PRECISION), round_operand(w_tile, PRECISION)
        s = tl.dot(h_tile, tl.trans(w_tile), s, input_precision=PRECISION)
        h_pointers += BLOCK_M
        w_pointers += BLOCK_M
    return s


def call(
    kernel: Any,
    config: TritonConfig,
    sizes: TritonBlockSizes,
    v_parts: int,
    arrays: tuple[Array, ...],
    out_type: Any,
    name: str,
    **constants: Any,
) -> Any:
    """Call a kernel on (h, w, ...), with a program per block of rows and part of the vocabulary."""
    h, w = arrays[:2]
    (N, M), V = h.shape, w.shape[0]
    num_n_blocks = triton.cdiv(N, sizes.block_n)
    return call_triton(
        kernel,
        *arrays,
        out_type=out_type,
        grid=(num_n_blocks * v_parts,),
        capability=config.capability,
        num_warps=sizes.num_warps,
        num_stages=sizes.num_stages,
        name=name,
        N=N,
        V=V,
        M=M,
        V_PARTS=v_parts,
        GROUP_BLOCKS=GROUP,
        BLOCK_N=sizes.block_n,
        BLOCK_V=sizes.block_v,
        BLOCK_M=sizes.block_m,
        PRECISION=config.precision,
        **score_constants(1.0, config.softcap, unit=1.0),
        **constants,
    )


def float32_rows(*shape: int) -> jax.ShapeDtypeStruct:
    """Return the type of a result with a float32 number per row."""
    return jax.ShapeDtypeStruct(shape, jnp.float32)
