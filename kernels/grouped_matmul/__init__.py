"""Grouped matmul, and the mixture of experts that is built on it."""

import importlib
from types import ModuleType

import jax
import jax.numpy as jnp

from kernels import checks
from kernels.dispatch import choose, device, missing, on_gpu
from kernels.grouped_matmul import moe, xla

Array = jax.Array

__all__ = ["grouped_matmul", "moe_mlp"]


def grouped_matmul(x: Array, w: Array, group_sizes: Array, *, implementation: str = "auto") -> Array:
    """y[n] = x[n] @ w[e] where row n belongs to group e; differentiable in x and w.

    Args:
        x: [N, M], rows sorted by group.
        w: [E, M, F] in x's dtype.
        group_sizes: [E] int32, each at least 0, summing to at most N.
        implementation: auto, reference, xla, pallas or triton.

    Returns:
        [N, F] in x's dtype; rows past the sum of the sizes are exactly zero.

    Raises:
        ValueError: an argument's shape or dtype is not allowed.
        NotImplementedError: the named implementation cannot run here.
    """
    x, w = checks.array("x", x, "NM"), checks.array("w", w, "EMF")
    group_sizes = checks.array("group_sizes", group_sizes, "E")
    checks.floating(x=x, w=w)
    checks.integer("group_sizes", group_sizes)
    E, _, F = w.shape
    checks.shape("w", w, (E, x.shape[1], F))
    checks.shape("group_sizes", group_sizes, (E,))
    table = _table("grouped_matmul", x.dtype)
    if callable(table["pallas"]) and on_gpu():
        table["pallas"] = _hopper().refusal(x.dtype, *w.shape[1:]) or table["pallas"]
    run = choose("grouped_matmul", implementation, table, _slow())
    if 0 in (*x.shape, *w.shape):
        return jnp.zeros((x.shape[0], F), x.dtype)
    return run(x, w, group_sizes.astype(jnp.int32))


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

    Dropless; the cost follows the N * k routed rows, not E. Differentiable in all but the ids.

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
    x, w_gate = checks.array("x", x, "NM"), checks.array("w_gate", w_gate, "EMF")
    w_up, w_down = checks.array("w_up", w_up, "EMF"), checks.array("w_down", w_down, "EFM")
    expert_ids = checks.array("expert_ids", expert_ids, "Nk")
    expert_weights = checks.array("expert_weights", expert_weights, "Nk")
    checks.floating(x=x, w_gate=w_gate, w_up=w_up, w_down=w_down)
    checks.floating(expert_weights=expert_weights)
    checks.integer("expert_ids", expert_ids)
    (N, M), (E, _, F) = x.shape, w_gate.shape
    k = expert_ids.shape[1]
    checks.shape("w_gate", w_gate, (E, M, F))
    checks.shape("w_up", w_up, (E, M, F))
    checks.shape("w_down", w_down, (E, F, M))
    checks.shape("expert_ids", expert_ids, (N, k))
    checks.shape("expert_weights", expert_weights, (N, k))
    if E < 1:
        raise ValueError(f"w_gate has shape {w_gate.shape}; allowed: 1 expert or more")
    if k < 1:
        raise ValueError(f"expert_ids has shape {expert_ids.shape}; allowed: 1 expert a token or more")
    table = _table("moe_mlp", x.dtype)
    if callable(table["pallas"]) and on_gpu():
        table["pallas"] = _hopper().refusal(x.dtype, M, F, of="w_gate") or table["pallas"]
    run = choose("moe_mlp", implementation, table, _slow())
    if 0 in (N, M, F):
        return jnp.zeros_like(x)
    return run(x, w_gate, w_up, w_down, expert_ids, expert_weights)


def _hopper() -> ModuleType:
    """Brought in where it is asked for: nothing else imports Mosaic GPU."""
    return importlib.import_module("kernels.grouped_matmul.hopper")


def _slow() -> dict[str, str]:
    """What "auto" leaves to those who name it, and why.

    Interpreted, grouped matmul takes 0.75 to 1.0 times as long as in `xla.py` and the mixture 0.9 to 1.1 times, 1.2 for
    a single token; a mixture with its gradients compiles for 1.2 s instead of 0.7. On a TPU neither has run yet, and
    Triton not on a GPU.
    """
    interpreted = device().platform == "cpu"
    pallas = "interpreted, it takes longer to compile" if interpreted else "it has not run here yet; name it"
    return {"pallas": pallas, "triton": "it has not run on a GPU yet; name it"}


def _table(op: str, dtype: jnp.dtype | None = None) -> dict:
    def reference(*args):
        import reference as specification

        return getattr(specification, op)(*args)

    def by_triton(*args):
        from kernels.grouped_matmul import triton

        return triton.moe_mlp(*args)

    pallas = missing(op, "pallas") or getattr(_hopper() if on_gpu() else moe, op)
    if dtype == jnp.float64 and not isinstance(pallas, str):
        pallas = "x has dtype float64 and it adds up in float32"
    return {
        "reference": reference,
        "xla": getattr(xla, op),
        "pallas": pallas,
        "triton": missing(op, "triton") or by_triton,
    }
