"""SwiGLU and its derivative in float32, as the kernels' epilogues compute them; `vjp.py` has the formulas."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


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


def swiglu(gate: Array, up: Array) -> Array:
    """Return h [n, F] = silu(gate) * up."""
    return gate * jax.nn.sigmoid(gate) * up


def swiglu_bwd(dh: Array, gate: Array, up: Array, router_weight: Array) -> SwigluGrads:
    """Return the gradients for dh = dy w_down^T, without the router's weight; router_weight [n, 1] or [n, F]."""
    gate, up = gate.astype(jnp.float32), up.astype(jnp.float32)
    sigmoid_gate = jax.nn.sigmoid(gate)
    silu = gate * sigmoid_gate
    h, weighted_dh = silu * up, router_weight * dh
    # Not 1 + gate - silu, which loses the 1 in a gate of 2**24.
    dgate = weighted_dh * up * sigmoid_gate * (1 + gate * (1 - sigmoid_gate))
    return SwigluGrads(dgate, weighted_dh * silu, router_weight * h, dh * h)
