"""Grouped matmul as the formula says: every row times its own group's matrix."""

import jax
import jax.numpy as jnp

Array = jax.Array


def grouped_matmul(x: Array, w: Array, group_sizes: Array) -> Array:
    """y[n] = x[n] @ w[e] where row n belongs to group e; rows past the last group are zero.

    Args:
        x: [N, M], rows sorted by group.
        w: [E, M, F].
        group_sizes: [E] int32, summing to at most N.

    Returns:
        [N, F] in x's dtype.
    """
    ends = jnp.cumsum(group_sizes.astype(jnp.int32))
    row = jnp.arange(x.shape[0])
    y = jnp.zeros((x.shape[0], w.shape[2]), x.dtype)
    for e in range(w.shape[0]):
        mine = ((row >= ends[e] - group_sizes[e]) & (row < ends[e]))[:, None]
        # Rows of other groups are zeroed before the product too, so that what they hold cannot reach w's gradient.
        y = jnp.where(mine, jnp.where(mine, x, 0) @ w[e], y)
    return y
