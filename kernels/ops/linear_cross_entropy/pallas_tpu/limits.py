"""What the linear cross-entropy of a TPU takes."""

from typing import Any

import jax.numpy as jnp

from dantinox.kernels.ops.linear_cross_entropy.pallas_tpu import block_sizes


def unsupported_reason(dtype: Any, M: int) -> str | None:
    """Return why the kernels do not support rows of M values of a dtype, or None if they do."""
    itemsize = 2 if jnp.dtype(dtype) == jnp.bfloat16 else 4  # float16 is computed in float32
    if block_sizes.fitting_sizes(M, itemsize) is None:
        needed = block_sizes.vmem_bytes(*block_sizes.SIZES[-1], M, itemsize)
        allowed = block_sizes.BLOCK_BYTES >> 20
        return f"M is {M}, whose smallest blocks take {needed >> 20} MiB of VMEM; allowed: {allowed}"
    return None
