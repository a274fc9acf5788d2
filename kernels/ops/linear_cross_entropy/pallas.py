"""The Pallas linear cross-entropy of TPUs and CPUs with its derivative; a CPU interprets the kernels of a TPU."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dantinox.kernels.derivatives import first_order
from dantinox.kernels.dispatch import current_device
from dantinox.kernels.ops.linear_cross_entropy.common import lse_gradient
from dantinox.kernels.ops.linear_cross_entropy.pallas_tpu import bwd, fwd
from dantinox.kernels.ops.linear_cross_entropy.pallas_tpu.block_sizes import block_sizes
from dantinox.kernels.ops.linear_cross_entropy.pallas_tpu.common import Config

Array = jax.Array


class _Residuals(NamedTuple):
    h: Array
    w: Array
    targets: Array
    row_max: Array
    total: Array


def linear_cross_entropy(h: Array, w: Array, targets: Array, *, softcap: float | None, z_loss: float) -> Array:
    """See `dantinox.kernels.linear_cross_entropy`, which checks the arguments."""
    device, (N, M), V = current_device(), h.shape, w.shape[0]
    if h.dtype == jnp.float16:  # a TPU core has no such registers, and it cannot hold the gradients of a mean
        h, w = h.astype(jnp.float32), w.astype(jnp.float32)
    sizes = block_sizes(device, N, V, M, h.dtype.itemsize)
    # Rows that take no part are zeros, so that a NaN in them does not reach dw; so are the rest of the last block's.
    h = jnp.where((targets >= 0)[:, None], h, jnp.zeros_like(h))
    rest = -N % sizes.block_n
    h, targets = jnp.pad(h, ((0, rest), (0, 0))), jnp.pad(targets, (0, rest), constant_values=-1)
    if sizes.block_v > V:
        w = jnp.pad(w, ((0, sizes.block_v - V), (0, 0)))
    config = Config(sizes, V, softcap, z_loss, device)
    return _linear_cross_entropy(h, w, targets[None], config)[0, :N]


def _forward(h: Array, w: Array, targets: Array, config: Config) -> tuple[Array, Array, Array]:
    run = functools.partial(fwd.forward, config=config)
    return first_order(run, "linear_cross_entropy")(h, w, targets)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _linear_cross_entropy(h: Array, w: Array, targets: Array, config: Config) -> Array:
    return _forward(h, w, targets, config)[0]


def _linear_cross_entropy_fwd(h: Array, w: Array, targets: Array, config: Config) -> tuple[Array, _Residuals]:
    loss, row_max, total = _forward(h, w, targets, config)
    return loss, _Residuals(h, w, targets, row_max, total)


def _linear_cross_entropy_bwd(config: Config, residuals: _Residuals, dloss: Array) -> tuple:
    h, w, targets, row_max, total = residuals
    dloss, lse = jnp.where(targets >= 0, dloss, jnp.zeros_like(dloss)), row_max + jnp.log(total)
    dlse = lse_gradient(dloss, lse, config.z_loss)
    run = functools.partial(bwd.backward, config=config)
    return *first_order(run, "linear_cross_entropy")(h, w, targets, row_max, dlse / total, dloss), None


_linear_cross_entropy.defvjp(_linear_cross_entropy_fwd, _linear_cross_entropy_bwd)
