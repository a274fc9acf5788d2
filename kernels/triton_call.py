"""The call of a Triton kernel from JAX, by jax-triton."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.custom_batching import custom_vmap, sequential_vmap

from dantinox.kernels.derivatives import first_order
from dantinox.kernels.vma import call_invariant

Array = jax.Array

# Triton writes the newest PTX that its own assembler reads. XLA assembles it with another one, which may be older: CUDA
# 12.8 reads 8.7, which has every compute capability up to 12.0 but not 10.3 and 12.1.
PTX_VERSION, PTX_VERSION_OF_MINOR_CAPABILITIES = 87, 88
# Before 8.9, Triton refuses even pointers to fp8e4nv, JAX's float8_e4m3fn, which a kernel may read as bytes.
FLOAT8_DTYPES = ("fp8e4b15", "fp8e4nv", "fp8e5")


def call_triton(
    kernel: Any,
    *arrays: Array,
    out_type: Any,
    grid: tuple[int, ...],
    capability: tuple[int, int],
    num_warps: int = 4,
    num_stages: int = 3,
    name: str,
    **constants: Any,
) -> Any:
    """Call a Triton kernel.

    Args:
        kernel: a `triton.jit` function of the inputs, its compile-time constants and the outputs.
        arrays: the inputs; references to arrays (`jax.new_ref`), which the kernel may write to, are in place.
        out_type: shapes and dtypes of the outputs, in a pytree.
        grid: programs along each axis.
        capability: compute capability of the device, (major, minor).
        num_warps: warps per program.
        num_stages: stages of the software pipeline of loops that load.
        name: name of the kernel in a profile.
        constants: the compile-time constants by parameter.
    """
    import jax_triton

    newer = capability in ((10, 3), (12, 1))
    float8 = {"supported_fp8_dtypes": FLOAT8_DTYPES} if any(x.dtype == "float8_e4m3fn" for x in arrays) else {}
    return jax_triton.triton_call(
        *arrays,
        kernel=kernel,
        out_type=out_type,
        grid=grid,
        name=name,
        compute_capability=10 * capability[0] + capability[1],
        backend_options={
            "num_warps": num_warps,
            "num_stages": num_stages,
            "ptx_version": PTX_VERSION_OF_MINOR_CAPABILITIES if newer else PTX_VERSION,
            "enable_fp_fusion": True,
            **float8,
        },
        **constants,
    )


def fold_vmap[R](f: Callable[..., R]) -> Callable[..., R]:
    """Return f, whose `vmap` puts the new axis into the first axis of every array.

    Args:
        f: a function of arrays, in any structure, whose results and arguments share their first axis.
    """
    folded = custom_vmap(f)

    @folded.def_vmap
    def fold(axis_size: int, is_batched: Any, *args: Any) -> tuple[R, Any]:
        def merge(x: Array, batched: bool) -> Array:
            x = x if batched else jax.numpy.broadcast_to(x, (axis_size, *x.shape))
            return x.reshape(axis_size * x.shape[1], *x.shape[2:])

        results = folded(*jax.tree.map(merge, args, tuple(is_batched)))
        split = jax.tree.map(lambda x: x.reshape(axis_size, x.shape[0] // axis_size, *x.shape[1:]), results)
        return split, jax.tree.map(lambda _: True, results)

    return folded


def transformable(kernel: Callable[..., Any], op: str, **static: Any) -> Callable[..., Any]:
    """Return a kernel's call that knows `shard_map`, `vmap` (one after the other) and its order of derivatives.

    Args:
        kernel: a function of arrays, in any structure, and of `static`.
        op: name of the operation.
        static: values that are no arrays, by parameter.
    """
    call = functools.partial(call_invariant, sequential_vmap(functools.partial(kernel, **static)))
    return first_order(call, op, "triton")
