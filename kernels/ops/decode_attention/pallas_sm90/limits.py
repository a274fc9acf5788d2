"""What Hopper's decode kernel takes."""

import jax
import jax.numpy as jnp

from dantinox.kernels.mosaic_gpu import TMA_ROWS, tuned_head_dim, unsupported_head_dim
from dantinox.kernels.ops.decode_attention.kv_cache import KVCache

DTYPES = (jnp.bfloat16, jnp.float16)
BLOCK_H = 64  # rows of a wgmma; the queries of one KV head, of all its heads and new tokens, are the first of them
STAGES = {64: (4, 4), 128: (3, 2), 256: (3, 3)}  # by D, for keys and values; `RESIDENT_BLOCKS` assumes these


def num_stages(D: int, T: int) -> tuple[int, int]:
    """Return the SMEM stages of keys and values; with heads of 256, several new tokens take the room of a stage."""
    return (2, 2) if T > 1 and tuned_head_dim(D) == 256 else STAGES[tuned_head_dim(D)]


def unsupported_reason(q: jax.ShapeDtypeStruct, cache: KVCache) -> str | None:
    """Return why the kernel does not support q [B, H, D] or [B, T, H, D] and the cache, or None if it does."""
    (_, *tokens, H, D), (K, C) = q.shape, cache.k.shape[1:3]
    T = tokens[0] if tokens else 1
    if q.dtype not in DTYPES:
        return f"q has dtype {jnp.dtype(q.dtype)} and Hopper's tensor cores take bfloat16 and float16 here"
    for name, ring_buffer in (("cache.k", cache.k), ("cache.v", cache.v)):
        if ring_buffer.dtype != q.dtype:
            return f"{name} has dtype {ring_buffer.dtype} and its tiles go to the tensor cores as they are: {q.dtype}"
    if reason := unsupported_head_dim(D):
        return reason
    if T * (H // K) > BLOCK_H:
        many = f"{T} tokens of " if T > 1 else ""
        return f"q has {many}{H // K} heads for each of k's and a tile has {BLOCK_H} rows"
    if C % TMA_ROWS:
        return f"cache has {C} slots and its copies take multiples of {TMA_ROWS}"
    return None
