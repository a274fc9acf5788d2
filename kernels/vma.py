"""Varying manual axes (vma) under `shard_map`: loop carries and kernel results do not get them by themselves."""

from typing import Any

import jax
from jax.sharding import ManualAxisType

Array = jax.Array


def varying_axes(*arrays: Array) -> frozenset[str]:
    """Return the `shard_map` axes that one of the arrays varies over."""
    return frozenset().union(*(jax.typeof(x).mat.varying for x in arrays))


def varying_shape(shape: tuple[int, ...], dtype: Any, *like: Array) -> jax.ShapeDtypeStruct:
    """Return the shape of a kernel's result that varies over every axis that one of `like` varies over."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=ManualAxisType(varying=varying_axes(*like)))


def match_vma(x: Array, *like: Array) -> Array:
    """Return x, varying over every `shard_map` axis that one of `like` varies over."""
    axes = varying_axes(*like) - varying_axes(x)
    return jax.lax.pcast(x, tuple(sorted(axes)), to="varying") if axes else x
