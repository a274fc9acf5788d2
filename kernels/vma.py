"""Varying manual axes (vma) of kernel results under `shard_map`: a `pallas_call` does not set them."""

import jax

Array = jax.Array


def match_vma(x: Array, *like: Array) -> Array:
    """Return x, varying over every `shard_map` axis that one of `like` varies over."""
    axes = frozenset().union(*(jax.typeof(y).mat.varying for y in like)) - jax.typeof(x).mat.varying
    return jax.lax.pcast(x, tuple(sorted(axes)), to="varying") if axes else x
