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
        expert_ids: experts of each token [N, k] int32; one outside [0, E) contributes nothing.
        expert_weights: weight of each choice [N, k].

    Returns:
        [N, M] in x's dtype.
    """
    # Between the products float16 keeps its precision, but has float32's range: hidden rows and the outputs of single
    # experts may exceed 65504 where the result does not.
    dtype = jnp.float32 if x.dtype == jnp.float16 else x.dtype

    def rounded(value: Array) -> Array:
        value = value.astype(dtype)
        return jax.lax.reduce_precision(value, 8, 10) if x.dtype == jnp.float16 else value

    y = jnp.zeros(x.shape, dtype)
    for e in range(w_gate.shape[0]):
        chosen = expert_ids == e
        is_routed = jnp.any(chosen, axis=1, keepdims=True)  # [N, 1]
        # What no choice joins has no effect, even where it is NaN: other tokens, and an expert without tokens.
        rows = jnp.where(is_routed, x, 0).astype(dtype)
        gate_e, up_e, down_e = (jnp.where(jnp.any(chosen), w[e], 0).astype(dtype) for w in (w_gate, w_up, w_down))
        router_weight = jnp.sum(jnp.where(chosen, expert_weights, 0), axis=1, keepdims=True)  # [N, 1]
        hidden = rounded(jax.nn.silu(rounded(rows @ gate_e)) * rounded(rows @ up_e))
        output = rounded(router_weight) * rounded(hidden @ down_e)
        y = rounded(y + jnp.where(is_routed, output, 0))
    return y.astype(x.dtype)
