"""What one device of a mesh exchanges with the others.

A training step is one program per device (`jax.shard_map`). The functions here are called in it by the model's layers;
without a mesh each of them returns what it is given.
"""

import contextlib
import contextvars
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dantinox.distributed.mesh import BATCH_AXES, LANES, TOKEN_AXES, cut_axes
from dantinox.kernels import dispatch
from dantinox.kernels.vma import varying_axes

Array = jax.Array
_mesh: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar("mesh", default=None)
_ragged: contextvars.ContextVar[bool] = contextvars.ContextVar("ragged", default=False)


@contextlib.contextmanager
def per_device(mesh: Mesh | None, *, ragged: bool = False) -> Iterator[None]:
    """Within this context the model computes the share of one device; inside the function of a shard_map.

    Args:
        mesh: the mesh of the shard_map.
        ragged: whether the axis expert exchanges only the rows that exist, by a collective of TPUs.
    """
    tokens = _mesh.set(mesh), _ragged.set(ragged)
    try:
        yield
    finally:
        _mesh.reset(tokens[0])
        _ragged.reset(tokens[1])


def exchanges_ragged() -> bool:
    """Return whether the axis expert exchanges only the rows that exist."""
    return _ragged.get()


def axis_size(axis: str) -> int:
    """Return the number of devices along an axis of the mesh; 1 without a mesh."""
    mesh = _mesh.get()
    return 1 if mesh is None else mesh.shape[axis]


def axis_index(axis: str) -> Array | int:
    """Return the index of this device along an axis of the mesh; 0 without a mesh."""
    return jax.lax.axis_index(axis) if axis_size(axis) > 1 else 0


def used_axes(axes: Sequence[str]) -> tuple[str, ...]:
    """Return those of the axes that have more than one device."""
    return tuple(axis for axis in axes if axis_size(axis) > 1)


def sum_over(x: Array, axes: Sequence[str]) -> Array:
    """Sum x over the devices along the axes."""
    axes = used_axes(axes)
    return jax.lax.psum(x, axes) if axes else x


def mean_over_tokens(x: Array) -> Array:
    """Average a mean over the tokens of this device over all devices, which have equally many tokens."""
    axes = used_axes(TOKEN_AXES)
    return jax.lax.pmean(x, axes) if axes else x


def sum_over_tokens(x: Array) -> Array:
    """Add up a sum over the tokens of this device over all devices."""
    return sum_over(x, TOKEN_AXES)


def separate_copies[T](params: T) -> T:
    """Return parameters of which each device along the axis data has its own, so that gradients stay apart."""
    return jax.tree.map(lambda x: jax.lax.pcast(x, "data", to="varying"), params) if axis_size("data") > 1 else params


def sum_over_copies[T](grads: T) -> T:
    """Add up the gradients of `separate_copies`."""
    return jax.tree.map(lambda x: jax.lax.psum(x, "data"), grads) if axis_size("data") > 1 else grads


def sum_partial_products(y: Array, summed_letters: Sequence[str]) -> Array:
    """Complete a product whose summed axes, given by their letters, may be cut over the axis tensor."""
    return sum_over(y, ("tensor",)) if set(summed_letters) & set("HKF") else y


def mean_of_shares(x: Array, letters: Sequence[str]) -> Array:
    """Average a mean over axes, given by their letters, that may be cut over the axis tensor."""
    axes = used_axes(("tensor",))
    return jax.lax.pmean(x, axes) if axes and set(letters) & set("HKF") else x


def once_over(x: Array | None, axis: str) -> Array | None:
    """Return x on the first device along the axis and zeros on the others, so that a sum over them adds it once."""
    return x if x is None or axis_size(axis) == 1 else jnp.where(axis_index(axis) == 0, x, 0)


def first_sequence(B: int) -> Array | int:
    """Return the index in the whole batch of the first of the B sequences of this device."""
    index: Array | int = 0
    for axis in BATCH_AXES:
        index = index * axis_size(axis) + axis_index(axis)
    return index * B


def first_position(T: int) -> Array | int:
    """Return the position in the sequence of the first of the T tokens of this device."""
    return axis_index("context") * T


def whole_weight(w: Array, letters: Sequence[str], dtype: jnp.dtype) -> Array:
    """Return a parameter in `dtype` with its model width M gathered; heads, hidden width and experts stay cut.

    Its gradient is summed over the devices in float32, and only a device's own share of M is ever summed there.

    Args:
        w: this device's share of the parameter.
        letters: one letter per axis, as in the legend of axes.
        dtype: dtype of the result.
    """
    mesh = _mesh.get()
    if mesh is None:
        return w.astype(dtype)
    # The sizes only decide whether V is cut, which is not gathered.
    axis = letters.index("M") if "M" in letters else 0
    cut = cut_axes(letters, w.shape, mesh)[axis] if "M" in letters else ()
    copied = tuple(name for name in used_axes(TOKEN_AXES) if name not in varying_axes(w))
    return _gather(w, axis, cut, copied, jnp.dtype(dtype)) if cut or copied else w.astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _gather(w: Array, axis: int, cut: tuple[str, ...], copied: tuple[str, ...], dtype: jnp.dtype) -> Array:
    """Return w in `dtype`, gathered along `axis` over the mesh axes `cut`, varying over `copied` too."""
    w = w.astype(dtype)
    for name in reversed(cut):  # one axis at a time: a ring each, where a TPU has one
        w = jax.lax.all_gather(w, name, axis=axis, tiled=True)
    return jax.lax.pcast(w, copied, to="varying") if copied else w


def _gather_fwd(w: Array, axis: int, cut: tuple[str, ...], copied: tuple[str, ...], dtype: jnp.dtype) -> tuple:
    return _gather(w, axis, cut, copied, dtype), jnp.zeros((), w.dtype)


def _gather_bwd(
    axis: int, cut: tuple[str, ...], copied: tuple[str, ...], dtype: jnp.dtype, like: Array, dw: Array
) -> tuple[Array]:
    dw = dw.astype(like.dtype)
    for name in cut:
        dw = _scatter_sum(dw, axis, name)
    return (jax.lax.psum(dw, copied) if copied else dw,)


def _scatter_sum(dw: Array, axis: int, name: str) -> Array:
    """Sum dw over the devices along a mesh axis and return this device's share along `axis`."""
    devices = axis_size(name)
    in_blocks = axis and dw.shape[axis] // devices % LANES
    if in_blocks:
        # One block per device along a new first axis: TPUs scatter the last axis only in whole tiles, and else reduce
        # the whole gradient everywhere.
        dw, axis = jnp.stack(jnp.split(dw, devices, axis)), 0
    for groups in _scatter_groups(name):
        dw = jax.lax.psum_scatter(dw, name, scatter_dimension=axis, axis_index_groups=groups, tiled=True)
    return dw[0] if in_blocks else dw


def _scatter_groups(name: str) -> list[list[list[int]] | None]:
    """Return the groups of devices along a mesh axis for each step of a reduce-scatter; None: one group.

    XLA for TPUs reduces everywhere what is scattered over all devices of a mesh, so there are two steps then: device
    b i + j gets the i-th of a blocks from those with the same j, and of that the j-th of b from those with the same i.
    """
    mesh, devices = _mesh.get(), axis_size(name)
    a = next((a for a in range(int(devices**0.5), 1, -1) if devices % a == 0), 1)
    if mesh is None or mesh.size != devices or a == 1 or not dispatch.on_tpu():
        return [None]
    b = devices // a
    return [[[b * i + j for i in range(a)] for j in range(b)], [[b * i + j for j in range(b)] for i in range(a)]]


_gather.defvjp(_gather_fwd, _gather_bwd)
_RESHAPING = {"pvary", "reshape", "convert_element_type", "transpose"}


def save_all_but_gathered_weights(primitive: Any, *_: Any, **params: Any) -> bool:
    """A checkpoint policy: keep what the backward pass needs, but gather the weights again.

    What is computed from a gathered weight without arithmetic, such as its other shapes, must not be kept either.
    """
    if primitive.name == "custom_vjp_call":
        return all(equation.primitive.name != "all_gather" for equation in params["call_jaxpr"].jaxpr.eqns)
    return primitive.name not in _RESHAPING


def is_gathering() -> bool:
    """Return whether matrices are cut along M, so that layers gather them."""
    return bool(used_axes(("fsdp", "expert", "context")))


def cuts_weights() -> bool:
    """Return whether a device has only a share of the matrices."""
    return is_gathering() or axis_size("tensor") > 1
