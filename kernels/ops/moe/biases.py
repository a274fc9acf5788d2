"""Biases of the experts, on rows that are sorted by expert."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dantinox.kernels.ops.grouped_matmul import xla
from dantinox.kernels.vma import match_vma

Array = jax.Array


class ExpertBiases(NamedTuple):
    """b_gate, b_up [E, F] and b_down [E, M], each None if the experts have none; or their gradients."""

    b_gate: Array | None = None
    b_up: Array | None = None
    b_down: Array | None = None


NO_BIASES = ExpertBiases()


def add_bias(y: Array, b: Array | None, group_sizes: Array) -> Array:
    """Add to the rows y [R, F], sorted by expert, the biases b [E, F] of their experts; None adds nothing."""
    return y if b is None else y + bias_rows(b, group_sizes, y.shape[0])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def bias_rows(b: Array, group_sizes: Array, R: int) -> Array:
    """Return b [E, F] by row, [R, F]; zeros in unassigned rows.

    The gradient is that of a grouped matmul with a column of ones, which sums the rows of each expert in one order; an
    infinity or a NaN in a row reaches its own expert only. XLA's own, a scatter, adds in any order on a GPU.
    """
    ends = jnp.cumsum(group_sizes.astype(jnp.int32))
    group = jnp.sum(jnp.arange(R)[:, None] >= ends[None], axis=1)
    return jnp.where((group < b.shape[0])[:, None], b[jnp.minimum(group, b.shape[0] - 1)], 0)


def _bias_rows_fwd(b: Array, group_sizes: Array, R: int) -> tuple[Array, Array]:
    return bias_rows(b, group_sizes, R), group_sizes


def _bias_rows_bwd(R: int, group_sizes: Array, dy: Array) -> tuple[Array, None]:
    return sum_rows(dy, group_sizes), None


bias_rows.defvjp(_bias_rows_fwd, _bias_rows_bwd)


def sum_rows(y: Array, group_sizes: Array) -> Array:
    """Sum the rows y [R, F] of each group, [E, F], accumulating in float32 or wider."""
    ones = match_vma(jnp.ones_like(y, shape=(y.shape[0], 1)), y)
    zeros = jnp.zeros_like(y, shape=(group_sizes.shape[0], 1, y.shape[1]))
    _, pull_back = jax.vjp(lambda w: xla.grouped_matmul(ones, w, group_sizes), match_vma(zeros, y, group_sizes))
    return pull_back(y)[0][:, 0]
