"""The public grouped matmul: argument checks and the choice of an implementation."""

import importlib
from types import ModuleType

import jax
import jax.numpy as jnp

from dantinox.kernels import validation
from dantinox.kernels.dispatch import current_device, on_gpu, select_implementation, unsupported_reason
from dantinox.kernels.ops.grouped_matmul import pallas, xla

Array = jax.Array


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
    x, w = validation.as_array("x", x, "NM"), validation.as_array("w", w, "EMF")
    group_sizes = validation.as_array("group_sizes", group_sizes, "E")
    validation.check_floating(x=x, w=w)
    validation.check_integer("group_sizes", group_sizes)
    E, _, F = w.shape
    validation.check_shape("w", w, (E, x.shape[1], F))
    validation.check_shape("group_sizes", group_sizes, (E,))
    table = _table(x.dtype)
    if callable(table["pallas"]) and on_gpu():
        table["pallas"] = _sm90().unsupported_inputs(x.dtype, *w.shape[1:]) or table["pallas"]
    run = select_implementation("grouped_matmul", implementation, table, not_auto_reasons())
    if 0 in (*x.shape, *w.shape):
        return jnp.zeros((x.shape[0], F), x.dtype)
    return run(x, w, group_sizes.astype(jnp.int32))


def _sm90() -> ModuleType:
    """Imported on use, because nothing else imports Mosaic GPU."""
    return importlib.import_module("dantinox.kernels.ops.grouped_matmul.pallas_sm90.vjp")


def not_auto_reasons() -> dict[str, str]:
    """Implementations that "auto" skips although they could run, and why.

    Interpreted, grouped matmul takes 0.75 to 1.0 times as long as `xla.py` and the mixture of experts 0.9 to 1.1 times,
    1.2 for a single token; a mixture with its gradients compiles in 1.2 s instead of 0.7. Neither has run on a TPU yet,
    nor Triton on a GPU.
    """
    interpreted = current_device().platform == "cpu"
    pallas = "interpreted, it takes longer to compile" if interpreted else "it has not run here yet; name it"
    return {"pallas": pallas, "triton": "it has not run on a GPU yet; name it"}


def _table(dtype: jnp.dtype | None = None) -> dict:
    def reference(*args):
        from dantinox.reference import grouped_matmul as specification

        return specification(*args)

    pallas_entry = unsupported_reason("grouped_matmul", "pallas") or (_sm90() if on_gpu() else pallas).grouped_matmul
    if dtype == jnp.float64 and not isinstance(pallas_entry, str):
        pallas_entry = "x has dtype float64 and it adds up in float32"
    return {
        "reference": reference,
        "xla": xla.grouped_matmul,
        "pallas": pallas_entry,
        "triton": unsupported_reason("grouped_matmul", "triton"),
    }
