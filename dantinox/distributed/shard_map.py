"""What XLA cannot cut in parts by itself, done by each device of a mesh on its own sequences."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator

import jax
from jax.sharding import Mesh, PartitionSpec

BATCH = ("data", "fsdp")  # sequences are sharded over all devices

Array = jax.Array
_active_mesh: contextvars.ContextVar[tuple[Mesh, PartitionSpec] | None] = contextvars.ContextVar("mesh", default=None)


@contextlib.contextmanager
def batch_sharded_mesh(mesh: Mesh | None, *, sharded: bool) -> Iterator[None]:
    """Inside, `by_sequence` knows the mesh, and whether each device has sequences of its own or all have the same."""
    token = _active_mesh.set(None if mesh is None else (mesh, PartitionSpec(BATCH if sharded else None)))
    try:
        yield
    finally:
        _active_mesh.reset(token)


def shard_map_over_batch(run: Callable[..., Array]) -> Callable[..., Array]:
    """`run`, of arrays that all begin with the batch axis, done by each device on its own sequences.

    XLA cannot cut a kernel written by hand in parts, as it does with its own.
    """
    if (laid := _active_mesh.get()) is None:
        return run
    mesh, spec = laid

    def each(*arrays: Array) -> Array:
        return jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(*arrays)

    return each
