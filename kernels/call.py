"""The call of an implementation, made fit for eager code, for `shard_map` and for meshes with explicit axes.

Every operation calls its implementation through `call_implementation`:

    eager code       the implementation runs under one jit, so that only the first call of its shapes compiles
    inside jit       that jit is inlined: the outer program is the same as without it
    shard_map        all arrays vary over the same mesh axes, so carries and kernel results can vary over them too
    explicit axes    the implementation sees auto axes; only its results have explicit shardings
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dantinox.kernels.vma import match_vma

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class _ArrayIndex:
    """Stands for an array in `_StaticCall.leaves`."""

    index: int


@dataclasses.dataclass(frozen=True)
class _StaticCall:
    """A call without its arrays, which jit can use as a cache key."""

    function: Callable[..., Any]
    tree: Any
    leaves: tuple[Hashable, ...]

    def __call__(self, *arrays: Array) -> Any:
        leaves = [arrays[leaf.index] if isinstance(leaf, _ArrayIndex) else leaf for leaf in self.leaves]
        args, options = jax.tree.unflatten(self.tree, leaves)
        return self.function(*args, **options)


@functools.cache
def _jitted(op: str) -> Callable[..., Any]:
    """Return the jit of an operation, which shows its name in a profile."""

    def run(call: _StaticCall, *arrays: Array) -> Any:
        return call(*arrays)

    run.__name__ = run.__qualname__ = op
    return jax.jit(run, static_argnums=0, inline=True)


def call_implementation(
    op: str,
    function: Callable[..., Any],
    out_specs: Callable[..., Any],
    *args: Any,
    **options: Any,
) -> Any:
    """Call function(*args, **options).

    Args:
        op: name of the operation.
        function: an implementation.
        out_specs: returns the partition specs of the results from those of the arrays, in order; called only if a mesh
            has explicit axes.
        args: arrays, and pytrees of them.
        options: arrays or hashable values. An array that occurs twice is passed once, so `is` still finds it.
    """
    leaves, tree = jax.tree.flatten((args, options))
    arrays: list[Array] = []
    positions: dict[int, _ArrayIndex] = {}
    static_leaves: list[Hashable] = []
    for leaf in leaves:
        if not isinstance(leaf, jax.Array):
            static_leaves.append(leaf)
            continue
        if id(leaf) not in positions:
            positions[id(leaf)] = _ArrayIndex(len(arrays))
            arrays.append(leaf)
        static_leaves.append(positions[id(leaf)])
    run = functools.partial(_jitted(op), _StaticCall(function, tree, tuple(static_leaves)))
    arrays = [match_vma(x, *arrays) for x in arrays]
    mesh = jax.typeof(arrays[0]).sharding.mesh
    explicit = tuple(
        axis for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit
    )
    if not explicit:
        return run(*arrays)
    specs = [jax.typeof(leaf).sharding.spec for leaf in leaves if isinstance(leaf, jax.Array)]
    out_sharding = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), out_specs(*specs), is_leaf=lambda x: isinstance(x, PartitionSpec)
    )
    return jax.sharding.auto_axes(run, axes=explicit, out_sharding=out_sharding)(*arrays)
