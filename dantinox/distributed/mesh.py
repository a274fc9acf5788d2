"""Parameter sharding rules, derived from the axis names of each parameter."""

from collections.abc import Mapping, Sequence

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dantinox.config import ConfigError
from dantinox.distributed.shard_map import BATCH

# Logical axis -> mesh axis. Every matrix has the model width M exactly once, so fsdp shards every matrix along it.
RULES = {"M": "fsdp"}


def make_mesh(axes: dict[str, int]) -> Mesh | None:
    """Return a mesh over the first local devices; None if a single device is requested.

    Raises:
        ConfigError: fewer devices than the mesh needs.
    """
    needed, available = axes["data"] * axes["fsdp"], jax.local_devices()
    if needed == 1:
        return None
    if needed > len(available):
        raise ConfigError(
            f"mesh data={axes['data']},fsdp={axes['fsdp']} needs {needed} devices; only {len(available)} available"
        )
    auto = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh((axes["data"], axes["fsdp"]), ("data", "fsdp"), auto, devices=available[:needed])


def parameter_shardings(
    axes_by_name: Mapping[str, Sequence[str]], params: Mapping[str, jax.Array], mesh: Mesh
) -> dict[str, NamedSharding]:
    """Return the sharding of each parameter, by name.

    Args:
        axes_by_name: the axis letters of each parameter.
        params: the parameters, or their shapes.
        mesh: from `make_mesh`.

    Raises:
        ConfigError: the size of an axis is not a multiple of the devices along it.
    """
    shardings = {}
    for name, axes in axes_by_name.items():
        spec = [RULES.get(axis) if len(axes) > 1 else None for axis in axes]  # norm scales are replicated
        for axis, mesh_axis, size in zip(axes, spec, params[name].shape, strict=True):
            if mesh_axis and size % mesh.shape[mesh_axis]:
                raise ConfigError(
                    f"axis {axis} of {name} is {size}; allowed: a multiple of {mesh_axis}={mesh.shape[mesh_axis]}"
                )
        shardings[name] = NamedSharding(mesh, PartitionSpec(*spec))
    return shardings


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of token arrays [micro-batches, B, T]."""
    return NamedSharding(mesh, PartitionSpec(None, BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding that replicates an array on every device."""
    return NamedSharding(mesh, PartitionSpec())
