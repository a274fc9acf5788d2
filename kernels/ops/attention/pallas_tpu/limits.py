"""What the attention kernels of a TPU take."""

from typing import Any

import jax.numpy as jnp

from dantinox.kernels.dispatch import Device
from dantinox.kernels.mosaic_tpu import SMEM_BYTES
from dantinox.kernels.ops.attention.block_schedule import make_block_schedule
from dantinox.kernels.ops.attention.pallas_tpu import block_sizes
from dantinox.kernels.ops.attention.pallas_tpu.common import MAX_KV_BLOCKS, MAX_Q_BLOCKS


def unsupported_reason(
    q: Any, k: Any, v: Any, device: Device, *, causal: bool, window: int | None, packed: bool
) -> str | None:
    """Return why the kernels do not support q [B, T, H, D], k [B, S, K, D] and v [B, S, K, Dv], or None if they do.

    Args:
        q: queries, or their shape and dtype.
        k: keys, or their shape and dtype.
        v: values, or their shape and dtype.
        device: the chip.
        causal: whether a query sees no later key.
        window: keys that a query sees, or None.
        packed: whether there are segment ids.
    """
    (B, T, H, D), (S, K) = q.shape, k.shape[1:3]
    D = max(D, v.shape[3])
    if 0 in (B, T, S, D):
        return None
    S = S if window is None else min(S, T + window - 1)
    itemsize = 2 if q.dtype == jnp.bfloat16 else 4  # float16 is computed in float32
    num_tables = 1 + B if packed else 1
    sizes = block_sizes.heuristic_block_sizes(
        device, G=H // K, T=T, S=S, D=D, causal=causal, window=window, itemsize=itemsize, num_tables=num_tables
    )
    vmem_bytes = block_sizes.bwd_vmem_bytes(sizes, G=H // K, S=S, D=D, itemsize=itemsize)
    if vmem_bytes > block_sizes.VMEM_LIMIT_BYTES:
        return (
            f"{H // K} query heads of {D} per key head take {-(-vmem_bytes // 2**20)} MiB of VMEM; "
            f"allowed: {block_sizes.VMEM_LIMIT_BYTES >> 20}"
        )
    if MAX_Q_BLOCKS * sizes.block_q < T or MAX_KV_BLOCKS * sizes.block_kv < S:
        return f"it has more than {MAX_Q_BLOCKS} blocks of queries or {MAX_KV_BLOCKS} of keys"
    schedule = make_block_schedule(T, S, sizes.block_q, sizes.block_kv, causal=causal, window=window)
    table_bytes = 4 * len(schedule) * num_tables
    if table_bytes > SMEM_BYTES:
        return f"the tables of its blocks take {table_bytes >> 10} KiB of scalar memory; allowed: {SMEM_BYTES >> 10}"
    return None
