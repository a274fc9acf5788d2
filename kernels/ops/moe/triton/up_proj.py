"""The gate and up projections of the experts in Triton, and h, in one pass over x.

Math      gate = x w_gate_e + b_gate_e,  up = x w_up_e + b_up_e,  h = silu(gate) up, or the clamped SwiGLU, for the rows
          of expert e; 0 for unassigned rows
Tiling    as `grouped_matmul/triton/gmm.py`; a program has the same columns of both matrices.

              x          w_gate     w_up
              █ █ █ ░    █          █          █ block_n x block_k and block_k x block_j per step
                         █          █          ░ masked past the last summand
                         █          █
                         ░          ░

State     two accumulators [block_n, block_j] in float32 registers; tiles of x and of both matrices in stages of shared
          memory.
Traffic   reads as much per FLOP as a product of 2 block_j columns, and x once instead of twice. Without gradients only
          h is written, one number per feature of a row; gate and up written, read again and turned into h would be
          five. For gradients it writes gate and up too, and `down_proj_bwd.py` reads them. 4 R M F FLOPs for R rows.
Limits    as `grouped_matmul/triton/gmm.py`, M and F for K and J.
Source    Shazeer, GLU Variants (arXiv:2002.05202), and OpenAI's gpt-oss for the formulas; else as
          `grouped_matmul/triton/gmm.py`.
"""

from collections.abc import Sequence

import jax
import triton
import triton.language as tl

from dantinox.kernels.ops.grouped_matmul.triton.block_sizes import product_block_sizes
from dantinox.kernels.ops.grouped_matmul.triton.common import (
    TritonGmmConfig,
    call_on_rows,
    load_operand,
    program_rows,
    store_rows,
)
from dantinox.kernels.ops.moe.swiglu import Activation
from dantinox.kernels.ops.moe.triton.swiglu import activation_constants, swiglu
from dantinox.kernels.ops.moe.vjp import UpBiases

Array = jax.Array


@triton.jit
def up_proj_kernel(
    x,
    w_gate,
    w_up,
    b_gate,
    b_up,
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
    GATE_BIAS: tl.constexpr,
    UP_BIAS: tl.constexpr,
    SAVE: tl.constexpr,
    CLAMPED: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    h,
    gate,
    up,
):
    """Compute one tile of h, and of gate and up if SAVE."""
    e, first, end, j_block, depth = program_rows(tiles, E, K, TILES, J_BLOCKS, GROUP_BLOCKS)
    n = first + tl.arange(0, BLOCK_N)
    j = j_block * BLOCK_J + tl.arange(0, BLOCK_J)
    k = tl.arange(0, BLOCK_K)
    x_pointers = x + tl.minimum(n, N - 1).to(tl.int64)[:, None] * K + k[None, :]
    w_offsets = e * K * J + (k[:, None] * J + j[None, :])
    gate_pointers, up_pointers = w_gate + w_offsets, w_up + w_offsets
    acc_gate = tl.zeros((BLOCK_N, BLOCK_J), tl.float32)
    acc_up = tl.zeros((BLOCK_N, BLOCK_J), tl.float32)
    for start in tl.range(0, depth, BLOCK_K):
        in_depth = start + k < K
        x_tile = load_operand(x_pointers, n < N, in_depth, False, K % BLOCK_K != 0, PRECISION)
        gate_tile = load_operand(gate_pointers, in_depth, j < J, K % BLOCK_K != 0, J % BLOCK_J != 0, PRECISION)
        up_tile = load_operand(up_pointers, in_depth, j < J, K % BLOCK_K != 0, J % BLOCK_J != 0, PRECISION)
        acc_gate = tl.dot(x_tile, gate_tile, acc_gate, input_precision=PRECISION)
        acc_up = tl.dot(x_tile, up_tile, acc_up, input_precision=PRECISION)
        x_pointers += BLOCK_K
        gate_pointers += BLOCK_K * J
        up_pointers += BLOCK_K * J
    has_bias = j < tl.where(depth > 0, J, 0)  # unassigned rows have none
    if GATE_BIAS:
        acc_gate += tl.load(b_gate + e * J + j, mask=has_bias, other=0.0).to(tl.float32)[None, :]
    if UP_BIAS:
        acc_up += tl.load(b_up + e * J + j, mask=has_bias, other=0.0).to(tl.float32)[None, :]
    if SAVE:
        store_rows(gate, acc_gate, n, end, j, J)
        store_rows(up, acc_up, n, end, j, J)
    store_rows(h, swiglu(acc_gate, acc_up, CLAMPED, LIMIT, ALPHA), n, end, j, J)


def up_proj(
    x: Array,
    w_gate: Array,
    w_up: Array,
    group_sizes: Array,
    biases: UpBiases,
    *,
    config: TritonGmmConfig,
    save_residuals: bool,
    activation: Activation,
) -> Sequence[Array]:
    """Return h and, with `save_residuals`, gate and up: [R, F] in x's dtype, zeros in unassigned rows.

    Args:
        x: [R, M], rows sorted by expert.
        w_gate: [E, M, F].
        w_up: [E, M, F].
        group_sizes: [E] int32.
        biases: b_gate and b_up [E, F], each None if there is none.
        config: static parameters.
        save_residuals: whether the backward pass needs gate and up.
        activation: see `swiglu.Activation`.
    """
    (R, M), (E, _, F) = x.shape, w_gate.shape
    dims = R, E, M, F
    out = jax.ShapeDtypeStruct((R, F), x.dtype)
    residual = out if save_residuals else jax.ShapeDtypeStruct((1, 1), x.dtype)
    outs = call_on_rows(
        up_proj_kernel,
        config,
        product_block_sizes(config.capability, x.dtype, config.precision, dims, tiles=2),
        group_sizes,
        (x, w_gate, w_up, *(w_gate if b is None else b for b in biases)),
        dims,
        (out, residual, residual),
        "experts_up",
        GATE_BIAS=biases[0] is not None,
        UP_BIAS=biases[1] is not None,
        SAVE=save_residuals,
        **activation_constants(activation),
    )
    return outs if save_residuals else outs[:1]
