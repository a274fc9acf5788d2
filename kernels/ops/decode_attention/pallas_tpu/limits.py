"""What the TPU decode kernel takes."""

from typing import Any

import jax.numpy as jnp

from dantinox.kernels.ops.decode_attention.pallas_tpu import block_sizes


def unsupported_reason(q: Any, cache: Any) -> str | None:
    """Return why the kernel does not support q [B, H, D] and the cache, or None if it does."""
    (_, H, D), (K, C) = q.shape, cache.k.shape[1:3]
    if jnp.float16 in (cache.k.dtype, cache.v.dtype):
        return "the cache is float16, of which a TPU core has no registers; bfloat16, float32 and 8 bits are supported"
    if 1 in (C, D) and min(jnp.dtype(x.dtype).itemsize for x in (q, cache.k)) < 4:
        return f"cache has {C} slots of {D} values and Mosaic takes single rows and columns of float32 only"
    block = block_sizes.smallest_block_bytes(H=H, K=K, C=C, D=D, itemsize=jnp.dtype(cache.k.dtype).itemsize)
    if block > block_sizes.VMEM_LIMIT_BYTES:
        return f"the smallest block of {K} heads of {D} takes {block >> 20} MiB of VMEM; allowed: 48"
    return None
