"""Shared by the Hopper kernels: memory in the layout of the tensor cores, and the size of the chip."""

import re
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

TMA_ROWS = 8  # rows of a tile in the layout that wgmma reads


def wgmma_smem(shape: tuple[int, ...], dtype: Any) -> Any:
    """Return the type of shared memory in the layout that wgmma reads: tiles of 8 rows of 128 bytes, swizzled."""
    tile = (TMA_ROWS, 128 // jnp.dtype(dtype).itemsize)
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform(tile), plgpu.SwizzleTransform(128)))


def num_sms(kind: str) -> int:
    """Return the SMs of a Hopper device kind; a device with fewer runs some thread blocks after the others."""
    return 114 if "PCIe" in kind else 78 if re.search(r"H20\b", kind) else 132
