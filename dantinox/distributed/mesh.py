"""Parameter sharding rules, derived from the axis names of each parameter."""

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dantinox.checkpoint import params
from dantinox.config import ConfigError, ModelConfig
from dantinox.distributed.shard_map import BATCH

# Logical axis -> mesh axis. Every matrix has the model width M exactly once, so fsdp shards every matrix along it.
RULES = {"M": "fsdp"}


def make_mesh(axes: dict[str, int]) -> Mesh | None:
    """A mesh over the first local devices; None if a single device is requested.

    Raises:
        ConfigError: fewer devices than the mesh needs.
    """
    needed, here = axes["data"] * axes["fsdp"], jax.local_devices()
    if needed == 1:
        return None
    if needed > len(here):
        raise ConfigError(
            f"mesh data={axes['data']},fsdp={axes['fsdp']} needs {needed} devices; "
            f"here {'is' if len(here) == 1 else 'are'} {len(here)}"
        )
    auto = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh((axes["data"], axes["fsdp"]), ("data", "fsdp"), auto, devices=here[:needed])


def parameter_shardings(config: ModelConfig, mesh: Mesh) -> dict[str, NamedSharding]:
    """Sharding of each parameter, by its dotted path.

    Raises:
        ConfigError: an axis does not divide by the devices along it.
    """
    _, shapes = params.abstract_params(config)
    shardings = {}
    for name, axes in params.param_axes(config).items():
        spec = [RULES.get(axis) if len(axes) > 1 else None for axis in axes]  # norm scales are replicated
        for axis, over, size in zip(axes, spec, shapes[name].shape, strict=True):
            if over and size % mesh.shape[over]:
                raise ConfigError(f"axis {axis} of {name} is {size}; it must divide by {over}={mesh.shape[over]}")
        shardings[name] = NamedSharding(mesh, PartitionSpec(*spec))
    return shardings


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of token arrays [micro-batches, B, T]."""
    return NamedSharding(mesh, PartitionSpec(None, BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding that keeps the whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())
