"""The public mixture of experts: argument checks and the choice of an implementation."""

import importlib
from types import ModuleType

import jax
import jax.numpy as jnp

from dantinox.kernels import validation
from dantinox.kernels.dispatch import on_gpu, select_implementation, unsupported_reason
from dantinox.kernels.ops.grouped_matmul.api import not_auto_reasons
from dantinox.kernels.ops.moe import pallas, xla

Array = jax.Array


def moe_mlp(
    x: Array,
    w_gate: Array,
    w_up: Array,
    w_down: Array,
    expert_ids: Array,
    expert_weights: Array,
    *,
    implementation: str = "auto",
) -> Array:
    """y[n] = sum_j expert_weights[n, j] * (silu(x[n] w_gate[e]) * (x[n] w_up[e])) w_down[e], e = expert_ids[n, j].

    Dropless; the cost grows with the N * k routed rows, not with E. Differentiable in all but the ids.

    Args:
        x: tokens [N, M].
        w_gate: [E, M, F]; w_up: [E, M, F]; w_down: [E, F, M]; all in x's dtype.
        expert_ids: [N, k] int32, in [0, E).
        expert_weights: [N, k], floating.
        implementation: auto, reference, xla, pallas or triton.

    Returns:
        [N, M] in x's dtype.

    Raises:
        ValueError: an argument's shape or dtype is not allowed.
        NotImplementedError: the named implementation cannot run here.
    """
    x, w_gate = validation.as_array("x", x, "NM"), validation.as_array("w_gate", w_gate, "EMF")
    w_up, w_down = validation.as_array("w_up", w_up, "EMF"), validation.as_array("w_down", w_down, "EFM")
    expert_ids = validation.as_array("expert_ids", expert_ids, "Nk")
    expert_weights = validation.as_array("expert_weights", expert_weights, "Nk")
    validation.check_floating(x=x, w_gate=w_gate, w_up=w_up, w_down=w_down)
    validation.check_floating(expert_weights=expert_weights)
    validation.check_integer("expert_ids", expert_ids)
    (N, M), (E, _, F) = x.shape, w_gate.shape
    k = expert_ids.shape[1]
    validation.check_shape("w_gate", w_gate, (E, M, F))
    validation.check_shape("w_up", w_up, (E, M, F))
    validation.check_shape("w_down", w_down, (E, F, M))
    validation.check_shape("expert_ids", expert_ids, (N, k))
    validation.check_shape("expert_weights", expert_weights, (N, k))
    if E < 1:
        raise ValueError(f"w_gate has shape {w_gate.shape}; allowed: 1 expert or more")
    if k < 1:
        raise ValueError(f"expert_ids has shape {expert_ids.shape}; allowed: 1 expert per token or more")
    table = _table(x.dtype)
    if callable(table["pallas"]) and on_gpu():
        table["pallas"] = _sm90().unsupported_inputs(x.dtype, M, F, weight="w_gate") or table["pallas"]
    run = select_implementation("moe_mlp", implementation, table, not_auto_reasons())
    if 0 in (N, M, F):
        return jnp.zeros_like(x)
    return run(x, w_gate, w_up, w_down, expert_ids, expert_weights)


def _sm90() -> ModuleType:
    """Imported on use, because nothing else imports Mosaic GPU."""
    return importlib.import_module("dantinox.kernels.ops.moe.pallas_sm90.vjp")


def _table(dtype: jnp.dtype | None = None) -> dict:
    def reference(*args):
        from dantinox.reference import moe_mlp as specification

        return specification(*args)

    def run_triton(*args):
        from dantinox.kernels.ops.moe import triton

        return triton.moe_mlp(*args)

    pallas_entry = unsupported_reason("moe_mlp", "pallas") or (_sm90() if on_gpu() else pallas).moe_mlp
    if dtype == jnp.float64 and not isinstance(pallas_entry, str):
        pallas_entry = "x has dtype float64 and it adds up in float32"
    return {
        "reference": reference,
        "xla": xla.moe_mlp,
        "pallas": pallas_entry,
        "triton": unsupported_reason("moe_mlp", "triton") or run_triton,
    }
