"""The specification of grouped matmul: every row times the matrix of its group."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

Array = jax.Array


def grouped_matmul(
    x: Float[Array, "N M"], w: Float[Array, "E M F"], group_sizes: Int[Array, "E"]
) -> Float[Array, "N F"]:
    """Compute y[n] = x[n] @ w[e] for row n of group e; rows past the last group are zero.

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
        in_group = ((row >= ends[e] - group_sizes[e]) & (row < ends[e]))[:, None]
        # Rows of other groups are zeroed before the product, so that a NaN in them does not reach w's gradient.
        y = jnp.where(in_group, jnp.where(in_group, x, 0) @ w[e], y)
    return y
