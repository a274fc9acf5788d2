"""Compile the Triton grouped matmul and mixture of experts for the GPUs of each generation, and check the kernels.

    python -m bench.aot.gpu.triton_gmm_cases [TARGET...] [--short] [--jobs N] [--write]

`triton_rows` says when a row fails. --write keeps the table in profiles/aot/.
"""

import sys
from pathlib import Path
from typing import Any

from bench.aot import hardware
from bench.aot.gpu import triton_rows
from bench.aot.gpu.triton_cases import Kernel, compile_kernels

SIZES: dict[str, tuple[int, int, int, int]] = {  # N, M, F, E
    "plain": (4096, 1024, 2048, 8),
    "odd sizes": (1000, 1000, 1001, 5),
    "few rows": (128, 1024, 2048, 8),
}
K = 2  # experts per token
HEADS = ("operation", "dtype", "sizes")


def compile_operation(target: hardware.Gpu, op: str, dtype: str, sizes: str) -> list[Kernel]:
    """Compile the forward and the backward pass of an operation; return the kernels."""
    import jax
    import jax.numpy as jnp

    from dantinox import kernels

    N, M, F, E = SIZES[sizes]
    dtype, precision = triton_rows.split_precision(dtype)
    shapes: dict[str, tuple[int, ...]] = {"x": (N, M), "w": (E, M, F)}
    integers, options = {"group_sizes": (E,)}, {}
    if op == "moe_mlp":
        shapes = {"x": (N // K, M), "w_gate": (E, M, F), "w_up": (E, M, F), "w_down": (E, F, M)}
        shapes["expert_weights"] = (N // K, K)
        integers = {"expert_ids": (N // K, K)}
        if sizes == "odd sizes":
            shapes |= {"b_gate": (E, F), "b_up": (E, F), "b_down": (E, M)}
            options["activation"] = ("swiglu_clamped", 7.0, 1.702)

    def run(inputs: Any, ids: Any) -> Any:
        def call(inputs: Any) -> Any:
            return getattr(kernels, op)(**inputs, **ids, **options, implementation="triton")

        y, vjp = jax.vjp(call, inputs)
        return call(inputs), vjp(y)

    inputs = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}
    ids = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in integers.items()}
    with jax.default_matmul_precision(precision):
        return compile_kernels(target, run, (inputs, ids))


# The experts have all kernels of the grouped matmul, but in float16, which they compute in float32.
ROWS = (
    ("grouped_matmul", "bfloat16", "plain"),
    *(("grouped_matmul", dtype, "odd sizes") for dtype in triton_rows.DTYPES[1:]),
    *(("moe_mlp", "bfloat16", sizes) for sizes in SIZES),
    *(("moe_mlp", "float32", sizes) for sizes in ("plain", "odd sizes")),
    ("moe_mlp", "float32, highest precision", "odd sizes"),
)
SUITE = triton_rows.Suite(
    "Triton grouped matmul and mixture of experts",
    "bench.aot.gpu.triton_gmm_cases",
    compile_operation,
    ROWS,
    (("grouped_matmul", "bfloat16", "odd sizes"), ("moe_mlp", "bfloat16", "odd sizes")),
    {"gmm": 1, "tgmm": 1, "up_proj": 2, "down_proj_bwd": 1},
    Path("profiles/aot/triton_grouped_matmul.md"),
    "for the kernels gmm, tgmm, and of the mixture of experts up_proj and down_proj_bwd too, forward and backward, "
    f"at (rows, M, F, groups) of {', '.join(f'{name} {sizes}' for name, sizes in SIZES.items())}; odd sizes of experts "
    "with biases and the clamped SwiGLU.",
)


if __name__ == "__main__":
    sys.exit(triton_rows.main(SUITE, HEADS))
