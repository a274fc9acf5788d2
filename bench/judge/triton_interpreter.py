"""Run the Triton kernels of a JAX program in Triton's interpreter: needs Triton, no GPU.

The environment needs TRITON_INTERPRET=1 before triton is imported. The interpreter expects tensors in device memory;
`HostTensor` implements all that it calls on them.
"""

import contextlib
import threading
import traceback
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any
from unittest import mock

import jax
import ml_dtypes
import numpy as np

NAMES = {
    np.dtype(np.float32): "fp32",
    np.dtype(np.float16): "fp16",
    np.dtype(ml_dtypes.bfloat16): "bf16",
    np.dtype(ml_dtypes.float8_e4m3fn): "fp8e4nv",
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
    """Call a kernel as `jax_triton.triton_call` does; outputs hold NaN, or the lowest integer, before it runs.

    A kernel writes in place to references (`jax.new_ref`) and to the outputs of `input_output_aliases`.
    """
    leaves, tree = jax.tree.flatten(out_shape if out_type is None else out_type)
    shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    refs = {number: x for number, x in enumerate(args) if _is_ref(x)}
    args = tuple(x[...] if number in refs else x for number, x in enumerate(args))
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
        launch = kernel[grid(constants) if callable(grid) else grid]
        arrays_by_name = dict(zip(names, (*operands, *outputs), strict=True))
        try:
            with (
                _INTERPRETER,
                _only_memory_of({name: x for name, x in arrays_by_name.items() if isinstance(x, np.ndarray)}),
            ):
                launch(**dict(zip(names, tensors, strict=True)), **constants)
        except Exception as error:  # JAX would print it with pages of its own frames
            _failures.append(_at_line_of(kernel, error))
        return *outputs, *(operands[number] for number in refs)

    shapes_in_place = [jax.ShapeDtypeStruct(args[number].shape, args[number].dtype) for number in refs]
    arrays = [x for x, array in zip(args, is_array) if array]
    results = jax.pure_callback(on_host, (*shapes, *shapes_in_place), *arrays)
    for ref, result in zip(refs.values(), results[len(shapes) :], strict=True):
        ref[...] = result
    return jax.tree.unflatten(tree, results[: len(shapes)])


def _is_ref(x: Any) -> bool:
    return isinstance(x, jax.Ref)


def _garbage(dtype: Any) -> Any:
    dtype = np.dtype(dtype)
    return np.iinfo(dtype).min if dtype.kind == "i" else 0 if dtype.kind in "ub" else np.nan


_INTERPRETER = threading.Lock()  # it has one state for all threads, and each device of a program has its own
_failures: list[Exception] = []  # of the kernels that `run` runs


def _at_line_of(kernel: Any, error: Exception) -> Exception:
    """Return the error that a kernel met, with a traceback that ends at a line of the kernel's file."""
    cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
    frames = list(traceback.walk_tb(cause.__traceback__))
    file = kernel.fn.__code__.co_filename
    for frame, line in reversed(frames):
        if frame.f_code.co_filename == file:
            return cause.with_traceback(TracebackType(None, frame, frame.f_lasti, line))
    return cause


@contextlib.contextmanager
def _only_memory_of(arrays: dict[str, np.ndarray]) -> Iterator[None]:
    """Raise IndexError where a kernel touches memory that is not one of its arrays: else this process may crash."""
    from triton.runtime.interpreter import InterpreterBuilder

    spans = sorted((x.ctypes.data, x.ctypes.data + x.nbytes, name) for name, x in arrays.items() if x.size)
    starts, ends = (np.array([span[i] for span in spans], np.uint64) for i in (0, 1))

    def check(action: str, pointers: Any, mask: Any) -> None:
        address = np.asarray(pointers.data)
        touched = address[np.broadcast_to(mask.data, address.shape).astype(bool)].astype(np.uint64)
        index = np.searchsorted(starts, touched, side="right").astype(np.int64) - 1
        outside = (index < 0) | (touched >= ends[index])
        if outside.any():
            where = touched[outside][0]
            nearest = min(spans, key=lambda span: max(span[0] - int(where), int(where) - span[1]))
            raise IndexError(
                f"it {action} {outside.sum()} of {touched.size} elements outside of its arrays: a mask is too wide, or "
                f"an index is wrong; the nearest array is {nearest[2]}"
            )

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        check("loads", pointers, mask)
        return load(self, pointers, mask, *rest)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check("stores", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    with (
        mock.patch.object(InterpreterBuilder, "create_masked_load", checked_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", checked_store),
    ):
        yield


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


def _integer_to_float(self: Any, x: Any, dtype: Any) -> Any:
    """Convert integers: the interpreter's own `create_si_to_fp` takes the integers for the bits of bfloat16."""
    import triton.language as tl

    if dtype.scalar != tl.bfloat16:
        return self.cast_impl(x, dtype)
    return self.cast_impl(self.cast_impl(x, tl.float32), dtype)


def run(f: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Return f(*args) as NumPy arrays, with its Triton kernels interpreted."""
    import jax_triton
    from triton.runtime import interpreter

    with (
        mock.patch.object(jax_triton, "triton_call", triton_call),
        mock.patch.object(interpreter.InterpreterBuilder, "create_dot", _dot),
        mock.patch.object(interpreter.InterpreterBuilder, "create_si_to_fp", _integer_to_float),
    ):
        _failures.clear()
        results = jax.block_until_ready(jax.jit(lambda *args: f(*args))(*args))
        if _failures:
            raise _failures[0]
        return jax.tree.map(np.asarray, results)
