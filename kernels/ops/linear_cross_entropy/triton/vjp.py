"""The Triton linear cross-entropy with its derivative."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap

from dantinox.kernels import dispatch
from dantinox.kernels.derivatives import first_order
from dantinox.kernels.ops.linear_cross_entropy.common import lse_gradient
from dantinox.kernels.ops.linear_cross_entropy.triton.bwd import backward
from dantinox.kernels.ops.linear_cross_entropy.triton.common import TritonConfig
from dantinox.kernels.ops.linear_cross_entropy.triton.fwd import forward
from dantinox.kernels.triton_math import float32_precision
from dantinox.kernels.vma import call_invariant

Array = jax.Array


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


def _run(kernel: Callable[..., Any], config: TritonConfig) -> Callable[..., Any]:
    """Return a pass that knows `shard_map`, `vmap` (one after the other) and its order of derivatives."""
    call = functools.partial(call_invariant, sequential_vmap(functools.partial(kernel, config=config)))
    return first_order(call, "linear_cross_entropy", "triton")


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _linear_cross_entropy(h: Array, w: Array, targets: Array, config: TritonConfig) -> Array:
    return _run(forward, config)(h, w, targets)[0]


def _linear_cross_entropy_fwd(h: Array, w: Array, targets: Array, config: TritonConfig) -> tuple[Array, _Residuals]:
    loss, row_max, total = _run(forward, config)(h, w, targets)
    return loss, _Residuals(h, w, targets, row_max, total)


def _linear_cross_entropy_bwd(config: TritonConfig, residuals: _Residuals, dloss: Array) -> tuple:
    h, w, targets, row_max, total = residuals
    dloss = jnp.where(targets >= 0, dloss, 0)
    dlse = lse_gradient(dloss, row_max + jnp.log(total), config.z_loss)
    return *_run(backward, config)(h, w, targets, row_max, dlse / total, dloss), None


_linear_cross_entropy.defvjp(_linear_cross_entropy_fwd, _linear_cross_entropy_bwd)
