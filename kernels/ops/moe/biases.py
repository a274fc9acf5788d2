"""Biases of the experts, on rows that are sorted by expert."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dantinox.kernels.einsum import accumulation_dtype
from dantinox.kernels.ops.grouped_matmul import xla
from dantinox.kernels.ops.moe.routing import Routing
from dantinox.kernels.vma import match_vma

Array = jax.Array
SumRows = Callable[[Sequence[Array], Array], Sequence[Array]]  # as `sum_rows`


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
    return sum_rows([dy], group_sizes)[0], None


bias_rows.defvjp(_bias_rows_fwd, _bias_rows_bwd)


def add_tiles(tiles: Sequence[Array], has_bias: Sequence[bool], biases: Sequence[Array]) -> list[Array]:
    """Add to each tile that has a bias the next of the biases, which broadcasts; for kernels."""
    rest = iter(biases)
    return [tile + next(rest) if has else tile for tile, has in zip(tiles, has_bias, strict=True)]


def add_weighted_biases(
    y: Array, b: Array | None, expert_ids: Array, router_weights: Array, routing: Routing, sum_rows: SumRows
) -> Array:
    """Add to each token's output y [N, M] the biases b [E, M] of its experts times their weights [N, k].

    So that the backward pass needs no outputs of single experts: their biases stay out of the kernels. None adds
    nothing. `sum_rows` sums the rows of each expert, for the gradient.
    """
    if b is None:
        return y
    wide = accumulation_dtype(y.dtype)
    chosen = _chosen_biases(b, expert_ids, routing, sum_rows).astype(wide)
    return (y.astype(wide) + jnp.sum(router_weights.astype(wide)[..., None] * chosen, axis=1)).astype(y.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _chosen_biases(b: Array, expert_ids: Array, routing: Routing, sum_rows: SumRows) -> Array:
    """Return the biases of the experts of each token [N, k, M]; zeros for an id of no expert."""
    E = b.shape[0]
    return jnp.where((expert_ids < E)[..., None], b[jnp.minimum(expert_ids, E - 1)], 0)


def _chosen_biases_fwd(b: Array, expert_ids: Array, routing: Routing, sum_rows: SumRows) -> tuple[Array, Routing]:
    return _chosen_biases(b, expert_ids, routing, sum_rows), routing


def _chosen_biases_bwd(sum_rows: SumRows, routing: Routing, dy: Array) -> tuple[Array, None, None]:
    rows = dy.reshape(-1, dy.shape[-1])[routing.permutation]
    return sum_rows([rows], routing.group_sizes)[0], None, None


_chosen_biases.defvjp(_chosen_biases_fwd, _chosen_biases_bwd)


def sum_rows(ys: Sequence[Array], group_sizes: Array) -> list[Array]:
    """Sum the rows of each group, [E, F], for each of ys [R, F], accumulating in float32 or wider."""

    def sum_one(y: Array) -> Array:
        ones = match_vma(jnp.ones_like(y, shape=(y.shape[0], 1)), y)
        zeros = jnp.zeros_like(y, shape=(group_sizes.shape[0], 1, y.shape[1]))
        _, pull_back = jax.vjp(lambda w: xla.grouped_matmul(ones, w, group_sizes), match_vma(zeros, y, group_sizes))
        return pull_back(y)[0][:, 0]

    return [sum_one(y) for y in ys]
