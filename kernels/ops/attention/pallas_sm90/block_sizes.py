"""Block sizes of the attention kernels on Hopper; a head dim that was not tuned has those of the next larger one."""

from typing import NamedTuple

from dantinox.kernels.mosaic_gpu import tuned_head_dim
from dantinox.kernels.tuning import tunable


class FwdBlockSizes(NamedTuple):
    """Queries per warpgroup, keys per block, stages of the K and V ring buffers (a power of two)."""

    block_q: int
    block_kv: int
    stages: int


FWD_BLOCK_SIZES = {64: FwdBlockSizes(64, 128, 4), 128: FwdBlockSizes(64, 128, 2), 256: FwdBlockSizes(64, 64, 2)}


@tunable
def fwd_block_sizes(D: int) -> FwdBlockSizes:
    """Return the block sizes of the forward kernel for a head dim."""
    return FWD_BLOCK_SIZES[tuned_head_dim(D)]


class BwdBlockSizes(NamedTuple):
    """Block sizes of the backward loops and the number of stages of their pipelines."""

    block_kv: int  # of the loop for dq
    k_stages: int
    v_stages: int  # v is released before k is
    block_q: int  # of the loop for dk and dv
    q_stages: int


BWD_BLOCK_SIZES = {
    64: BwdBlockSizes(block_kv=128, k_stages=2, v_stages=2, block_q=64, q_stages=3),
    128: BwdBlockSizes(block_kv=64, k_stages=2, v_stages=2, block_q=64, q_stages=2),
    256: BwdBlockSizes(block_kv=64, k_stages=2, v_stages=1, block_q=64, q_stages=2),
}


@tunable
def bwd_block_sizes(D: int) -> BwdBlockSizes:
    """Return the block sizes of the backward kernels for a head dim."""
    return BWD_BLOCK_SIZES[tuned_head_dim(D)]
