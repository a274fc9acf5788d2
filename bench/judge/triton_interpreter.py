"""Run the Triton kernels of a JAX program in Triton's interpreter: needs Triton, no GPU.

The environment needs TRITON_INTERPRET=1 before triton is imported. The interpreter expects tensors in device memory;
`HostTensor` implements all that it calls on them.
"""

from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import ml_dtypes
import numpy as np

NAMES = {
    np.dtype(np.float32): "fp32",
    np.dtype(np.float16): "fp16",
    np.dtype(ml_dtypes.bfloat16): "bf16",
    np.dtype(np.int32): "i32",
    np.dtype(np.int64): "i64",
    np.dtype(np.int8): "i8",
    np.dtype(np.uint8): "u8",
    np.dtype(np.bool_): "i1",
}


class HostTensor:
    """A NumPy array with the tensor methods that the interpreter calls: it is its own storage and its own copy."""

    def __init__(self, array: np.ndarray | None) -> None:
        self.array = array

    @property
    def dtype(self) -> str:
        """Triton's name of the dtype."""
        assert self.array is not None
        return NAMES[self.array.dtype]

    def data_ptr(self) -> int:
        """Return the address of the first element."""
        assert self.array is not None
        return self.array.ctypes.data

    def untyped_storage(self) -> "HostTensor":
        """Return the storage: the tensor itself."""
        return self

    def cpu(self) -> "HostTensor":
        """Return the copy on the host: the tensor itself."""
        return self

    def new_empty(self, *_: Any, **__: Any) -> "HostTensor":
        """Return a tensor that `set_` fills."""
        return HostTensor(None)

    def set_(self, storage: "HostTensor", *_: Any) -> None:
        """Take the array of a storage."""
        self.array = storage.array

    def copy_(self, _: "HostTensor") -> None:
        """Copy nothing: the array is shared."""

    def storage_offset(self) -> int:
        """Return 0: each tensor has an array of its own."""
        return 0

    def size(self) -> tuple[int, ...]:
        """Return the shape."""
        assert self.array is not None
        return self.array.shape

    stride = size


def triton_call(
    *args: Any,
    kernel: Any,
    grid: Any,
    out_type: Any = None,
    out_shape: Any = None,
    input_output_aliases: dict[int, int] | None = None,
    zeroed_outputs: Any = (),
    num_warps: int | None = None,
    num_stages: int | None = None,
    num_ctas: int | None = None,
    compute_capability: int | None = None,
    backend_options: Any = None,
    name: str = "",
    **constants: Any,
) -> Any:
    """Call a kernel as `jax_triton.triton_call` does; outputs hold NaN, or the lowest integer, before it runs."""
    leaves, tree = jax.tree.flatten(out_type if out_shape is None else out_shape)
    shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    is_array = [hasattr(x, "shape") for x in args]
    aliases = {out: arg for arg, out in (input_output_aliases or {}).items()}
    zeroed = zeroed_outputs(constants) if callable(zeroed_outputs) else zeroed_outputs

    def on_host(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        given = iter(arrays)
        operands = [np.array(next(given)) if array else x for x, array in zip(args, is_array)]
        outputs = []
        for number, shape in enumerate(shapes):
            if number in aliases:
                outputs.append(operands[aliases[number]])
            else:
                empty = 0 if number in zeroed else _garbage(shape.dtype)
                outputs.append(np.full(shape.shape, empty, shape.dtype))
        tensors = [HostTensor(x) if isinstance(x, np.ndarray) else x for x in (*operands, *outputs)]
        names = [name for name in kernel.arg_names if name not in constants]
        kernel[grid(constants) if callable(grid) else grid](**dict(zip(names, tensors, strict=True)), **constants)
        return tuple(outputs)

    results = jax.pure_callback(on_host, tuple(shapes), *(x for x, array in zip(args, is_array) if array))
    return jax.tree.unflatten(tree, results)


def _garbage(dtype: Any) -> Any:
    dtype = np.dtype(dtype)
    return np.iinfo(dtype).min if dtype.kind == "i" else 0 if dtype.kind in "ub" else np.nan


def _dot(self: Any, a: Any, b: Any, c: Any, *_: Any) -> Any:
    """Multiply tiles: the interpreter's own `create_dot` multiplies the bits of bfloat16 as integers."""
    import triton.language as tl
    from triton.runtime import interpreter

    def widen(x: Any) -> np.ndarray:
        if x.dtype.scalar != tl.bfloat16:
            return x.data
        return interpreter._convert_float(x.data, x.dtype, tl.float32, None).view(np.float32)

    product = np.matmul(widen(a), widen(b), dtype=c.data.dtype)
    return interpreter.TensorHandle(product + c.data, c.dtype.scalar)


def run(f: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Return f(*args) as NumPy arrays, with its Triton kernels interpreted."""
    import jax_triton
    from triton.runtime import interpreter

    with (
        mock.patch.object(jax_triton, "triton_call", triton_call),
        mock.patch.object(interpreter.InterpreterBuilder, "create_dot", _dot),
    ):
        return jax.tree.map(np.asarray, jax.block_until_ready(jax.jit(lambda *args: f(*args))(*args)))
