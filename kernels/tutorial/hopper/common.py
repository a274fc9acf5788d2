"""Shared by all steps: sizes, shared memory, the store of a tile, and argument checks."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dantinox.kernels import validation
from dantinox.kernels.dispatch import current_device, on_hopper
from dantinox.kernels.mosaic_gpu import TMA_ROWS
from dantinox.kernels.mosaic_gpu import num_sms as num_sms
from dantinox.kernels.mosaic_gpu import wgmma_smem as wgmma_smem
from dantinox.kernels.tutorial.common import refuse

Array = jax.Array
Ref = Any  # a reference to global or shared memory, or barriers
ROWS, COLUMNS = 64, 256  # of the output, per warpgroup: 128 accumulators in float32 per thread
DEPTH = 64  # of the contraction, per stage: a row of 128 bytes, the widest swizzle
STAGES = 4  # of the ring buffer; a power of two, so that a step finds its stage with one `and`


def store_smem(dtype: Any, warpgroups: int = 1) -> Any:
    """Shared memory for 64 columns of a tile per warpgroup, in rows, because the last row of y may be any row."""
    shape = (warpgroups, ROWS, 64)
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((1, 64)), plgpu.SwizzleTransform(128)))


def store_tile(y: Array, buffer: Ref, y_gmem: Ref, row: Array, column: Array) -> None:
    """Store a tile of float32 registers to y_gmem at (row, column), 64 columns at a time; TMA drops what lies outside.

    The last copies are in flight when this returns: wait for them with `plgpu.wait_smem_to_gmem(0)`.
    """
    for first in range(0, COLUMNS, 64):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the copy before it still reads the buffer
        buffer[...] = y[:, first : first + 64].astype(buffer.dtype)
        plgpu.commit_smem()  # makes the write visible to TMA
        plgpu.copy_smem_to_gmem(buffer, y_gmem.at[pl.ds(row, ROWS), pl.ds(column + first, 64)])


def interpret() -> plgpu.InterpretGPUParams | bool:
    """How to run the kernel: on a CPU, in Pallas's simulation of a GPU.

    Raises:
        NotImplementedError: this device can neither compile nor simulate the kernel.
    """
    platform, kind = current_device()
    if on_hopper():
        return False
    if platform == "cpu":
        return plgpu.InterpretGPUParams()
    raise NotImplementedError(f"these kernels run on Hopper GPUs, and simulated on a CPU; this device is {kind}")


def check(x: Array, w: Array, **unsupported: Any) -> tuple[Array, tuple[int, int, int]]:
    """Check the arguments of a step.

    Args:
        x: rows [N, M].
        w: matrix [M, F].
        **unsupported: arguments that the step does not support; each must be None.

    Returns:
        x with rows of zeros up to a multiple of `TMA_ROWS`, and (N, M, F).

    Raises:
        ValueError: a shape or dtype is not allowed.
        NotImplementedError: the step does not support a dtype, a size or an argument.
    """
    x, w = validation.as_array("x", x, "NM"), validation.as_array("w", w, "MF")
    (N, M), F = x.shape, w.shape[1]
    validation.check_shape("w", w, (M, F))
    validation.check_floating(x=x, w=w)
    refuse(unsupported)
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"x has dtype {x.dtype}; these kernels multiply bfloat16 and float16")
    for name, size in (("M", M), ("F", F)):
        if size % 64:
            raise NotImplementedError(f"{name} is {size}; these kernels take multiples of 64")
    return jnp.pad(x, ((0, -N % TMA_ROWS), (0, 0))), (N, M, F)
