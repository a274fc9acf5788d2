"""The forward pass of the linear cross-entropy in Triton: an online logsumexp, with the vocabulary split.

Math      s = cap(h w^T);  m = max_v s;  l = sum_v exp(s - m);  lse = m + log(l);
          loss = (m - s[target]) + log(l) + z_loss lse^2
Tiling    A program per block of rows and split of the vocabulary, which it visits tile by tile. XLA combines the
          splits, so that a few rows too have programs for every SM.

              vocabulary ->   split 0     split 1     split 2
              block_n rows    █   █   █   █   █   █   █   ▞        █ a tile   ▞ masked past the vocabulary
              block_n rows    █   █   █   █   █   █   █   ▞

State     m, l and the target's logit [block_n], and one tile of logits [block_n, block_v] in float32 registers; tiles
          of h and w, block_m columns wide, in stages of shared memory.
Traffic   Reads w once per group of blocks of rows and h once, from memory; from L2, a tile of both per tile of logits.
          Writes 3 float32 numbers per row and split. 2 N M V FLOPs. With all logits it would write and read N V
          numbers.
Limits    float32 (rounded to TF32, or in three passes where the matmul precision asks for it), bfloat16, float16; any
          N, M and V. `kernels.linear_cross_entropy` raises the ValueErrors.
Source    Milakov and Gimelshein, Online normalizer calculation for softmax (arXiv:1805.02867); Wijmans et al., Cut Your
          Losses in Large-Vocabulary Language Models (arXiv:2411.09009).
"""

import jax
import triton
import triton.language as tl

from dantinox.kernels.ops.linear_cross_entropy.common import combine_splits
from dantinox.kernels.ops.linear_cross_entropy.triton.block_sizes import fwd_block_sizes, split_size
from dantinox.kernels.ops.linear_cross_entropy.triton.common import (
    TritonConfig,
    call,
    float32_rows,
    tile_products,
)
from dantinox.kernels.triton_math import LOWEST, program_tile, scale_scores

Array = jax.Array


@triton.jit
def forward_kernel(
    h,
    w,
    targets,
    N: tl.constexpr,
    V: tl.constexpr,
    M: tl.constexpr,
    V_PARTS: tl.constexpr,
    GROUP_BLOCKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    CAP: tl.constexpr,
    FACTOR: tl.constexpr,
    BOUND: tl.constexpr,
    INVERSE: tl.constexpr,
    CAPPED: tl.constexpr,
    row_max,
    total,
    target_logit,
):
    """Compute the maximum, the sum and the target's logit of a block of rows over one split of the vocabulary."""
    n_block, split = program_tile(tl.program_id(0), (N + BLOCK_N - 1) // BLOCK_N, V_PARTS, GROUP_BLOCKS)
    n = n_block * BLOCK_N + tl.arange(0, BLOCK_N)
    target = tl.load(targets + n, mask=n < N, other=-1)
    m = tl.full((BLOCK_N,), LOWEST, tl.float32)
    l = tl.zeros((BLOCK_N,), tl.float32)
    s_target = tl.zeros((BLOCK_N,), tl.float32)
    for v_start in tl.range(split * SPLIT, tl.minimum((split + 1) * SPLIT, V), BLOCK_V):
        v = v_start + tl.arange(0, BLOCK_V)
        s = tile_products(h, w, n, v, N, V, M, BLOCK_N, BLOCK_V, BLOCK_M, PRECISION)
        s = scale_scores(s, CAP, FACTOR, BOUND, CAPPED, UNIT=1.0)
        s = tl.where((v < V)[None, :], s, float("-inf"))
        s_target += tl.sum(tl.where(v[None, :] == target[:, None], s, 0.0), axis=1)
        new_m = tl.maximum(m, tl.max(s, axis=1))
        l = l * tl.exp(m - new_m) + tl.sum(tl.exp(s - new_m[:, None]), axis=1)
        m = new_m
    row = split.to(tl.int64) * N + n
    tl.store(row_max + row, m, mask=n < N)
    tl.store(total + row, l, mask=n < N)
    tl.store(target_logit + row, s_target, mask=n < N)


def forward(h: Array, w: Array, targets: Array, config: TritonConfig) -> tuple[Array, Array, Array]:
    """Return (losses, maxima m of the logits, their sums of exponentials l), [N] float32.

    Args:
        h: [N, M].
        w: [V, M].
        targets: [N] int32, below 0 in rows that take no part.
        config: static parameters.
    """
    N, V = h.shape[0], w.shape[0]
    sizes = fwd_block_sizes(config.capability, h.dtype, config.precision, config.softcap is not None)
    split = split_size(N, V, sizes)
    splits = triton.cdiv(V, split)
    maxima, totals, target_logits = call(
        forward_kernel,
        config,
        sizes,
        splits,
        (h, w, targets),
        (float32_rows(splits, N),) * 3,
        "linear_cross_entropy",
        SPLIT=split,
    )
    return combine_splits(maxima, totals, target_logits, targets, config.z_loss)
