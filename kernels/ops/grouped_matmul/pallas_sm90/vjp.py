"""Grouped matmul on Hopper: the supported inputs and the custom VJP.

y = x w_e        dx = dy w_e^T, without transposing w in memory
dw_e = sum of x_n^T dy_n over the rows n of group e
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
SIDE = 64  # M and F must be multiples: columns of a swizzled SMEM tile


def refusal(dtype: jnp.dtype, M: int, F: int, *, of: str = "w") -> str | None:
    """Returns why the kernels do not support these arrays, or None if they do."""
    if dtype not in DTYPES:
        return f"x has dtype {jnp.dtype(dtype)} and Hopper's tensor cores take bfloat16 and float16 here"
    for name, size in (("M", M), ("F", F)):
        if size % SIDE:
            return f"{of} has {name} = {size} and its tiles are multiples of {SIDE}"
    return None


def cores(kind: str) -> int:
    """Returns the SMs of a Hopper device kind; on a device with fewer, some thread blocks run after the others."""
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
    """See `dantinox.kernels.grouped_matmul`, which checks the arguments.

    Args:
        interpret: interprets the kernels on the CPU.
        blocks: persistent thread blocks; 0 launches one per SM.
        width: columns per tile, if the kernel supports that; None lets `block_sizes.py` choose.

    Raises:
        NotImplementedError: the kernels do not support the dtype or size.
    """
    if (reason := refusal(x.dtype, *w.shape[1:])) is not None:
        raise NotImplementedError(f"grouped_matmul: implementation='pallas' cannot run here: {reason}")
    if 0 in (*x.shape, *w.shape):
        return jnp.zeros((x.shape[0], w.shape[2]), x.dtype)
    # Gradients of a replicated matrix are summed over devices here, where it becomes device-varying.
    x, w, group_sizes = (match_vma(operand, x, w, group_sizes) for operand in (x, w, group_sizes))
    return _matmul(x, w, group_sizes, Static(blocks or cores(current_device().kind), interpret, width))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _matmul(x: Array, w: Array, group_sizes: Array, static: Static) -> Array:
    return match_vma(gmm.product([x], [w], group_sizes, static), x)


def _matmul_fwd(x: Array, w: Array, group_sizes: Array, static: Static) -> tuple[Array, tuple]:
    return _matmul(x, w, group_sizes, static), (x, w, group_sizes)


def _matmul_bwd(static: Static, residuals: tuple, dy: Array) -> tuple:
    x, w, group_sizes = residuals
    dx = gmm.product([dy], [w], group_sizes, static, transposed=True, name="grouped_matmul_dx")
    dw = tgmm.summed(x, dy, group_sizes, static, name="grouped_matmul_dw")
    return match_vma(dx, x), match_vma(dw, w), np.zeros(group_sizes.shape, jax.dtypes.float0)


_matmul.defvjp(_matmul_fwd, _matmul_bwd)
