"""Shared by the tutorials: how a TPU kernel is called, and the refusal of arguments that a step does not have."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from dantinox.kernels.dispatch import current_device

Array = jax.Array
VMEM_LIMIT = 100 * 2**20  # of the 128 MiB of a v6e; the compiler's default is a fraction of it


def iota(shape: tuple[int, ...], axis: int) -> Array:
    """0, 1, 2, ... along an axis."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def interpret() -> bool:
    """Whether XLA interprets the kernel, operation by operation.

    Raises:
        NotImplementedError: this device can neither compile nor interpret the kernel.
    """
    platform = current_device().platform
    if platform not in ("cpu", "tpu"):
        raise NotImplementedError(f"these kernels run on TPUs, and interpreted on a CPU; this device is a {platform}")
    return platform == "cpu"


def call_options() -> dict[str, Any]:
    """Options of a `pallas_call`: how much VMEM it may use, and whether XLA interprets it.

    Raises:
        NotImplementedError: this device can neither compile nor interpret the kernel.
    """
    return {"compiler_params": pltpu.CompilerParams(vmem_limit_bytes=VMEM_LIMIT), "interpret": interpret()}


def refuse(unsupported: Mapping[str, Any]) -> None:
    """Raise `NotImplementedError` if an argument that the step does not support is not None."""
    for name, value in unsupported.items():
        if value is not None:
            raise NotImplementedError(f"this step has no {name}")
