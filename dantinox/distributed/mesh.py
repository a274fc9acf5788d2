"""The mesh of devices, and which of its axes cuts which axis of the parameters and of the batch.

    data       sequences; parameters are copied. `slices` of it are joined by the slower network between pods or hosts
    fsdp       sequences, and the model width M of every matrix; a layer gathers its matrices while it runs
    expert     sequences, and the experts E; tokens travel to their experts. Matrices without experts: as fsdp
    context    the tokens of each sequence. Matrices: as fsdp
    tensor     heads H and K, hidden width F and, if it divides, the vocabulary V

The training step runs once per device (`jax.shard_map`), so that every exchange is written in `distributed/` and no
array is ever larger than these rules say.
"""

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dantinox.config import ConfigError

AXES = ("data", "fsdp", "expert", "context", "tensor")  # neighbours along the last axis are joined best
BATCH_AXES = ("data", "fsdp", "expert")
TOKEN_AXES = (*BATCH_AXES, "context")
LANES = 128  # columns of a TPU's tile


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh | None:
    """Return a mesh with all of `AXES`; None for a single device.

    Args:
        sizes: devices along each axis, 1 by default, and the number of `slices` that axis data is repeated over.
        devices: the devices to take the first of; None: all devices of all processes.

    Raises:
        ConfigError: fewer devices than the mesh needs.
    """
    slices, shape = sizes.get("slices", 1), tuple(sizes.get(axis, 1) for axis in AXES)
    needed, available = slices * math.prod(shape), jax.devices() if devices is None else list(devices)
    if needed == 1:
        return None
    if needed > len(available):
        text = ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1)
        raise ConfigError(f"mesh {text} needs {needed} devices; only {len(available)} available")
    return Mesh(_device_grid(slices, shape, available[:needed]), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_expert_exchange(exchange: str, mesh: Mesh | None) -> None:
    """Check that the devices of a mesh can exchange the tokens of experts in the given way, padded or ragged.

    Raises:
        ConfigError: they cannot.
    """
    if exchange == "ragged" and mesh is not None and mesh.shape["expert"] > 1 and jax.default_backend() == "cpu":
        raise ConfigError("expert_exchange is 'ragged'; allowed on CPUs: padded")


def _device_grid(slices: int, shape: tuple[int, ...], devices: list[jax.Device]) -> np.ndarray:
    """Return the devices as an array of `shape` with axis data repeated over slices, neighbours next to each other."""
    options = {"devices": devices, "allow_split_physical_axes": True}  # axes of 4 on a torus of 16 x 16
    dcn_shape = (slices,) + (1,) * (len(shape) - 1)
    if len({getattr(device, "slice_index", 0) for device in devices}) == slices > 1:
        return mesh_utils.create_hybrid_device_mesh(shape, dcn_shape, **options)
    if len({device.process_index for device in devices}) == slices > 1:
        return mesh_utils.create_hybrid_device_mesh(shape, dcn_shape, process_is_granule=True, **options)
    return mesh_utils.create_device_mesh((slices * shape[0], *shape[1:]), **options)


def cut_axes(letters: Sequence[str], shape: Sequence[int], mesh: Mesh) -> list[tuple[str, ...]]:
    """Return, for each axis of a parameter, the mesh axes of more than one device that cut it.

    Args:
        letters: one letter per axis, as in the legend of axes.
        shape: sizes of the whole parameter.
        mesh: from `make_mesh`.
    """
    is_stack, is_vector = letters[0] == "E" and len(letters) > 1, len(letters) == 1
    rules: dict[str, tuple[str, ...]] = {letter: ("tensor",) for letter in "HKFV"}
    if is_stack:
        rules |= {"E": ("expert",), "M": ("fsdp", "context")}
    elif not is_vector:  # the scales of norms are copied
        rules["M"] = ("fsdp", "expert", "context")
    cuts = []
    for letter, size in zip(letters, shape, strict=True):
        names = tuple(name for name in rules.get(letter, ()) if mesh.shape[name] > 1)
        cuts.append(() if letter == "V" and size % _count(mesh, names) else names)
    return cuts


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
    for name, letters in axes_by_name.items():
        shape = params[name].shape
        cuts = cut_axes(letters, shape, mesh)
        for letter, names, size in zip(letters, cuts, shape, strict=True):
            if size % _count(mesh, names):
                text = ",".join(f"{axis}={mesh.shape[axis]}" for axis in names)
                raise ConfigError(f"axis {letter} of {name} is {size}; allowed: a multiple of {text}")
        shardings[name] = NamedSharding(mesh, PartitionSpec(*[names or None for names in cuts]))
    return shardings


def _count(mesh: Mesh, names: Sequence[str]) -> int:
    return math.prod(mesh.shape[name] for name in names)


def uneven_cuts(mesh: Mesh, vocab_size: int, dim: int) -> list[str]:
    """Return one line for each size that the mesh divides badly, though it trains.

    Args:
        mesh: from `make_mesh`.
        vocab_size: V.
        dim: M.
    """
    lines = []
    if vocab_size % mesh.shape["tensor"]:
        lines.append(
            f"vocab_size {vocab_size} is not a multiple of tensor={mesh.shape['tensor']}: each device keeps all of it"
        )
    share = dim // _count(mesh, ("fsdp", "expert", "context"))
    if share < dim and share % LANES:
        lines.append(f"a device has {share} of the {dim} columns of dim; a TPU works on {LANES} at a time")
    return lines


def batch_spec(mesh: Mesh, num_leading_axes: int = 0) -> PartitionSpec:
    """Return the partition of token arrays [..., B, T]: sequences over `BATCH_AXES`, their tokens over context."""
    batch = tuple(name for name in BATCH_AXES if mesh.shape[name] > 1)
    context = "context" if mesh.shape["context"] > 1 else None
    return PartitionSpec(*[None] * num_leading_axes, batch or None, context)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of token arrays [micro-batches, B, T]."""
    return NamedSharding(mesh, batch_spec(mesh, 1))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding that replicates an array on every device."""
    return NamedSharding(mesh, PartitionSpec())
