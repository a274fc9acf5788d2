"""SwiGLU and its derivative in float32, as the kernels' epilogues compute them; `vjp.py` has the formulas.

The clamped SwiGLU is that of OpenAI's gpt-oss (2025):

    h = g' sigmoid(alpha g') (u' + 1),  g' = min(gate, limit),  u' = up clipped to [-limit, limit]

The derivative of a clamp is 1 up to the limit, that included, and 0 beyond it.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
Activation = Literal["swiglu"] | tuple[Literal["swiglu_clamped"], float, float]  # with limit and alpha


class SwigluGrads(NamedTuple):
    """The results of `swiglu_bwd`, [n, F] each.

    Attributes:
        dgate, dup: the gradients of gate and up.
        weighted_h: h times the router's weight; weighted_h^T dy is the gradient of w_down.
        drouter_weight: dh h; its sum over F is the gradient of the router's weight.
    """

    dgate: Array
    dup: Array
    weighted_h: Array
    drouter_weight: Array


def swiglu(gate: Array, up: Array, activation: Activation = "swiglu") -> Array:
    """Return h [n, F]."""
    if activation == "swiglu":
        return gate * jax.nn.sigmoid(gate) * up
    return clamped_swiglu(gate, up, *activation[1:])


def clamped_swiglu(gate: Array, up: Array, limit: float, alpha: float) -> Array:
    """Return h [n, F] = g' sigmoid(alpha g') (u' + 1)."""
    gate, up = clamp(gate, up, limit)
    return gate * jax.nn.sigmoid(alpha * gate) * (up + 1)


def clamp(gate: Array, up: Array, limit: float) -> tuple[Array, Array]:
    """Return min(gate, limit), and up clipped to [-limit, limit]; NaN stays NaN."""
    # Not jnp.minimum, whose derivative at the limit is 1/2.
    clipped_up = jnp.where(up > limit, limit, jnp.where(up < -limit, -limit, up))
    return jnp.where(gate > limit, limit, gate), clipped_up


def swiglu_bwd(
    dh: Array, gate: Array, up: Array, router_weight: Array, activation: Activation = "swiglu"
) -> SwigluGrads:
    """Return the gradients for dh = dy w_down^T, without the router's weight; router_weight [n, 1] or [n, F]."""
    gate, up = gate.astype(jnp.float32), up.astype(jnp.float32)
    if activation != "swiglu":
        return _clamped_swiglu_bwd(dh, gate, up, router_weight, *activation[1:])
    sigmoid_gate = jax.nn.sigmoid(gate)
    silu = gate * sigmoid_gate
    h, weighted_dh = silu * up, router_weight * dh
    # Not 1 + gate - silu, which loses the 1 in a gate of 2**24.
    dgate = weighted_dh * up * sigmoid_gate * (1 + gate * (1 - sigmoid_gate))
    return SwigluGrads(dgate, weighted_dh * silu, router_weight * h, dh * h)


def _clamped_swiglu_bwd(
    dh: Array, gate: Array, up: Array, router_weight: Array, limit: float, alpha: float
) -> SwigluGrads:
    clamped_gate, clamped_up = clamp(gate, up, limit)
    sigmoid_gate = jax.nn.sigmoid(alpha * clamped_gate)
    glu = clamped_gate * sigmoid_gate
    h, weighted_dh = glu * (clamped_up + 1), router_weight * dh
    dgate = weighted_dh * (clamped_up + 1) * sigmoid_gate * (1 + alpha * clamped_gate * (1 - sigmoid_gate))
    return SwigluGrads(
        jnp.where(gate > limit, 0, dgate),
        jnp.where(jnp.abs(up) > limit, 0, weighted_dh * glu),
        router_weight * h,
        dh * h,
    )
