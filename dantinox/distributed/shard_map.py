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


def shard_map_over_batch(fn: Callable[..., Array], *, num_weights: int = 0) -> Callable[..., Array]:
    """Wrap `fn` so that each device of the active mesh computes its own batch shard.

    Args:
        fn: a function of arrays with a leading batch axis, any of them None.
        num_weights: number of leading arrays that have no batch axis; every device gathers them.
    """
    if (active := _active_mesh.get()) is None:
        return fn
    mesh, spec = active

    def sharded(*arrays: Array | None) -> Array:
        specs = tuple(PartitionSpec() if i < num_weights else spec for i in range(len(arrays)))
        return jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=spec)(*arrays)

    return sharded
