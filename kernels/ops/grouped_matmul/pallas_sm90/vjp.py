"""Grouped matmul on Hopper: what the kernels take, and the derivative around them.

y = x w_e        dx = dy w_e^T, w read as it lies        dw_e = sum of x_n^T dy_n over the rows n of group e
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from dantinox.kernels.dispatch import current_device
from dantinox.kernels.ops.grouped_matmul.pallas_sm90 import gmm, tgmm
from dantinox.kernels.ops.grouped_matmul.pallas_sm90.warp_specialized import Static
from dantinox.kernels.vma import match_vma

Array = jax.Array
DTYPES = (jnp.bfloat16, jnp.float16)
SIDE = 64  # M and F are multiples of it: columns of a tile in the layout that the tensor cores read


def refusal(dtype: jnp.dtype, M: int, F: int, *, of: str = "w") -> str | None:
    """Why the kernels cannot take these arrays; None where they can."""
    if dtype not in DTYPES:
        return f"x has dtype {jnp.dtype(dtype)} and Hopper's tensor cores take bfloat16 and float16 here"
    for name, size in (("M", M), ("F", F)):
        if size % SIDE:
            return f"{of} has {name} = {size} and its tiles are multiples of {SIDE}"
    return None


def cores(kind: str) -> int:
    """How many cores a Hopper chip of that name has; where it has fewer, some blocks run after the others."""
    return 114 if "PCIe" in kind else 78 if re.search(r"H20\b", kind) else 132


def grouped_matmul(
    x: Array,
    w: Array,
    group_sizes: Array,
    *,
    interpret: plgpu.InterpretGPUParams | None = None,
    blocks: int = 0,
    width: int | None = None,
) -> Array:
    """See `dantinox.kernels.grouped_matmul`, where arguments are checked; with `interpret` the kernels run on the CPU.

    Args:
        blocks: that share the tiles; 0: one for each core of the device.
        width: of a tile, where a kernel can have it so; None lets `block_sizes.py` choose.

    Raises:
        NotImplementedError: a dtype or size that the kernels do not take.
    """
    if (why := refusal(x.dtype, *w.shape[1:])) is not None:
        raise NotImplementedError(f"grouped_matmul: implementation='pallas' cannot run here: {why}")
    if 0 in (*x.shape, *w.shape):
        return jnp.zeros((x.shape[0], w.shape[2]), x.dtype)
    # The sum over devices of a matrix that all of them have is taken where it begins to vary: before the kernels.
    x, w, group_sizes = (match_vma(each, x, w, group_sizes) for each in (x, w, group_sizes))
    return _matmul(x, w, group_sizes, Static(blocks or cores(current_device().kind), interpret, width))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _matmul(x: Array, w: Array, group_sizes: Array, static: Static) -> Array:
    return match_vma(gmm.product([x], [w], group_sizes, static), x)


def _matmul_forward(x: Array, w: Array, group_sizes: Array, static: Static) -> tuple[Array, tuple]:
    return _matmul(x, w, group_sizes, static), (x, w, group_sizes)


def _matmul_backward(static: Static, kept: tuple, dy: Array) -> tuple:
    x, w, group_sizes = kept
    dx = gmm.product([dy], [w], group_sizes, static, transposed=True, name="grouped_matmul_dx")
    dw = tgmm.summed(x, dy, group_sizes, static, name="grouped_matmul_dw")
    return match_vma(dx, x), match_vma(dw, w), np.zeros(group_sizes.shape, jax.dtypes.float0)


_matmul.defvjp(_matmul_forward, _matmul_backward)
