"""Shared by the TPU kernels: what Mosaic compiles, and how much memory a core has."""

import functools
from collections.abc import Callable

import jax

SMEM_BYTES = 768 * 2**10  # for tables, of the 1 MiB of every chip; Mosaic keeps some of the rest
SMALL_CHIPS = ("TPU v2", "TPU v3", "TPU v4")  # 16 MiB of VMEM, of which blocks of these sizes take more


def in_32_bits[**P, R](build: Callable[P, R]) -> Callable[P, R]:
    """Trace a function with 32-bit defaults, since a TPU core has no 64-bit numbers.

    With `jax_enable_x64`, a Python number in a kernel or in an index map would become one.
    """

    @functools.wraps(build)
    def build_in_32_bits(*args: P.args, **options: P.kwargs) -> R:
        with jax.enable_x64(False):
            return build(*args, **options)

    return build_in_32_bits


def chip_unsupported(kind: str) -> str | None:
    """Return why a chip is too small for the TPU kernels, or None."""
    if kind.startswith(SMALL_CHIPS):
        return f"its Pallas TPU kernels require the VMEM of TPU v5e or newer and this device is {kind!r}"
    return None
