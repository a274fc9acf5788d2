"""Rows between the order of the tokens and the order of the experts."""

import functools

import jax
import jax.numpy as jnp

Array = jax.Array


def unpermute_and_sum(rows: Array, place: Array) -> Array:
    """The sum of each token's rows."""
    wide = (rows[place[:, j]].astype(jnp.float32) for j in range(place.shape[1]))
    return functools.reduce(jnp.add, wide).astype(rows.dtype)


def sorted_weights(p: Array, order: Array) -> Array:
    """[N k]: the weights in the order of the sorted rows."""
    return p.astype(jnp.float32).reshape(-1)[order]
