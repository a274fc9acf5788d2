"""The backward pass of the experts' down projection and of SwiGLU in Triton, in one kernel.

Math      dh = dy w_down_e^T;  dgate = p dh up silu'(gate);  dup = p dh silu(gate);  p h;
          dp = sum over the features of dh h;  `moe/swiglu.py` has those of the clamped SwiGLU
Tiling    as `grouped_matmul/triton/gmm.py` for dh; the epilogue reads the same tile of gate and up.

              dy         w_down^T        gate   up         dgate  dup   p h   dp, one column per block of columns
              █ █ █ █    █ █ █ █    +    █      █     ->   █      █     █     |

          dp is written as one number per row and block of columns, so that no two programs write the same address; XLA
          sums the blocks in one order.
State     the accumulator of dh [block_n, block_j] in float32 registers, and in the epilogue gate, up and the results.
Traffic   reads gate and up, and writes dgate, dup and p h, one number each per feature of a row. Never writes dh, and
          spares dp a pass over dh and h. 2 R M F FLOPs for R rows.
Limits    as `grouped_matmul/triton/gmm.py`, M and F for K and J.
Source    as `up_proj.py`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
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
from dantinox.kernels.ops.moe.swiglu import Activation
from dantinox.kernels.ops.moe.triton.swiglu import activation_constants, swiglu_bwd

Array = jax.Array


@triton.jit
def down_proj_bwd_kernel(
    dy,
    w_down,
    gate,
    up,
    router_weights,
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
    CLAMPED: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    dgate,
    dup,
    weighted_h,
    dp_parts,
):
    """Compute one tile of dgate, dup and p h, and its part of dp."""
    e, first, end, j_block, depth = program_rows(tiles, E, K, TILES, J_BLOCKS, GROUP_BLOCKS)
    n = first + tl.arange(0, BLOCK_N)
    j = j_block * BLOCK_J + tl.arange(0, BLOCK_J)
    dh = tl.zeros((BLOCK_N, BLOCK_J), tl.float32)
    dh = add_products(dh, dy, w_down + e * K * J, n, j, depth, N, K, J, BLOCK_J, BLOCK_K, True, PRECISION)
    is_row, is_feature = n < end, (j < J)[None, :]
    offsets = n.to(tl.int64)[:, None] * J + j[None, :]
    gate_tile = tl.load(gate + offsets, mask=is_row[:, None] & is_feature, other=0.0).to(tl.float32)
    up_tile = tl.load(up + offsets, mask=is_row[:, None] & is_feature, other=0.0).to(tl.float32)
    weight = tl.load(router_weights + n, mask=is_row, other=0.0)[:, None]
    dgate_tile, dup_tile, weighted_h_tile, h = swiglu_bwd(dh, gate_tile, up_tile, weight, CLAMPED, LIMIT, ALPHA)
    store_rows(dgate, dgate_tile, n, end, j, J)
    store_rows(dup, dup_tile, n, end, j, J)
    store_rows(weighted_h, weighted_h_tile, n, end, j, J)
    dp = tl.sum(tl.where(is_feature, dh * h, 0.0), axis=1)
    tl.store(dp_parts + tl.cast(j_block, tl.int64) * N + n, dp, mask=is_row)


def down_proj_bwd(
    dy: Array,
    w_down: Array,
    gate: Array,
    up: Array,
    router_weights: Array,
    group_sizes: Array,
    *,
    config: TritonGmmConfig,
    activation: Activation,
) -> Sequence[Array]:
    """Return dgate, dup and p h [R, F] in dy's dtype, and the router's gradients [R] float32.

    Args:
        dy: [R, M], rows sorted by expert.
        w_down: [E, F, M].
        gate: [R, F], from `up_proj`.
        up: [R, F], from `up_proj`.
        router_weights: p [R] float32.
        group_sizes: [E] int32.
        config: static parameters.
        activation: see `swiglu.Activation`.
    """
    (R, M), (E, F, _) = dy.shape, w_down.shape
    dims = R, E, M, F
    sizes = product_block_sizes(config.capability, dy.dtype, config.precision, dims, tiles=5)
    out = jax.ShapeDtypeStruct((R, F), dy.dtype)
    dgate, dup, weighted_h, dp_parts = call_on_rows(
        down_proj_bwd_kernel,
        config,
        sizes,
        group_sizes,
        (dy, w_down, gate, up, router_weights),
        dims,
        (out, out, out, jax.ShapeDtypeStruct((triton.cdiv(F, sizes.block_j), R), jnp.float32)),
        "experts_dh",
        **activation_constants(activation),
    )
    return dgate, dup, weighted_h, jnp.sum(dp_parts, axis=0)
