"""Shared by all steps: argument checks and small operations."""

from typing import Any

import jax
import jax.numpy as jnp

from dantinox.kernels import integers, validation
from dantinox.kernels.precision import matmul_precision
from dantinox.kernels.tutorial.common import call_options as call_options
from dantinox.kernels.tutorial.common import iota, refuse

Array = jax.Array


def dot(x: Array, w: Array) -> Array:
    """Multiply two tiles in their own dtype and accumulate in float32, the fast mode of the MXU."""
    return jnp.dot(x, w, precision=matmul_precision(x, w), preferred_element_type=jnp.float32)


def row_index(first: Any, count: int) -> Array:
    """[count, 1]: first, first + 1, ..., the rows of a tile. A TPU has no one-dimensional registers."""
    return first + iota((count, 1), 0)


def group_offsets(group_sizes: Array) -> Array:
    """[E + 1]: the first row of each group, and the first unassigned row."""
    return jnp.append(0, jnp.cumsum(group_sizes)).astype(jnp.int32)


def find_group(ends: Array, index: Array) -> Array:
    """The group of each index, by the ends of the groups; past the last end their number."""
    return jnp.sum(ends <= index[:, None], axis=1, dtype=jnp.int32)


def check(x: Array, w: Array, group_sizes: Array, row_tile: int = 16, **unsupported: Any) -> Array:
    """Check the arguments of a step.

    Args:
        x: rows [N, M], sorted by group.
        w: weights [E, M, F].
        group_sizes: rows of each group [E], integers.
        row_tile: rows of a tile.
        **unsupported: arguments that the step does not support; each must be None.

    Returns:
        The group sizes in int32.

    Raises:
        ValueError: a shape, dtype or value is not allowed.
        NotImplementedError: the step does not support an argument.
    """
    M = validation.as_array("x", x, "NM").shape[1]
    E, _, F = validation.as_array("w", w, "EMF").shape
    sizes = integers.as_integers("group_sizes", group_sizes, "E")
    validation.check_shape("w", w, (E, M, F))
    validation.check_shape("group_sizes", sizes, (E,))
    validation.check_floating(x=x, w=w)
    if row_tile < 16 or row_tile % 16:  # 16 rows of bfloat16 are one register
        raise ValueError(f"row_tile is {row_tile}; allowed: a multiple of 16")
    refuse(unsupported)
    if x.dtype == jnp.float64:
        raise NotImplementedError("float64 is not supported: the kernels accumulate in float32")
    return integers.group_sizes_within(sizes, x.shape[0])


def check_second_weight(w: Array, w_up: Array | None) -> list[Array]:
    """Return the weights, one or two, of which the second must have the shape and dtype of the first."""
    if w_up is None:
        return [w]
    validation.check_shape("w_up", w_up, w.shape)
    validation.check_floating(w=w, w_up=w_up)
    return [w, w_up]
