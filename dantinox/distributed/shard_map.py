"""Run hand-written kernels under shard_map, one batch shard per device: XLA cannot partition them."""

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
    """Within this context `shard_map_over_batch` uses `mesh`, with the batch sharded or replicated."""
    token = _active_mesh.set(None if mesh is None else (mesh, PartitionSpec(BATCH if sharded else None)))
    try:
        yield
    finally:
        _active_mesh.reset(token)


def shard_map_over_batch(fn: Callable[..., Array]) -> Callable[..., Array]:
    """Wrap `fn` so that each device of the active mesh computes its own batch shard.

    Args:
        fn: a function of arrays that all have a leading batch axis.
    """
    if (active := _active_mesh.get()) is None:
        return fn
    mesh, spec = active

    def sharded(*arrays: Array) -> Array:
        return jax.shard_map(fn, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(*arrays)

    return sharded
