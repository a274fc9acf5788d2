"""Below `shard_map`: which of its axes a kernel's results vary over, which the kernels themselves do not say."""

import jax

Array = jax.Array


def match_vma(x: Array, *like: Array) -> Array:
    """x, marked as varying over the axes of a `shard_map` that any of `like` varies over; what kernels make is not."""
    axes = frozenset().union(*(jax.typeof(each).mat.varying for each in like)) - jax.typeof(x).mat.varying
    return jax.lax.pcast(x, tuple(sorted(axes)), to="varying") if axes else x
