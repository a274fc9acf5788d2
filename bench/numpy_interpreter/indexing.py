"""Gather and scatter in NumPy, by XLA's definition: one index array per axis of the operand."""

from collections.abc import Callable
from typing import Any

import numpy as np
from jax.lax import GatherScatterMode

Array = np.ndarray


def _index(
    shape: tuple[int, ...],
    indices: Array,
    sizes: tuple[int, ...],
    named: tuple[int, ...],
    batched: tuple[int, ...],
    batches: tuple[int, ...],
    clip: bool,
) -> tuple[list[Array], Array]:
    """(index of each axis of the operand, broadcastable to batch + sizes; which windows lie inside, [batch]).

    Args:
        shape: of the operand.
        indices: [batch..., components].
        sizes: of a window, along every axis of the operand.
        named: axis that each component moves along.
        batched: axes that move with the batch axes `batches`.
        batches: batch axes of the indices.
        clip: move windows that lie outside to the nearest place inside.
    """
    batch, n = indices.shape[:-1], len(shape)
    starts = [np.zeros(batch, np.int64) for _ in range(n)]
    for component, axis in enumerate(named):
        starts[axis] = indices[..., component].astype(np.int64)
    for axis, along in zip(batched, batches):
        line = np.arange(batch[along]).reshape([-1 if d == along else 1 for d in range(len(batch))])
        starts[axis] = np.broadcast_to(line, batch)
    inside = np.ones(batch, bool)
    for axis in named:
        if clip:
            starts[axis] = np.clip(starts[axis], 0, shape[axis] - sizes[axis])
        inside &= (starts[axis] >= 0) & (starts[axis] <= shape[axis] - sizes[axis])
    at = []
    for axis in range(n):
        line = np.arange(sizes[axis]).reshape([-1 if d == axis else 1 for d in range(n)])
        at.append(np.where(inside, starts[axis], 0).reshape(*batch, *[1] * n) + line)
    return at, inside


def gather(params: Any, ins: Any, outs: Any) -> Callable[..., Array]:
    """`jax.lax.gather`."""
    d, sizes, mode = params["dimension_numbers"], params["slice_sizes"], params["mode"]
    clip = mode == GatherScatterMode.CLIP
    rank = len(outs[0].aval.shape)
    dropped = {*d.collapsed_slice_dims, *d.operand_batching_dims}

    def call(x: Array, indices: Array) -> Array:
        batch = indices.shape[:-1]
        at, inside = _index(
            x.shape,
            indices,
            sizes,
            d.start_index_map,
            d.operand_batching_dims,
            d.start_indices_batching_dims,
            clip,
        )
        if 0 in x.shape:
            return np.zeros(outs[0].aval.shape, x.dtype)
        found = x[tuple(at)]
        if not inside.all():
            if mode == GatherScatterMode.PROMISE_IN_BOUNDS:
                raise IndexError("gather: an index that was promised to lie inside does not")
            fill = params["fill_value"]
            if fill is None:
                fill = np.nan if x.dtype.kind not in "iub" else np.iinfo(x.dtype).min if x.dtype.kind == "i" else 1
            found = np.where(inside.reshape(*batch, *[1] * x.ndim), found, np.asarray(fill, x.dtype))
        kept = [sizes[a] for a in range(x.ndim) if a not in dropped]
        found = found.reshape(*batch, *kept)
        front = [axis for axis in range(rank) if axis not in d.offset_dims]
        order = np.argsort([*front, *d.offset_dims])
        return found.transpose(order)

    return call


def scatter(params: Any, ins: Any, outs: Any) -> Callable[..., Array]:
    """`jax.lax.scatter` and `scatter_add`; which one, the body that combines two values says."""
    d, mode = params["dimension_numbers"], params["mode"]
    body = params["update_jaxpr"]
    adds = body is not None and any(e.primitive.name.startswith("add") for e in getattr(body, "jaxpr", body).eqns)

    def call(x: Array, indices: Array, updates: Array) -> Array:
        inserted = {*d.inserted_window_dims, *d.operand_batching_dims}
        window = iter(updates.shape[a] for a in d.update_window_dims)
        sizes = tuple(1 if a in inserted else next(window) for a in range(x.ndim))
        at, inside = _index(
            x.shape,
            indices,
            sizes,
            d.scatter_dims_to_operand_dims,
            d.operand_batching_dims,
            d.scatter_indices_batching_dims,
            mode == GatherScatterMode.CLIP,
        )
        front = [a for a in range(updates.ndim) if a not in d.update_window_dims]
        batch = indices.shape[:-1]
        moved = updates.transpose(*front, *d.update_window_dims).reshape(*batch, *sizes)
        out, full = np.array(x), (*batch, *sizes)
        keep = np.broadcast_to(inside.reshape(*batch, *[1] * x.ndim), full)
        where = tuple(np.broadcast_to(a, full)[keep] for a in at)
        if adds:
            np.add.at(out, where, moved[keep])
        else:
            out[where] = moved[keep]
        return out

    return call
