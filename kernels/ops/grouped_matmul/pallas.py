"""The Pallas grouped matmul of TPUs and CPUs with its derivative; a CPU has kernels of its own."""

import functools
from typing import Any

import jax

from dantinox.kernels.dispatch import Device, current_device
from dantinox.kernels.ops.grouped_matmul.common import no_gradient
from dantinox.kernels.ops.grouped_matmul.pallas_cpu import gmm as cpu_gmm
from dantinox.kernels.ops.grouped_matmul.pallas_tpu import gmm as tpu_gmm
from dantinox.kernels.ops.grouped_matmul.pallas_tpu import tgmm as tpu_tgmm

Array = jax.Array


def _product(x: Array, w: Array, group_sizes: Array, here: Device, **options: Any) -> Array:
    if here.platform == "cpu":
        return cpu_gmm.product(x, w, group_sizes, **options)
    return tpu_gmm.product([x], [w], group_sizes, here, **options)[0]


def _summed(x: Array, dy: Array, group_sizes: Array, here: Device, *, name: str) -> Array:
    if here.platform == "cpu":
        return cpu_gmm.summed(x, dy, group_sizes, name=name)
    return tpu_tgmm.summed(x, [dy], group_sizes, here, name=name)[0]


def grouped_matmul(x: Array, w: Array, group_sizes: Array) -> Array:
    """See `dantinox.kernels.grouped_matmul`; arguments are checked there."""
    return _matmul(x, w, group_sizes, current_device())


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _matmul(x: Array, w: Array, group_sizes: Array, here: Device) -> Array:
    return _product(x, w, group_sizes, here, name="grouped_matmul")


def _matmul_forward(x: Array, w: Array, group_sizes: Array, here: Device) -> tuple[Array, tuple]:
    return _matmul(x, w, group_sizes, here), (x, w, group_sizes)


def _matmul_backward(here: Device, kept: tuple, dy: Array) -> tuple:
    x, w, group_sizes = kept
    dx = _product(dy, w, group_sizes, here, transposed=True, name="grouped_matmul_dx")
    dw = _summed(x, dy, group_sizes, here, name="grouped_matmul_dw")
    return dx, dw, no_gradient(group_sizes)


_matmul.defvjp(_matmul_forward, _matmul_backward)
