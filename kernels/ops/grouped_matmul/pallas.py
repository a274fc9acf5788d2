"""The Pallas grouped matmul of TPUs and CPUs with its derivative; CPUs have separate kernels."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dantinox.kernels.derivatives import first_order
from dantinox.kernels.dispatch import Device, current_device
from dantinox.kernels.ops.grouped_matmul.pallas_cpu import gmm as cpu_gmm
from dantinox.kernels.ops.grouped_matmul.pallas_tpu import gmm as tpu_gmm
from dantinox.kernels.ops.grouped_matmul.pallas_tpu import tgmm as tpu_tgmm

Array = jax.Array


class _Residuals(NamedTuple):
    x: Array
    w: Array
    group_sizes: Array


def _gmm(x: Array, w: Array, group_sizes: Array, device: Device, **options: Any) -> Array:
    def run(x: Array, w: Array, group_sizes: Array) -> Array:
        if device.platform == "cpu":
            return cpu_gmm.interpreted_gmm(x, w, group_sizes, **options)
        return tpu_gmm.gmm([x], [w], group_sizes, device, **options)[0]

    return first_order(run, "grouped_matmul")(x, w, group_sizes)


def _tgmm(x: Array, dy: Array, group_sizes: Array, device: Device, *, name: str) -> Array:
    def run(x: Array, dy: Array, group_sizes: Array) -> Array:
        if device.platform == "cpu":
            return cpu_gmm.interpreted_tgmm(x, dy, group_sizes, name=name)
        return tpu_tgmm.tgmm(x, [dy], group_sizes, device, name=name)[0]

    return first_order(run, "grouped_matmul")(x, dy, group_sizes)


def grouped_matmul(x: Array, w: Array, group_sizes: Array) -> Array:
    """See `dantinox.kernels.grouped_matmul`, which checks the arguments."""
    device, dtype = current_device(), x.dtype
    if dtype == jnp.float16 and device.platform == "tpu":  # a TPU core has no such registers
        x, w = x.astype(jnp.float32), w.astype(jnp.float32)
    return _grouped_matmul(x, w, group_sizes, device).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped_matmul(x: Array, w: Array, group_sizes: Array, device: Device) -> Array:
    return _gmm(x, w, group_sizes, device, name="grouped_matmul")


def _grouped_matmul_fwd(x: Array, w: Array, group_sizes: Array, device: Device) -> tuple[Array, _Residuals]:
    return _grouped_matmul(x, w, group_sizes, device), _Residuals(x, w, group_sizes)


def _grouped_matmul_bwd(device: Device, residuals: _Residuals, dy: Array) -> tuple:
    x, w, group_sizes = residuals
    dx = _gmm(dy, w, group_sizes, device, transposed=True, name="grouped_matmul_dx")
    dw = _tgmm(x, dy, group_sizes, device, name="grouped_matmul_dw")
    return dx, dw, None


_grouped_matmul.defvjp(_grouped_matmul_fwd, _grouped_matmul_bwd)
