"""The Hopper linear cross-entropy: the supported inputs and the custom derivative."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap
from jax.experimental.pallas import mosaic_gpu as plgpu

from dantinox.kernels.derivatives import first_order
from dantinox.kernels.dispatch import current_device
from dantinox.kernels.mosaic_gpu import TMA_ROWS, num_sms, softcap_unsupported
from dantinox.kernels.ops.grouped_matmul.pallas_sm90.warp_specialized import Sm90GmmConfig
from dantinox.kernels.ops.linear_cross_entropy.common import lse_gradient
from dantinox.kernels.ops.linear_cross_entropy.pallas_sm90.block_sizes import BLOCK_K
from dantinox.kernels.ops.linear_cross_entropy.pallas_sm90.bwd import backward
from dantinox.kernels.ops.linear_cross_entropy.pallas_sm90.common import Sm90LossConfig
from dantinox.kernels.ops.linear_cross_entropy.pallas_sm90.fwd import forward
from dantinox.kernels.vma import call_invariant

Array = jax.Array
DTYPES = (jnp.bfloat16, jnp.float16)


class _Residuals(NamedTuple):
    h: Array
    w: Array
    targets: Array
    row_max: Array
    total: Array


def unsupported_inputs(dtype: jnp.dtype, softcap: float | None) -> str | None:
    """Return why the kernels do not support a dtype or a soft cap, or None if they do."""
    if dtype not in DTYPES:
        return f"h has dtype {jnp.dtype(dtype)} and Hopper's tensor cores take bfloat16 and float16 here"
    return softcap_unsupported(softcap)


def linear_cross_entropy(
    h: Array,
    w: Array,
    targets: Array,
    *,
    softcap: float | None = None,
    z_loss: float = 0.0,
    interpret: plgpu.InterpretGPUParams | None = None,
    blocks: int = 0,
    width: int | None = None,
) -> Array:
    """See `dantinox.kernels.linear_cross_entropy`, which checks the arguments.

    `interpret` interprets the kernels on the CPU. `blocks` is the number of persistent thread blocks; 0 launches one
    per SM. `width` is the number of words per tile, a multiple of 64; None: 256.

    Raises:
        NotImplementedError: the kernels do not support the dtype or the soft cap.
    """
    if (reason := unsupported_inputs(h.dtype, softcap)) is not None:
        raise NotImplementedError(f"linear_cross_entropy: implementation='pallas' cannot run here: {reason}")
    N, M = h.shape
    # Zeroed rows: a NaN in one that takes no part must not reach dw, which sums over rows.
    h = jnp.where((targets >= 0)[:, None], h, jnp.zeros_like(h))
    h, w = (jnp.pad(x, ((0, rows), (0, -M % BLOCK_K))) for x, rows in ((h, -N % TMA_ROWS), (w, 0)))
    targets = jnp.pad(targets, (0, -N % TMA_ROWS), constant_values=-1)
    launch = Sm90GmmConfig(blocks or num_sms(current_device().kind), interpret, width)
    return _linear_cross_entropy(h, w, targets, Sm90LossConfig(softcap, z_loss, launch))[:N]


def _run(kernel: Callable[..., Any], config: Sm90LossConfig) -> Callable[..., Any]:
    """Return a pass that knows `shard_map`, `vmap` (one after the other) and its order of derivatives."""
    call = functools.partial(call_invariant, sequential_vmap(functools.partial(kernel, config=config)))
    return first_order(call, "linear_cross_entropy")


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _linear_cross_entropy(h: Array, w: Array, targets: Array, config: Sm90LossConfig) -> Array:
    return _run(forward, config)(h, w, targets)[0]


def _linear_cross_entropy_fwd(h: Array, w: Array, targets: Array, config: Sm90LossConfig) -> tuple[Array, _Residuals]:
    loss, row_max, total = _run(forward, config)(h, w, targets)
    return loss, _Residuals(h, w, targets, row_max, total)


def _linear_cross_entropy_bwd(config: Sm90LossConfig, residuals: _Residuals, dloss: Array) -> tuple:
    h, w, targets, row_max, total = residuals
    dloss = jnp.where(targets >= 0, dloss, 0)
    dlse = lse_gradient(dloss, row_max + jnp.log(total), config.z_loss)
    return *_run(backward, config)(h, w, targets, row_max, dlse / total, dloss), None


_linear_cross_entropy.defvjp(_linear_cross_entropy_fwd, _linear_cross_entropy_bwd)
