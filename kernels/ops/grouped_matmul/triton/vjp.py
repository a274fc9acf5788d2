"""The Triton grouped matmul with its derivative.

y = x w_e        dx = dy w_e^T, without transposing w in memory
dw_e = sum of x_n^T dy_n over the rows n of group e
"""

import functools
from typing import NamedTuple

import jax

from dantinox.kernels import dispatch
from dantinox.kernels.ops.grouped_matmul.triton.common import TritonGmmConfig
from dantinox.kernels.ops.grouped_matmul.triton.gmm import gmm
from dantinox.kernels.ops.grouped_matmul.triton.tgmm import tgmm
from dantinox.kernels.triton_call import transformable
from dantinox.kernels.triton_math import float32_precision

Array = jax.Array
OP = "grouped_matmul"


class _Residuals(NamedTuple):
    x: Array
    w: Array
    group_sizes: Array


def current_config() -> TritonGmmConfig:
    """Return the static parameters for the current device and matmul precision."""
    capability = dispatch.compute_capability()
    assert capability is not None  # `dispatch.triton_unsupported_device` has seen it
    return TritonGmmConfig(float32_precision(), capability)


def grouped_matmul(x: Array, w: Array, group_sizes: Array) -> Array:
    """See `dantinox.kernels.grouped_matmul`, which checks the arguments."""
    return _grouped_matmul(x, w, group_sizes, current_config())


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped_matmul(x: Array, w: Array, group_sizes: Array, config: TritonGmmConfig) -> Array:
    return transformable(gmm, OP, config=config)((x,), (w,), group_sizes)


def _grouped_matmul_fwd(x: Array, w: Array, group_sizes: Array, config: TritonGmmConfig) -> tuple[Array, _Residuals]:
    return _grouped_matmul(x, w, group_sizes, config), _Residuals(x, w, group_sizes)


def _grouped_matmul_bwd(config: TritonGmmConfig, residuals: _Residuals, dy: Array) -> tuple:
    x, w, group_sizes = residuals
    dx = transformable(gmm, OP, config=config, transposed=True, name="grouped_matmul_dx")((dy,), (w,), group_sizes)
    return dx, transformable(tgmm, OP, config=config)(x, dy, group_sizes), None


_grouped_matmul.defvjp(_grouped_matmul_fwd, _grouped_matmul_bwd)
