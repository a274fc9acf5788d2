"""Mixture of experts as the formula says: every expert on every token, weighted by the router."""

import jax
import jax.numpy as jnp

Array = jax.Array


def moe_mlp(x: Array, w_gate: Array, w_up: Array, w_down: Array, expert_ids: Array, expert_weights: Array) -> Array:
    """y[n] = sum_j expert_weights[n, j] * (silu(x[n] w_gate[e]) * (x[n] w_up[e])) w_down[e], e = expert_ids[n, j].

    Args:
        x: tokens [N, M].
        w_gate: [E, M, F]; w_up: [E, M, F]; w_down: [E, F, M].
        expert_ids: [N, k] int32; expert_weights: [N, k].

    Returns:
        [N, M] in x's dtype.
    """
    y = jnp.zeros_like(x)
    for e in range(w_gate.shape[0]):
        share = jnp.sum(jnp.where(expert_ids == e, expert_weights, 0), axis=1, keepdims=True)  # [N, 1]
        hidden = jax.nn.silu(x @ w_gate[e]) * (x @ w_up[e])
        y = y + share.astype(x.dtype) * (hidden @ w_down[e])
    return y
