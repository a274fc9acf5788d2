"""Prefill and decode on a mesh of the axes data and tensor.

XLA partitions the programs of `dantinox.inference` by where their arrays are: weights and caches are cut over heads and
hidden width, sequences over data. It cannot partition hand-written kernels, so each runs under `shard_map`, on the
heads and the sequences of its device.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec, Sharding, SingleDeviceSharding

from dantinox.config import ConfigError
from dantinox.config.training import parse_mesh
from dantinox.distributed.collectives import per_device
from dantinox.distributed.mesh import AXES, make_mesh, parameter_shardings

# A user context is part of jit's cache key: a program traced for one mesh is traced again for another.
_mesh = jax.make_user_context(default_value=None)
_CUTS = {"H": "tensor", "K": "tensor", "F": "tensor", "B": "data", "N": "data"}


def inference_mesh(text: str) -> Mesh | None:
    """Return the mesh that a text such as data=2,tensor=4 describes; None for one device.

    Raises:
        ConfigError: the mesh has another axis, or needs more devices.
    """
    sizes = parse_mesh(text)
    if other := [axis for axis, size in sizes.items() if size > 1 and axis not in ("data", "tensor")]:
        raise ConfigError(f"mesh is {text!r}, with {other[0]}; allowed in generation and evaluation: data and tensor")
    return make_mesh(sizes)


def inference_shardings(
    axes_by_name: Mapping[str, Sequence[str]], shapes: Mapping[str, Any], mesh: str
) -> dict[str, Sharding]:
    """Return where each parameter of a model is, by name; `mesh` as in `inference_mesh`."""
    if (laid := inference_mesh(mesh)) is not None:
        return {**parameter_shardings(axes_by_name, shapes, laid)}
    return dict.fromkeys(shapes, SingleDeviceSharding(jax.devices()[0]))


def mesh_of(weights: Any) -> Mesh | None:
    """Return the mesh that the arrays of a model are on; None for one device."""
    for x in jax.tree.leaves(weights):
        mesh = getattr(getattr(x, "sharding", None), "mesh", None)
        if isinstance(mesh, Mesh) and mesh.size > 1 and mesh.axis_names == AXES:
            return mesh
    return None


def kernels_on(mesh: Mesh | None) -> Any:
    """Return a context in which `call_kernel` runs kernels per device of `mesh`."""
    return _mesh(mesh)


def call_kernel(
    kernel: Callable[..., Any],
    arguments: Sequence[Any],
    letters: Sequence[Any],
    out_letters: Any,
    *,
    summed: bool = False,
) -> Any:
    """Call kernel(*arguments), per device if a mesh is active.

    Args:
        kernel: a function of arrays and of trees of arrays.
        arguments: its arguments, any of them None.
        letters: for each argument its axes, as in the legend of axes, such as BTHD, or a tree of them.
        out_letters: the same of the results.
        summed: the results are partial sums over the axis tensor.
    """
    mesh = _mesh.value
    if mesh is None:
        return kernel(*arguments)
    present = [index for index, x in enumerate(arguments) if x is not None]
    rows = {letter: size for index in present for letter, size in _row_sizes(letters[index], arguments[index])}

    def spec(text: str) -> PartitionSpec:
        cuts = [_CUTS.get(letter) for letter in text]
        # Sequences that do not divide are computed by all devices along data.
        divides = [rows.get(letter, 0) % mesh.shape["data"] == 0 for letter in text]
        return PartitionSpec(*[None if cut == "data" and not fits else cut for cut, fits in zip(cuts, divides)])

    def on_device(*given: Any) -> Any:
        full: list[Any] = [None] * len(arguments)
        for index, x in zip(present, given, strict=True):
            full[index] = x
        with per_device(mesh):
            out = kernel(*full)
        return jax.lax.psum(out, "tensor") if summed and mesh.shape["tensor"] > 1 else out

    in_specs = tuple(jax.tree.map(spec, letters[index]) for index in present)
    out_specs = jax.tree.map(spec, out_letters)
    given = [arguments[index] for index in present]
    return jax.shard_map(on_device, mesh=mesh, in_specs=in_specs, out_specs=out_specs)(*given)


def _row_sizes(letters: Any, argument: Any) -> list[tuple[str, int]]:
    """Return the sizes of the axes B and N of an argument."""
    pairs = zip(jax.tree.leaves(letters), jax.tree.leaves(argument), strict=True)
    return [(letter, size) for text, x in pairs for letter, size in zip(text, x.shape) if letter in "BN"]
