"""Compile the Triton linear cross-entropy for the GPUs of each generation, and check what the compiler made of it.

    python -m bench.aot.gpu.triton_loss_cases [TARGET...] [--short] [--jobs N] [--write]

`triton_rows` says when a row fails. --write keeps the table in profiles/aot/.
"""

import sys
from pathlib import Path
from typing import Any

from bench.aot import hardware
from bench.aot.gpu import triton_rows
from bench.aot.gpu.triton_cases import Kernel, compile_kernels

FEATURES: dict[str, dict[str, Any]] = {
    "plain": {"M": 1024, "V": 32768},
    "soft cap, odd sizes": {"M": 1000, "V": 32001, "softcap": 30.0},
}
N = 1024
HEADS = ("dtype", "features")


def compile_loss(target: hardware.Gpu, dtype: str, features: str) -> list[Kernel]:
    """Compile the forward and the backward pass; return the kernels, a second one for a rest of the vocabulary."""
    import jax
    import jax.numpy as jnp

    from dantinox import kernels

    options = dict(FEATURES[features])
    dtype, precision = triton_rows.split_precision(dtype)
    h, w = (jax.ShapeDtypeStruct((size, options["M"]), dtype) for size in (N, options.pop("V")))
    del options["M"]

    def run(h: Any, w: Any, targets: Any, dloss: Any) -> Any:
        def losses(h: Any, w: Any) -> Any:
            return kernels.linear_cross_entropy(h, w, targets, implementation="triton", **options)

        loss, vjp = jax.vjp(losses, h, w)
        return loss, vjp(dloss)

    rows = [jax.ShapeDtypeStruct((N,), dtype) for dtype in (jnp.int32, jnp.float32)]
    with jax.default_matmul_precision(precision):
        return compile_kernels(target, run, (h, w, *rows))


# The soft cap and the masks of odd sizes take registers; in 16 bits, kernels without them have tiles of their own.
ROWS = (("bfloat16", "plain"), *((dtype, "soft cap, odd sizes") for dtype in triton_rows.DTYPES))
SUITE = triton_rows.Suite(
    "Triton linear cross-entropy",
    "bench.aot.gpu.triton_loss_cases",
    compile_loss,
    ROWS,
    ROWS[1:2],
    {"forward": 1, "logit_gradients": 1},
    Path("profiles/aot/triton_linear_cross_entropy.md"),
    f"at {N} rows, about 1024 columns and 32768 words, for two kernels: the forward pass and the logits' gradients.",
)


if __name__ == "__main__":
    sys.exit(triton_rows.main(SUITE, HEADS))
