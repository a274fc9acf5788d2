"""The Triton linear cross-entropy with its derivative."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dantinox.kernels import dispatch
from dantinox.kernels.ops.linear_cross_entropy.common import lse_gradient
from dantinox.kernels.ops.linear_cross_entropy.triton.bwd import backward
from dantinox.kernels.ops.linear_cross_entropy.triton.common import TritonConfig
from dantinox.kernels.ops.linear_cross_entropy.triton.fwd import forward
from dantinox.kernels.triton_call import transformable
from dantinox.kernels.triton_math import float32_precision

Array = jax.Array
OP = "linear_cross_entropy"


class _Residuals(NamedTuple):
    h: Array
    w: Array
    targets: Array
    row_max: Array
    total: Array


def linear_cross_entropy(h: Array, w: Array, targets: Array, *, softcap: float | None, z_loss: float) -> Array:
    """See `dantinox.kernels.linear_cross_entropy`, which checks the arguments."""
    capability = dispatch.compute_capability()
    assert capability is not None  # `dispatch.triton_unsupported_device` has seen it
    # Zeroed rows: a NaN in one that takes no part must not reach dw, which sums over rows.
    h = jnp.where((targets >= 0)[:, None], h, jnp.zeros_like(h))
    return _linear_cross_entropy(h, w, targets, TritonConfig(softcap, z_loss, float32_precision(), capability))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _linear_cross_entropy(h: Array, w: Array, targets: Array, config: TritonConfig) -> Array:
    return transformable(forward, OP, config=config)(h, w, targets)[0]


def _linear_cross_entropy_fwd(h: Array, w: Array, targets: Array, config: TritonConfig) -> tuple[Array, _Residuals]:
    loss, row_max, total = transformable(forward, OP, config=config)(h, w, targets)
    return loss, _Residuals(h, w, targets, row_max, total)


def _linear_cross_entropy_bwd(config: TritonConfig, residuals: _Residuals, dloss: Array) -> tuple:
    h, w, targets, row_max, total = residuals
    dloss = jnp.where(targets >= 0, dloss, 0)
    dlse = lse_gradient(dloss, row_max + jnp.log(total), config.z_loss)
    return *transformable(backward, OP, config=config)(h, w, targets, row_max, dlse / total, dloss), None


_linear_cross_entropy.defvjp(_linear_cross_entropy_fwd, _linear_cross_entropy_bwd)
