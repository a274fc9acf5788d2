"""The backward pass of the linear cross-entropy: a Triton kernel for the logits' gradients, two products by XLA.

Math      ds = ((1 + 2 z_loss lse) exp(s - m) / l - [v = target]) dloss cap'(s);  dh = ds w;  dw = ds^T h
Tiling    The vocabulary in chunks, one after the other, each of at most 2^24 logits. The kernel, with a program per
          tile, computes the logits again and writes their gradients; the two products read them.

              vocabulary ->   chunk 0         chunk 1         rest
              block_n rows    █   █   █   █   █   █   █   █   █   ▞        █ a tile   ▞ not stored past the vocabulary
              block_n rows    █   █   █   █   █   █   █   █   █   ▞
                              dh +=           dh +=           dh +=
                              dw[chunk 0] =   dw[chunk 1] =   dw[rest] =

State     one tile of logits [block_n, block_v] in float32 registers; in memory the gradients of a chunk, and the sum of
          dh [N, M] in float32.
Traffic   Writes each gradient once and reads it twice, 6 bytes per logit in 16 bits, most of it in L2, which a chunk
          fits on most cards; XLA alone also writes and reads the float32 products. Reads and writes the sum of dh once
          per chunk. 6 N M V FLOPs, 8 with the forward pass: four products, one more than with all logits in memory.
          A kernel that keeps dh or dw in registers writes no gradients, but a program has registers for about 256 of
          the M columns, so that it computes the logits M / 256 times; one that adds to dh or dw in memory needs
          atomics.
Limits    As the forward kernel. The gradients have the dtype of h, those of float16 are float32: they need its range.
Source    Hsu et al., Liger Kernel (arXiv:2410.10989), for chunks of logits between a kernel and a library's products;
          its chunks are rows, ours words, so that a chunk writes its rows of dw once.
"""

import jax
import triton
import triton.language as tl

from dantinox.kernels.ops.linear_cross_entropy.common import chunk_size, chunked_gradients, gradient_dtype
from dantinox.kernels.ops.linear_cross_entropy.triton.block_sizes import bwd_block_sizes
from dantinox.kernels.ops.linear_cross_entropy.triton.common import TritonConfig, call, tile_products
from dantinox.kernels.triton_math import NO_CAP, cap_derivative, program_tile, scale_scores

Array = jax.Array


@triton.jit
def logit_gradients_kernel(
    h,
    w,
    targets,
    row_max,
    weight_gradient,
    target_gradient,
    N: tl.constexpr,
    V: tl.constexpr,
    M: tl.constexpr,
    V_PARTS: tl.constexpr,
    GROUP_BLOCKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
    CAP: tl.constexpr,
    FACTOR: tl.constexpr,
    BOUND: tl.constexpr,
    INVERSE: tl.constexpr,
    CAPPED: tl.constexpr,
    ds,
):
    """Compute the gradients of one tile of logits, before the cap."""
    n_block, v_block = program_tile(tl.program_id(0), (N + BLOCK_N - 1) // BLOCK_N, V_PARTS, GROUP_BLOCKS)
    n = n_block * BLOCK_N + tl.arange(0, BLOCK_N)
    v = v_block * BLOCK_V + tl.arange(0, BLOCK_V)
    s = tile_products(h, w, n, v, N, V, M, BLOCK_N, BLOCK_V, BLOCK_M, PRECISION)
    s = scale_scores(s, CAP, FACTOR, BOUND, CAPPED, UNIT=1.0)
    is_row = n < N
    m = tl.load(row_max + n, mask=is_row, other=0.0)
    dweight = tl.load(weight_gradient + n, mask=is_row, other=0.0)
    dtarget = tl.load(target_gradient + n, mask=is_row, other=0.0)
    target = tl.load(targets + n, mask=is_row, other=-1)
    gradient = tl.exp(s - m[:, None]) * dweight[:, None]
    gradient -= tl.where(v[None, :] == target[:, None], dtarget[:, None], 0.0)
    if CAP != NO_CAP:
        gradient *= cap_derivative(s, INVERSE)
    offsets = n.to(tl.int64 if N * V >= 2**31 else tl.int32)[:, None] * V + v[None, :]
    tl.store(ds + offsets, gradient.to(ds.dtype.element_ty), mask=is_row[:, None] & (v < V)[None, :])


def backward(
    h: Array,
    w: Array,
    targets: Array,
    row_max: Array,
    weight_gradient: Array,
    target_gradient: Array,
    config: TritonConfig,
) -> tuple[Array, Array]:
    """Return (dh, dw).

    Args:
        h: [N, M]; zeros in rows that take no part.
        w: [V, M].
        targets: [N] int32, below 0 in rows that take no part.
        row_max: maxima m of the logits, [N] float32.
        weight_gradient: factor of exp(s - m), the gradient of the logsumexp over l, [N] float32; 0 in rows that take no
            part.
        target_gradient: gradient of the loss [N] float32, 0 in rows that take no part.
        config: static parameters.
    """
    N, V = h.shape[0], w.shape[0]
    sizes = bwd_block_sizes(config.capability, h.dtype, config.precision, config.softcap is not None)

    def logit_gradients(w_chunk: Array, targets: Array) -> Array:
        return call(
            logit_gradients_kernel,
            config,
            sizes,
            triton.cdiv(w_chunk.shape[0], sizes.block_v),
            (h, w_chunk, targets, row_max, weight_gradient, target_gradient),
            jax.ShapeDtypeStruct((N, w_chunk.shape[0]), gradient_dtype(h.dtype)),
            "linear_cross_entropy_logit_gradients",
        )

    return chunked_gradients(h, w, targets, chunk_size(N, V, sizes.block_v), logit_gradients)
