"""Block sizes of the Triton attention kernels, by compute capability, dtype and head dim.

They were chosen by compiling: the first of a list, from large to small, whose kernel with every feature (gate, window,
segments, soft cap) spills no register and fits the 99 KiB of shared memory that a block has on 8.6, 8.9 and 12.x. They
have not been timed on a GPU.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp

from dantinox.kernels.triton_math import head_block
from dantinox.kernels.tuning import tunable


class TritonBlockSizes(NamedTuple):
    """Sizes of one kernel.

    Attributes:
        block_q: queries per block.
        block_kv: keys per block.
        num_warps: warps per program.
        num_stages: stages of the software pipeline.
    """

    block_q: int
    block_kv: int
    num_warps: int
    num_stages: int


Table = dict[tuple[int, int], TritonBlockSizes]  # by bytes per operand and columns of a block
FWD: Table = {
    (2, 32): TritonBlockSizes(128, 64, 4, 3),
    (2, 64): TritonBlockSizes(128, 64, 4, 3),
    (2, 128): TritonBlockSizes(128, 64, 8, 3),
    (2, 256): TritonBlockSizes(64, 32, 8, 2),
    (4, 32): TritonBlockSizes(128, 64, 8, 2),
    (4, 64): TritonBlockSizes(64, 32, 4, 2),
    (4, 128): TritonBlockSizes(64, 32, 8, 2),
    (4, 256): TritonBlockSizes(64, 16, 8, 1),
}
DQ: Table = {
    (2, 32): TritonBlockSizes(128, 64, 8, 2),
    (2, 64): TritonBlockSizes(128, 64, 8, 2),
    (2, 128): TritonBlockSizes(128, 32, 8, 2),
    (2, 256): TritonBlockSizes(64, 32, 8, 1),
    (4, 32): TritonBlockSizes(64, 32, 4, 2),
    (4, 64): TritonBlockSizes(64, 32, 4, 2),
    (4, 128): TritonBlockSizes(64, 32, 8, 1),
    (4, 256): TritonBlockSizes(32, 16, 8, 1),
}
DKV: Table = {
    (2, 32): TritonBlockSizes(64, 128, 8, 2),
    (2, 64): TritonBlockSizes(32, 64, 8, 2),
    (2, 128): TritonBlockSizes(32, 64, 8, 2),
    (2, 256): TritonBlockSizes(32, 32, 8, 1),
    (4, 32): TritonBlockSizes(32, 64, 4, 2),
    (4, 64): TritonBlockSizes(32, 32, 4, 1),
    (4, 128): TritonBlockSizes(32, 32, 8, 1),
    (4, 256): TritonBlockSizes(16, 32, 8, 1),
}
# On 10.x, other blocks keep the kernels of bfloat16 from spilling up to D 128.
FWD_SM100: Table = {(2, 32): TritonBlockSizes(128, 64, 8, 3), (2, 64): TritonBlockSizes(128, 64, 8, 3)}
DKV_SM100: Table = {(2, 32): TritonBlockSizes(64, 64, 8, 2), (2, 128): TritonBlockSizes(64, 64, 8, 1)}


@tunable
def fwd_block_sizes(capability: tuple[int, int], dtype: Any, D: int) -> TritonBlockSizes:
    """Return the sizes of the forward kernel."""
    key = jnp.dtype(dtype).itemsize, max(32, head_block(D))
    return (FWD | FWD_SM100 if capability[0] == 10 else FWD)[key]


@tunable
def dq_block_sizes(dtype: Any, D: int) -> TritonBlockSizes:
    """Return the sizes of the kernel of dq, which are the same on all GPUs."""
    return DQ[_bwd_operand_bytes(dtype), max(32, head_block(D))]


@tunable
def dkv_block_sizes(capability: tuple[int, int], dtype: Any, D: int) -> TritonBlockSizes:
    """Return the sizes of the kernel of dk and dv."""
    key = _bwd_operand_bytes(dtype), max(32, head_block(D))
    return (DKV | DKV_SM100 if capability[0] == 10 else DKV)[key]


def _bwd_operand_bytes(dtype: Any) -> int:
    return 2 if dtype == jnp.bfloat16 else 4  # float16 is multiplied as float32
