"""What the TPU decode kernel takes."""

import math
from typing import Any

import jax.numpy as jnp

from dantinox.kernels.ops.decode_attention.pallas_tpu import block_sizes

MAX_ROWS = 128  # of several new tokens: their scores with a block stay in VMEM


def unsupported_reason(q: Any, cache: Any) -> str | None:
    """Return why the kernel does not support q [B, H, D] or [B, T, H, D] and the cache, or None if it does."""
    (_, *tokens, H, D), (K, C) = q.shape, cache.k.shape[1:3]
    T = math.prod(tokens)
    if jnp.float16 in (cache.k.dtype, cache.v.dtype):
        return "the cache is float16, of which a TPU core has no registers; bfloat16, float32 and 8 bits are supported"
    if 1 in (C, D) and min(jnp.dtype(x.dtype).itemsize for x in (q, cache.k)) < 4:
        return f"cache has {C} slots of {D} values and Mosaic takes single rows and columns of float32 only"
    if T > 1 and T * (H // K) > MAX_ROWS:
        return f"q has {T} tokens of {H // K} heads per KV head and the kernel takes {MAX_ROWS} rows"
    block = block_sizes.smallest_block_bytes(H=T * H, K=K, C=C, D=D, itemsize=jnp.dtype(cache.k.dtype).itemsize)
    if block > block_sizes.VMEM_LIMIT_BYTES:
        return f"the smallest block of {K} heads of {D} takes {block >> 20} MiB of VMEM; allowed: 48"
    return None
