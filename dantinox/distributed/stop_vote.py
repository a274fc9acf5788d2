"""A vote of all processes, in each step, on whether to stop after it."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dantinox.distributed import processes


class StopVote:
    """One int32 per device, whose largest all processes read: they stop at the same step.

    It is a program of its own beside the step, launched before the step is waited for, so the devices do it while the
    hosts make the next batch.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._shape = (mesh.size,)
        self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._no = self._ballot(0)

    def _ballot(self, value: int) -> jax.Array:
        return jax.make_array_from_callback(
            self._shape,
            self._sharding,
            lambda index: np.full(len(range(*index[0].indices(*self._shape))), value, np.int32),
        )

    def cast(self, signal: int | None) -> jax.Array:
        """Vote to stop for a signal, or, with None, to continue; return the ballots for `count`."""
        if signal is None:
            return self._largest(self._no)
        return self._largest(self._ballot(signal * processes.count() + processes.index()))

    def count(self, ballots: jax.Array) -> tuple[int, int] | None:
        """Return (signal, process that got it) with the largest numbers; None if all want to continue."""
        largest = int(ballots)
        return divmod(largest, processes.count()) if largest else None
