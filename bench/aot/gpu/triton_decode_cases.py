"""Compile the Triton decode attention for the GPUs of each generation, and check what the compiler made of it.

    python -m bench.aot.gpu.triton_decode_cases [TARGET...] [--short] [--jobs N] [--write]

`triton_rows` says when a row fails. --write keeps the table in profiles/aot/.
"""

import sys
from pathlib import Path
from typing import Any

from bench.aot import hardware
from bench.aot.gpu import triton_rows
from bench.aot.gpu.triton_cases import Kernel, compile_kernels

FEATURES: dict[str, dict[str, Any]] = {
    "one token": {},
    "16 tokens, all": {"new_tokens": 16, "window": 1000, "softcap": 30.0, "gate": True, "sinks": True},
}
RINGS = ("as q", "int8", "float8_e4m3fn")
B, H, K, C = 2, 8, 2, 4096
HEAD_DIMS = ("64", "80", "128", "256")
HEADS = ("D", "cache", "dtype", "features")


def compile_decode(target: hardware.Gpu, D: str, cache_dtype: str, dtype: str, features: str) -> list[Kernel]:
    """Compile one step; return the kernel of the splits, and that which combines them if it is a new one."""
    import jax
    import jax.numpy as jnp

    from dantinox import kernels

    dtype, precision = triton_rows.split_precision(dtype)
    options = dict(FEATURES[features])
    T = options.pop("new_tokens", 1)
    tokens, width = (B,) if T == 1 else (B, T), int(D)
    shapes = {"q": (*tokens, H, width), "k": (*tokens, K, width), "v": (*tokens, K, width)}
    if options.pop("gate", False):
        shapes["gate"] = shapes["q"]
    inputs = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}
    if options.pop("sinks", False):
        inputs["sinks"] = jax.ShapeDtypeStruct((H,), jnp.float32)
    ring = dtype if cache_dtype == "as q" else cache_dtype
    cache = jax.eval_shape(lambda: kernels.KVCache.zeros(B, K, C, width, jnp.dtype(ring)))

    def run(inputs: Any, cache: Any) -> Any:
        return kernels.decode_attention(**inputs, cache=cache, implementation="triton", **options)

    with jax.default_matmul_precision(precision):
        return compile_kernels(target, run, (inputs, cache))


# All features take the most registers. One token has the smallest tile of rows; float16 has the tiles of bfloat16.
ALL = "16 tokens, all"
ROWS = (
    *((D, ring, "bfloat16", ALL) for D in HEAD_DIMS for ring in RINGS[::2]),
    *((D, "as q", "float32", ALL) for D in HEAD_DIMS),
    *(("80", "int8", dtype, ALL) for dtype in ("bfloat16", "float16", "float32")),
    ("128", "float8_e4m3fn", "float16", ALL),
    ("128", "float8_e4m3fn", "float32", ALL),
    ("128", "as q", "float32, highest precision", ALL),
    ("128", "as q", "bfloat16", "one token"),
)
SUITE = triton_rows.Suite(
    "Triton decode attention",
    "bench.aot.gpu.triton_decode_cases",
    compile_decode,
    ROWS,
    (("128", "as q", "bfloat16", ALL), ("256", "float8_e4m3fn", "bfloat16", ALL)),
    {"split": 2, "combine": 0},
    Path("profiles/aot/triton_decode_attention.md"),
    f"at ring buffers of {C} slots and {H} heads on {K}, for two kernels: the splits, and their combination where no "
    "row before has the same, which multiplies nothing. All features: a window, a soft cap, a gate and sinks.",
)


if __name__ == "__main__":
    sys.exit(triton_rows.main(SUITE, HEADS))
