"""Shared by the Hopper kernels: memory in the layout of the tensor cores, an exact tanh, and the size of the chip."""

import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

Array = jax.Array
LOG2E = 1.4426950408889634
SOFTCAPS = (2.0**-40, 2.0**40)  # beyond them, tanh(s / softcap) needs more than float32's range
LARGE_SOFTCAP = 2.0**8  # far above common scores, so that tanh(s / softcap) is small and needs its relative precision
TMA_ROWS = 8  # rows of a tile in the layout that wgmma reads
SWIZZLES = (128, 64, 32)  # bytes of a row of a tile
HEAD_DIM_MULTIPLE, MAX_HEAD_DIM = 16, 256  # the narrowest swizzle has 16 columns; a wgmma has at most 256
TUNED_HEAD_DIMS = (64, 128, 256)


def widest_swizzle(dtype: Any, *row_lengths: int) -> int:
    """Return the widest swizzle, in bytes, that divides rows of these lengths: TMA takes whole tiles of an array."""
    row_bytes = [length * jnp.dtype(dtype).itemsize for length in row_lengths]
    return next(size for size in SWIZZLES if not any(length % size for length in row_bytes))


def swizzled_smem(shape: tuple[int, ...], dtype: Any, swizzle: int, *, tile_rows: int = TMA_ROWS) -> Any:
    """Return the type of shared memory in tiles whose rows have `swizzle` bytes."""
    tile = (tile_rows, swizzle // jnp.dtype(dtype).itemsize)
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform(tile), plgpu.SwizzleTransform(swizzle)))


def wgmma_smem(shape: tuple[int, ...], dtype: Any) -> Any:
    """Return the type of shared memory in the layout that wgmma reads, with the widest swizzle of its row length."""
    return swizzled_smem(shape, dtype, widest_swizzle(dtype, shape[-1]))


def softcap_unsupported(softcap: float | None) -> str | None:
    """Return why the kernels do not take a soft cap, or None."""
    if softcap is None or SOFTCAPS[0] <= softcap <= SOFTCAPS[1]:
        return None
    return f"softcap is {softcap:g} and Hopper's kernels take 2**-40 to 2**40"


def softcap_tanh(s: Array, *, scale: float, softcap: float) -> Array:
    """Return tanh(scale s / softcap) in float32, where the hardware's tanh has a relative error of 2^-11."""
    # For large products 2^x is infinite and the quotient is 0.
    t = 1.0 - 2.0 / (jnp.exp2(s * (2 * LOG2E * scale / softcap)) + 1.0)
    if softcap <= LARGE_SOFTCAP:
        return t
    x = s * (scale / softcap)  # near zero the first terms of the series are exact, and t is not
    return jnp.where(jnp.abs(x) < 2**-4, x - x * x * x * (1 / 3 - x * x * (2 / 15)), t)


def unsupported_head_dim(D: int) -> str | None:
    """Return why the attention kernels do not take a head dim, or None."""
    if 0 < D <= MAX_HEAD_DIM and D % HEAD_DIM_MULTIPLE == 0:
        return None
    return f"q has head dim {D} and its tiles take multiples of {HEAD_DIM_MULTIPLE} up to {MAX_HEAD_DIM}"


def tuned_head_dim(D: int) -> int:
    """Return the head dim whose block sizes a supported one has: the next larger one that was tuned."""
    return next(size for size in TUNED_HEAD_DIMS if size >= D)


def num_sms(kind: str) -> int:
    """Return the SMs of a Hopper device kind; a device with fewer runs some thread blocks after the others."""
    return 114 if "PCIe" in kind else 78 if re.search(r"H20\b", kind) else 132
