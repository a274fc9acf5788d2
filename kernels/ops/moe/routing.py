"""Sorting of rows by expert, and back to the order of the tokens."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dantinox.kernels.einsum import accumulation_dtype

Array = jax.Array


class Routing(NamedTuple):
    """The order of the N * k routed rows, sorted by expert.

    Attributes:
        permutation: [N k]; the routed row n * k + j of each sorted row.
        inverse_permutation: [N k], or [N, k]; the sorted row of each routed row.
        group_sizes: [E]; the number of rows of each expert.
    """

    permutation: Array
    inverse_permutation: Array
    group_sizes: Array


def sort_by_expert(expert_ids: Array, E: int) -> Routing:
    """Sort the routed rows of expert_ids [N, k] by expert, stably; rows of an id outside [0, E) are unassigned.

    The inverse permutation is [N k].
    """
    flat_ids = expert_ids.reshape(-1).astype(jnp.int32)
    permutation = jnp.argsort(flat_ids, stable=True).astype(jnp.int32)
    inverse = jnp.zeros_like(permutation)
    inverse = inverse.at[permutation].set(jnp.arange(expert_ids.size, dtype=jnp.int32), unique_indices=True)
    group_sizes = jnp.sum(flat_ids[:, None] == jnp.arange(E, dtype=jnp.int32)[None], axis=0, dtype=jnp.int32)
    return Routing(permutation, inverse, group_sizes)


def unpermute_and_sum(rows: Array, inverse_permutation: Array) -> Array:
    """Sum each token's rows in float32, in the order of its choices: [N, M]."""
    k = inverse_permutation.shape[1]
    per_choice = (rows[inverse_permutation[:, j]].astype(jnp.float32) for j in range(k))
    return functools.reduce(jnp.add, per_choice).astype(rows.dtype)


def permute_router_weights(router_weights: Array, permutation: Array) -> Array:
    """Return the weights [N, k] in the order of the sorted rows, in float32: [N k]."""
    return router_weights.astype(jnp.float32).reshape(-1)[permutation]


def permute_rows(x: Array, routing: Routing) -> Array:
    """Return the rows of x [N, M], sorted by expert: [N k, M]."""
    inverse = routing.inverse_permutation.reshape(x.shape[0], -1)
    return _gather_rows(x, routing.permutation // inverse.shape[1], inverse)


def combine_rows(y: Array, expert_weights: Array, routing: Routing) -> Array:
    """Sum the rows y [N k, M] of each token times their weights [N, k], in float32 or wider: [N, M]."""
    N, k = expert_weights.shape
    y = _gather_rows(y, routing.inverse_permutation.reshape(-1), routing.permutation[:, None]).reshape(N, k, -1)
    acc_dtype = accumulation_dtype(y.dtype)
    return jnp.sum(y.astype(acc_dtype) * expert_weights.astype(acc_dtype)[..., None], axis=1).astype(y.dtype)


@jax.custom_vjp
def _gather_rows(x: Array, index: Array, inverse: Array) -> Array:
    """Return x[index], with a gradient that is a gather and a sum: deterministic, and faster than XLA's scatter.

    Args:
        x: rows.
        index: rows to take; each row of x occurs k times.
        inverse: [rows of x, k], the rows of the result that each row of x goes to.
    """
    return x[index]


def _gather_rows_fwd(x: Array, index: Array, inverse: Array) -> tuple[Array, Array]:
    return x[index], inverse


def _gather_rows_bwd(inverse: Array, dy: Array) -> tuple:
    dx: Any = sum(dy[inverse[:, j]].astype(accumulation_dtype(dy.dtype)) for j in range(inverse.shape[1]))
    return dx.astype(dy.dtype), None, None


_gather_rows.defvjp(_gather_rows_fwd, _gather_rows_bwd)
