"""What Hopper's decode kernel takes."""

import jax
import jax.numpy as jnp

from dantinox.kernels.mosaic_gpu import TMA_ROWS, unsupported_head_dim
from dantinox.kernels.ops.decode_attention.kv_cache import KVCache

DTYPES = (jnp.bfloat16, jnp.float16)
BLOCK_H = 64  # rows of a wgmma; the query heads of one KV head are the first of them
STAGES = {64: (4, 4), 128: (3, 2), 256: (3, 3)}  # by D, for keys and values; `RESIDENT_BLOCKS` assumes these


def unsupported_reason(q: jax.ShapeDtypeStruct, cache: KVCache) -> str | None:
    """Return why the kernel does not support q [B, H, D] and the cache, or None if it does."""
    if q.ndim == 4:
        return f"q has {q.shape[1]} new tokens per sequence and Hopper's kernel takes one"
    (_, H, D), (K, C) = q.shape, cache.k.shape[1:3]
    if q.dtype not in DTYPES:
        return f"q has dtype {jnp.dtype(q.dtype)} and Hopper's tensor cores take bfloat16 and float16 here"
    for name, ring_buffer in (("cache.k", cache.k), ("cache.v", cache.v)):
        if ring_buffer.dtype != q.dtype:
            return f"{name} has dtype {ring_buffer.dtype} and its tiles go to the tensor cores as they are: {q.dtype}"
    if reason := unsupported_head_dim(D):
        return reason
    if H // K > BLOCK_H:
        return f"q has {H // K} heads for each of k's and a tile has {BLOCK_H} rows"
    if C % TMA_ROWS:
        return f"cache has {C} slots and its copies take multiples of {TMA_ROWS}"
    return None
