"""Grouped matmul on Hopper: the supported inputs and the custom VJP.

y = x w_e        dx = dy w_e^T, without transposing w in memory
dw_e = sum of x_n^T dy_n over the rows n of group e
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from dantinox.kernels.derivatives import first_order
from dantinox.kernels.dispatch import current_device
from dantinox.kernels.mosaic_gpu import num_sms
from dantinox.kernels.ops.grouped_matmul.pallas_sm90 import gmm, tgmm
from dantinox.kernels.ops.grouped_matmul.pallas_sm90.warp_specialized import Sm90GmmConfig
from dantinox.kernels.vma import match_vma

Array = jax.Array
DTYPES = (jnp.bfloat16, jnp.float16)
FEATURE_MULTIPLE = 16  # of M and F: columns of a tile of the narrowest swizzle


def unsupported_inputs(dtype: jnp.dtype, M: int, F: int, *, weight: str = "w") -> str | None:
    """Return why the kernels do not support these sizes, or None if they do; `weight` names the matrix."""
    if dtype not in DTYPES:
        return f"x has dtype {jnp.dtype(dtype)} and Hopper's tensor cores take bfloat16 and float16 here"
    for name, size in (("M", M), ("F", F)):
        if size % FEATURE_MULTIPLE:
            return f"{weight} has {name} = {size} and its tiles are multiples of {FEATURE_MULTIPLE}"
    return None


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

    `interpret` interprets the kernels on the CPU. `blocks` is the number of persistent thread blocks; 0 launches one
    per SM. `width` is the number of columns per tile, where a kernel supports it; None lets `block_sizes.py` choose.

    Raises:
        NotImplementedError: the kernels do not support the dtype or size.
    """
    if (reason := unsupported_inputs(x.dtype, *w.shape[1:])) is not None:
        raise NotImplementedError(f"grouped_matmul: implementation='pallas' cannot run here: {reason}")
    if 0 in (*x.shape, *w.shape):
        return jnp.zeros((x.shape[0], w.shape[2]), x.dtype)
    # Gradients of a replicated matrix are summed over devices here, where it becomes device-varying.
    x, w, group_sizes = (match_vma(operand, x, w, group_sizes) for operand in (x, w, group_sizes))
    return _grouped_matmul(x, w, group_sizes, Sm90GmmConfig(blocks or num_sms(current_device().kind), interpret, width))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped_matmul(x: Array, w: Array, group_sizes: Array, config: Sm90GmmConfig) -> Array:
    return match_vma(gmm.gmm([x], [w], group_sizes, config), x)


class _Residuals(NamedTuple):
    x: Array
    w: Array
    group_sizes: Array


def _grouped_matmul_fwd(x: Array, w: Array, group_sizes: Array, config: Sm90GmmConfig) -> tuple[Array, _Residuals]:
    return _grouped_matmul(x, w, group_sizes, config), _Residuals(x, w, group_sizes)


def _grouped_matmul_bwd(config: Sm90GmmConfig, residuals: _Residuals, dy: Array) -> tuple:
    x, w, group_sizes = residuals
    dx, dw = first_order(functools.partial(_gradients, config), "grouped_matmul")(x, w, group_sizes, dy)
    return match_vma(dx, x), match_vma(dw, w), None


def _gradients(config: Sm90GmmConfig, x: Array, w: Array, group_sizes: Array, dy: Array) -> tuple[Array, Array]:
    dx = gmm.gmm([dy], [w], group_sizes, config, transposed=True, name="grouped_matmul_dx")
    return dx, tgmm.tgmm(x, dy, group_sizes, config, name="grouped_matmul_dw")


_grouped_matmul.defvjp(_grouped_matmul_fwd, _grouped_matmul_bwd)
