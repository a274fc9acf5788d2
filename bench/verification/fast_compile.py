"""Compile programs that run once: XLA compiles fast and optimizes little."""

from collections.abc import Callable
from typing import Any

import jax

FAST_COMPILE_OPTIONS = (
    {"xla_backend_optimization_level": 0, "xla_cpu_parallel_codegen_split_count": 1}
    if jax.default_backend() == "cpu"
    else None
)


def jit_fast_compile(f: Callable[..., Any]) -> Callable[..., Any]:
    """Jit a function that runs once, so that compiling fast matters more than running fast."""
    return jax.jit(f, compiler_options=FAST_COMPILE_OPTIONS)
