"""Arrays over the devices of several processes."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def from_host(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Return an array that every process has as a global one."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def to_local_device[T](tree: T, mesh: Mesh) -> T:
    """Return whole copies of arrays on one device of this process; all processes call it at the same time."""
    gathered = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, PartitionSpec()))(tree)
    return jax.tree.map(lambda array: array.addressable_data(0), gathered)
