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
    *,
    b_gate: Float[Array, "E F"] | None = None,
    b_up: Float[Array, "E F"] | None = None,
    b_down: Float[Array, "E M"] | None = None,
    activation: str | tuple[str, float, float] = "swiglu",
) -> Float[Array, "N M"]:
    """Compute y[n] = sum_j expert_weights[n, j] * (act(x[n] w_gate[e] + b_gate[e], x[n] w_up[e] + b_up[e]) w_down[e]).

    e is expert_ids[n, j], and b_down[e] is added to each expert's output before it is weighted. act(g, u) is
    silu(g) * u for "swiglu"; for ("swiglu_clamped", limit, alpha) it is g' * sigmoid(alpha * g') * (u' + 1), with
    g' = min(g, limit) and u' = u clipped to [-limit, limit]. The derivative of a clamp is 1 at its limit.

    Args:
        x: tokens [N, M].
        w_gate: gate projections [E, M, F].
        w_up: up projections [E, M, F].
        w_down: down projections [E, F, M].
        expert_ids: experts of each token [N, k] int32; one outside [0, E) contributes nothing.
        expert_weights: weight of each choice [N, k].
        b_gate: biases of the gates [E, F], or None.
        b_up: biases of the up projections [E, F], or None.
        b_down: biases of the down projections [E, M], or None.
        activation: "swiglu", or ("swiglu_clamped", limit, alpha).

    Returns:
        [N, M] in x's dtype.
    """
    # Between the products float16 keeps its precision, but has float32's range: hidden rows and the outputs of single
    # experts may exceed 65504 where the result does not.
    dtype = jnp.float32 if x.dtype == jnp.float16 else x.dtype

    def rounded(value: Array) -> Array:
        value = value.astype(dtype)
        return jax.lax.reduce_precision(value, 8, 10) if x.dtype == jnp.float16 else value

    (E, M, F), y = w_gate.shape, jnp.zeros(x.shape, dtype)
    widths = ((b_gate, F), (b_up, F), (b_down, M))
    biases = [jnp.zeros((E, width), dtype) if b is None else b for b, width in widths]
    for e in range(E):
        chosen = expert_ids == e
        is_routed = jnp.any(chosen, axis=1, keepdims=True)  # [N, 1]
        # What no choice joins has no effect, even where it is NaN: other tokens, and an expert without tokens.
        rows = jnp.where(is_routed, x, 0).astype(dtype)
        gate_e, up_e, down_e = (jnp.where(jnp.any(chosen), w[e], 0).astype(dtype) for w in (w_gate, w_up, w_down))
        gate_bias, up_bias, down_bias = (jnp.where(jnp.any(chosen), b[e], 0).astype(dtype)[None] for b in biases)
        router_weight = jnp.sum(jnp.where(chosen, expert_weights, 0), axis=1, keepdims=True)  # [N, 1]
        gate, up = rounded(rounded(rows @ gate_e) + gate_bias), rounded(rounded(rows @ up_e) + up_bias)
        hidden = rounded(_activate(gate, up, activation))
        output = rounded(router_weight) * rounded(rounded(hidden @ down_e) + down_bias)
        y = rounded(y + jnp.where(is_routed, output, 0))
    return y.astype(x.dtype)


def _activate(gate: Array, up: Array, activation: str | tuple[str, float, float]) -> Array:
    if isinstance(activation, str):
        return jax.nn.silu(gate) * up
    _, limit, alpha = activation
    # Not jnp.minimum, whose derivative at the limit is 1/2; NaN stays NaN.
    gate = jnp.where(gate > limit, limit, gate)
    up = jnp.where(up > limit, limit, jnp.where(up < -limit, -limit, up))
    return gate * jax.nn.sigmoid(alpha * gate) * (up + 1)
