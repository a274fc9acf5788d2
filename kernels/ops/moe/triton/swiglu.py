"""SwiGLU and its derivative on a tile, in float32; `moe/swiglu.py` has the formulas."""

from typing import Any

import triton
import triton.language as tl

from dantinox.kernels.ops.moe.swiglu import Activation


def activation_constants(activation: Activation) -> dict[str, Any]:
    """Return the constants of `swiglu` and `swiglu_bwd`."""
    if activation == "swiglu":
        return {"CLAMPED": False, "LIMIT": 0.0, "ALPHA": 1.0}
    return {"CLAMPED": True, "LIMIT": float(activation[1]), "ALPHA": float(activation[2])}


@triton.jit
def clamp(gate, up, LIMIT: tl.constexpr):
    """Compute min(gate, LIMIT), and up clipped to [-LIMIT, LIMIT]; NaN stays NaN."""
    clipped_up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
    return tl.where(gate > LIMIT, LIMIT, gate), clipped_up


@triton.jit
def swiglu(gate, up, CLAMPED: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr):
    """Compute h."""
    if CLAMPED:
        gate, up = clamp(gate, up, LIMIT)
        return gate * tl.sigmoid(ALPHA * gate) * (up + 1.0)
    return gate * tl.sigmoid(gate) * up


@triton.jit
def swiglu_bwd(dh, gate, up, weight, CLAMPED: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr):
    """Compute dgate, dup, weight * h and h."""
    weighted_dh = weight * dh
    if CLAMPED:
        clamped_gate, clamped_up = clamp(gate, up, LIMIT)
        sigmoid_gate = tl.sigmoid(ALPHA * clamped_gate)
        glu = clamped_gate * sigmoid_gate
        h = glu * (clamped_up + 1.0)
        dgate = weighted_dh * (clamped_up + 1.0) * sigmoid_gate * (1.0 + ALPHA * clamped_gate * (1.0 - sigmoid_gate))
        return tl.where(gate > LIMIT, 0.0, dgate), tl.where(tl.abs(up) > LIMIT, 0.0, weighted_dh * glu), weight * h, h
    sigmoid_gate = tl.sigmoid(gate)
    silu = gate * sigmoid_gate
    h = silu * up
    # Not 1 + gate - silu, which loses the 1 in a gate of 2**24.
    dgate = weighted_dh * up * sigmoid_gate * (1.0 + gate * (1.0 - sigmoid_gate))
    return dgate, weighted_dh * silu, weight * h, h
