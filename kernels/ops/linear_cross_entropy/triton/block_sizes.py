"""Tiles of the Triton linear cross-entropy, and how the vocabulary is divided.

The tiles were chosen by compiling: their kernels fit the shared memory of a block, 99 KiB on 8.6, 8.9 and 12.x, and
spill no register, but 132 bytes in the forward pass of float32 with a soft cap on 10.x. They have not been timed on a
GPU.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import triton

from dantinox.kernels.tuning import tunable

MIN_PROGRAMS = 1024  # of the forward kernel, several per SM
MIN_SPLITS = 16


class TritonBlockSizes(NamedTuple):
    """Sizes of one kernel.

    Attributes:
        block_n: rows per tile.
        block_v: words per tile.
        block_m: columns of h and w per step of the product.
        num_warps: warps per program.
        num_stages: stages of the software pipeline.
    """

    block_n: int
    block_v: int
    block_m: int
    num_warps: int
    num_stages: int


Table = dict[tuple[int, str], TritonBlockSizes]  # by major compute capability and kind of operands
FWD: Table = {
    (8, "16 bits"): TritonBlockSizes(128, 128, 64, 8, 3),
    (8, "tf32"): TritonBlockSizes(128, 128, 32, 8, 3),
    (8, "tf32x3"): TritonBlockSizes(64, 128, 32, 8, 3),
    (9, "16 bits"): TritonBlockSizes(128, 256, 64, 8, 3),
    (9, "tf32"): TritonBlockSizes(128, 128, 32, 8, 3),
    (9, "tf32x3"): TritonBlockSizes(128, 128, 32, 8, 3),
    (10, "16 bits"): TritonBlockSizes(128, 128, 64, 8, 3),
    (10, "tf32"): TritonBlockSizes(128, 128, 32, 8, 3),
    (10, "tf32x3"): TritonBlockSizes(128, 128, 32, 8, 3),
    (12, "16 bits"): TritonBlockSizes(128, 128, 64, 8, 3),
    (12, "tf32"): TritonBlockSizes(128, 128, 32, 8, 3),
    (12, "tf32x3"): TritonBlockSizes(64, 128, 32, 8, 3),
}
BWD: Table = FWD
# The soft cap needs registers of its own.
FWD_CAPPED: Table = FWD | {(10, "16 bits"): TritonBlockSizes(128, 64, 64, 4, 4)}
BWD_CAPPED: Table = BWD | {(9, "16 bits"): TritonBlockSizes(128, 128, 64, 8, 3)}


@tunable
def fwd_block_sizes(capability: tuple[int, int], dtype: Any, precision: str, capped: bool) -> TritonBlockSizes:
    """Return the sizes of the forward kernel."""
    return (FWD_CAPPED if capped else FWD)[_key(capability, dtype, precision)]


@tunable
def bwd_block_sizes(capability: tuple[int, int], dtype: Any, precision: str, capped: bool) -> TritonBlockSizes:
    """Return the sizes of the kernel of the logits' gradients."""
    return (BWD_CAPPED if capped else BWD)[_key(capability, dtype, precision)]


def _key(capability: tuple[int, int], dtype: Any, precision: str) -> tuple[int, str]:
    return capability[0], precision if dtype == jnp.float32 else "16 bits"


def split_size(N: int, V: int, sizes: TritonBlockSizes) -> int:
    """Return the words per program of the forward kernel: whole tiles, few enough for programs on every SM."""
    num_n_blocks, num_v_blocks = triton.cdiv(N, sizes.block_n), triton.cdiv(V, sizes.block_v)
    splits = min(num_v_blocks, max(MIN_SPLITS, triton.cdiv(MIN_PROGRAMS, num_n_blocks)))
    return triton.cdiv(num_v_blocks, splits) * sizes.block_v
