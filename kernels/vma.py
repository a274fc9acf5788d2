"""Varying manual axes (vma) under `shard_map`: loop carries and kernel results do not get them by themselves."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import ManualAxisType, PartitionSpec

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


def call_without_vma[T](f: Callable[..., T], *args: Any) -> T:
    """Call f(*args), which interprets a kernel: JAX's interpreter knows no varying axes.

    The results vary over every axis that one of the arrays in `args` varies over.
    """
    arrays = jax.tree.leaves(args)
    if not varying_axes(*arrays):
        return f(*args)

    def call(*args: Any) -> T:
        # An inner shard_map without checks still gets the axes with its arguments; a bitcast there drops them.
        return f(*jax.tree.map(lambda x: jax.lax.bitcast_convert_type(x, x.dtype), args))

    specs = jax.tree.map(lambda _: PartitionSpec(), args)
    results = jax.shard_map(call, in_specs=specs, out_specs=PartitionSpec(), axis_names=set(), check_vma=False)(*args)
    return jax.tree.map(lambda x: match_vma(x, *arrays), results)
