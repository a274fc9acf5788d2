"""The specification of the mixture of experts: every expert on every token, weighted by the router."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

Array = jax.Array


def moe_mlp(
    x: Float[Array, "N M"],
    w_gate: Float[Array, "E M F"],
    w_up: Float[Array, "E M F"],
    w_down: Float[Array, "E F M"],
    expert_ids: Int[Array, "N k"],
    expert_weights: Float[Array, "N k"],
) -> Float[Array, "N M"]:
    """Compute y[n] = sum_j expert_weights[n, j] * (silu(x[n] w_gate[e]) * (x[n] w_up[e])) w_down[e].

    e is expert_ids[n, j].

    Args:
        x: tokens [N, M].
        w_gate: gate projections [E, M, F].
        w_up: up projections [E, M, F].
        w_down: down projections [E, F, M].
        expert_ids: experts of each token [N, k] int32, in [0, E).
        expert_weights: weight of each choice [N, k].

    Returns:
        [N, M] in x's dtype.
    """
    y = jnp.zeros_like(x)
    for e in range(w_gate.shape[0]):
        router_weight = jnp.sum(jnp.where(expert_ids == e, expert_weights, 0), axis=1, keepdims=True)  # [N, 1]
        hidden = jax.nn.silu(x @ w_gate[e]) * (x @ w_up[e])
        y = y + router_weight.astype(x.dtype) * (hidden @ w_down[e])
    return y
