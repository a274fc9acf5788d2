"""Varying manual axes (vma) under `shard_map`: loop carries and kernel results do not get them by themselves."""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
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


def call_invariant[**P, R](kernel: Callable[P, R], *args: P.args, **options: P.kwargs) -> R:
    """Call a kernel on arrays that vary over no `shard_map` axis; its results vary over those of the given arrays.

    JAX's interpreter of kernels, and references to arrays, do not support varying axes. A kernel does not communicate,
    so it computes the same with and without them.
    """
    leaves = [x for x in jax.tree.leaves((args, options)) if isinstance(x, jax.Array)]
    if not varying_axes(*leaves):
        return kernel(*args, **options)
    args, options = jax.tree.map(lambda x: _invariant.bind(x) if isinstance(x, jax.Array) else x, (args, options))
    return jax.tree.map(lambda x: match_vma(x, *leaves), kernel(*args, **options))


_invariant = Primitive("invariant")
_invariant.def_impl(lambda x: x)
_invariant.def_abstract_eval(lambda x: x.update(manual_axis_type=ManualAxisType()))
mlir.register_lowering(_invariant, lambda _, x: [x])
batching.defvectorized(_invariant)
