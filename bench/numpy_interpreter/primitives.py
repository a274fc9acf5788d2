"""The primitives of `jax.lax` in NumPy. Operands have their final dtypes already, so NumPy never promotes."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np

Array = np.ndarray
_tpu_kernels: list[bool] = []  # whether the kernels whose program is being read are for a TPU
_exact_products: list[bool] = [False]


def in_kernel() -> bool:
    """Whether the program that is being read is a kernel."""
    return bool(_tpu_kernels)


def in_tpu_kernel() -> bool:
    """Whether the program that is being read is a kernel of a TPU."""
    return bool(_tpu_kernels) and _tpu_kernels[-1]


@contextlib.contextmanager
def reading_kernel(*, tpu: bool) -> Iterator[None]:
    """Programs read in this context are kernels."""
    _tpu_kernels.append(tpu)
    try:
        yield
    finally:
        _tpu_kernels.pop()


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Programs read in this context multiply float32 in float32: faster than the passes of a TPU's matrix unit."""
    _exact_products.append(True)
    try:
        yield
    finally:
        _exact_products.pop()


def _wide(f: Callable[..., Any]) -> Callable[..., Any]:
    """F in float32 at least, rounded back."""

    def call(x: Array) -> Array:
        x = np.asarray(x)
        return f(x.astype(np.float32)).astype(x.dtype) if x.dtype.itemsize < 4 else f(x).astype(x.dtype)

    return call


def _div(a: Array, b: Array) -> Array:
    a, b = np.asarray(a), np.asarray(b)
    if a.dtype.kind in "iu":  # towards zero
        return (np.sign(a) * np.sign(b) * (np.abs(a) // np.maximum(np.abs(b), 1))).astype(a.dtype)
    return np.divide(a, b).astype(a.dtype)


def _sigmoid(x: Array) -> Array:
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + e), e / (1 + e))


def _shift_right(x: Array, n: Array) -> Array:
    x = np.asarray(x)
    return (x.view(f"u{x.dtype.itemsize}") >> n.astype(f"u{x.dtype.itemsize}")).view(x.dtype)


ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "add_any": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": _div,
    "rem": np.fmod,
    "max": np.maximum,
    "min": np.minimum,
    "neg": np.negative,
    "sign": np.sign,
    "abs": np.abs,
    "floor": np.floor,
    "ceil": np.ceil,
    "square": np.square,
    "round": np.rint,
    "one_minus_square": lambda x: (1 - x * x).astype(x.dtype),
    "sin": _wide(np.sin),
    "cos": _wide(np.cos),
    "exp": _wide(np.exp),
    "exp2": _wide(np.exp2),
    "log": _wide(np.log),
    "log1p": _wide(np.log1p),
    "expm1": _wide(np.expm1),
    "tanh": _wide(np.tanh),
    "logistic": _wide(_sigmoid),
    "sqrt": _wide(np.sqrt),
    "rsqrt": _wide(lambda x: 1 / np.sqrt(x)),
    "is_finite": np.isfinite,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "not": lambda a: ~np.asarray(a),
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq_to": np.equal,  # total orders: of numbers that are not NaN the same
    "lt_to": np.less,
    "le_to": np.less_equal,
    "shift_left": np.left_shift,
    "shift_right_arithmetic": np.right_shift,
    "shift_right_logical": _shift_right,
    "clamp": lambda low, x, high: np.minimum(np.maximum(x, low), high),
    "stop_gradient": lambda x: x,
    "copy": lambda x: x,
    "copy_p": lambda x: x,
    "multiple_of": lambda x: x,
    "optimization_barrier": lambda *xs: list(xs),
}


def _select_n(params: Any, ins: Any, outs: Any) -> Callable[..., Any]:
    def select(which: Array, *cases: Array) -> Array:
        if len(cases) == 2:
            return np.where(which, cases[1], cases[0])
        return np.choose(which, cases, mode="clip")

    return select


def _broadcast(params: Any, ins: Any, outs: Any) -> Callable[..., Any]:
    shape, dims = params["shape"], params["broadcast_dimensions"]

    def broadcast(x: Array, *sizes: Any) -> Array:
        grown = [1] * len(shape)
        for d, n in zip(dims, np.shape(x)):
            grown[d] = n
        return np.broadcast_to(np.reshape(x, grown), shape)

    return broadcast


def _pad(params: Any, ins: Any, outs: Any) -> Callable[..., Any]:
    config, shape = params["padding_config"], outs[0].aval.shape

    def pad(x: Array, value: Array) -> Array:
        out = np.full(shape, value, x.dtype)
        src, dst = [], []
        for (low, _, inside), n, m in zip(config, x.shape, shape):
            step = inside + 1
            first = max(0, -(low // step))  # of x, not cut off
            last = min(n - 1, (m - 1 - low) // step)
            if last < first:
                return out
            src.append(slice(first, last + 1))
            dst.append(slice(low + first * step, low + last * step + 1, step))
        out[tuple(dst)] = x[tuple(src)]
        return out

    return pad


def _reduce(f: Callable[..., Any]) -> Callable[..., Callable[..., Any]]:
    def make(params: Any, ins: Any, outs: Any) -> Callable[..., Any]:
        axes, dtype = tuple(params["axes"]), outs[0].aval.dtype

        def reduce(x: Array) -> Array:
            if not axes:
                return x
            wide = x.astype(np.float32) if dtype.kind not in "iub" and dtype.itemsize < 4 else x
            empty = 0 in (x.shape[a] for a in axes)
            if empty and f in (np.max, np.min):
                limit = np.inf if dtype.kind not in "iu" else np.iinfo(dtype).max
                return np.full(outs[0].aval.shape, -limit if f is np.max else limit).astype(dtype)
            return np.asarray(f(wide, axis=axes)).astype(dtype)

        return reduce

    return make


def _cumulate(f: Any) -> Callable[..., Callable[..., Any]]:
    def make(params: Any, ins: Any, outs: Any) -> Callable[..., Any]:
        axis, turn = params["axis"], params["reverse"]

        def cumulate(x: Array) -> Array:
            x = np.flip(x, axis) if turn else x
            y = f.accumulate(x, axis).astype(x.dtype)
            return np.flip(y, axis) if turn else y

        return cumulate

    return make


def _arg(f: Callable[..., Any]) -> Callable[..., Callable[..., Any]]:
    return lambda params, ins, outs: lambda x: f(x, axis=params["axes"][0]).astype(params["index_dtype"])


def _dot_general(params: Any, ins: Any, outs: Any) -> Callable[..., Any]:
    (ca, cb), (ba, bb) = params["dimension_numbers"]
    shape, dtype = outs[0].aval.shape, outs[0].aval.dtype

    def product(a: Array, b: Array) -> Array:
        if a.dtype.kind not in "iu" and a.dtype.itemsize < 4:
            a = a.astype(np.float32)
        if b.dtype.kind not in "iu" and b.dtype.itemsize < 4:
            b = b.astype(np.float32)
        free = lambda x, *used: [d for d in range(x.ndim) if d not in sum(map(tuple, used), ())]
        heads, fa, fb = [a.shape[d] for d in ba], free(a, ca, ba), free(b, cb, bb)
        inner = int(np.prod([a.shape[d] for d in ca]))
        size = lambda x, dims: int(np.prod([x.shape[d] for d in dims]))
        a3 = a.transpose(*ba, *fa, *ca).reshape(*heads, size(a, fa), inner)
        b3 = b.transpose(*bb, *cb, *fb).reshape(*heads, inner, size(b, fb))
        return multiply(a3, b3).reshape(shape).astype(dtype)

    float32_in_kernel = in_tpu_kernel() and not _exact_products[-1] and all(v.aval.dtype == np.float32 for v in ins)
    multiply = _mxu_product(params["precision"]) if float32_in_kernel else np.matmul
    return product


def _mxu_product(precision: Any) -> Callable[[Array, Array], Array]:
    """A TPU's product of float32: its matrix unit multiplies bfloat16, once, or three or six times with the parts."""
    name = getattr(precision[0] if isinstance(precision, tuple) else precision, "name", "DEFAULT")
    num_parts = {"DEFAULT": 1, "HIGH": 2, "HIGHEST": 3}[name]

    def parts(x: Array) -> list[Array]:
        found, rest = [], x
        for _ in range(num_parts):
            found.append(rest.astype(ml_dtypes.bfloat16).astype(np.float32))
            rest = np.where(np.isfinite(found[-1]), rest - found[-1], 0)
        return found

    def multiply(a: Array, b: Array) -> Array:
        pairs = [(i, j) for i in range(num_parts) for j in range(num_parts) if i + j < num_parts]
        a_parts, b_parts = parts(a), parts(b)
        return sum(np.matmul(a_parts[i], b_parts[j]) for i, j in reversed(pairs))

    return multiply


def _sort(params: Any, ins: Any, outs: Any) -> Callable[..., Any]:
    axis, keys = params["dimension"], params["num_keys"]

    def sort(*xs: Array) -> list[Array]:
        order = np.lexsort([x for x in reversed(xs[:keys])], axis=axis)
        return [np.take_along_axis(x, order, axis) for x in xs]

    return sort


def _dynamic_slice(params: Any, ins: Any, outs: Any) -> Callable[..., Any]:
    sizes = params["slice_sizes"]
    return lambda x, *at: x[_window(x, at, sizes)]


def _dynamic_update_slice(params: Any, ins: Any, outs: Any) -> Callable[..., Any]:
    def update(x: Array, y: Array, *at: Any) -> Array:
        out = np.array(x)
        out[_window(x, at, y.shape)] = y
        return out

    return update


def _window(x: Array, at: Any, sizes: Any) -> tuple[slice, ...]:
    starts = [min(max(int(i), 0), n - size) for i, n, size in zip(at, x.shape, sizes)]
    return tuple(slice(i, i + size) for i, size in zip(starts, sizes))


def _iota(params: Any, ins: Any, outs: Any) -> Callable[..., Any]:
    shape, axis = params["shape"], params["dimension"]
    line = np.arange(shape[axis]).astype(params["dtype"])
    grown = [-1 if d == axis else 1 for d in range(len(shape))]
    return lambda *sizes: np.broadcast_to(line.reshape(grown), shape)


def _top_k(params: Any, ins: Any, outs: Any) -> Callable[..., Any]:
    def top_k(x: Array) -> list[Array]:
        order = np.argsort(-x, axis=-1, kind="stable")[..., : params["k"]]
        return [np.take_along_axis(x, order, -1), order.astype(np.int32)]

    return top_k


def _slice(params: Any, ins: Any, outs: Any) -> Callable[..., Any]:
    strides = params["strides"] or (1,) * len(params["start_indices"])
    at = tuple(map(slice, params["start_indices"], params["limit_indices"], strides))
    return lambda x: x[at]


def _reduce_precision(params: Any, ins: Any, outs: Any) -> Callable[..., Any]:
    if params["exponent_bits"] != 8:
        raise NotImplementedError(f"reduce_precision to {params['exponent_bits']} bits of exponent")
    shift = params["mantissa_bits"] + 1

    def reduce_precision(x: Array) -> Array:
        mantissa, exponent = np.frexp(x)
        return np.ldexp(np.rint(np.ldexp(mantissa, shift)), exponent - shift).astype(np.asarray(x).dtype)

    return reduce_precision


def _empty(params: Any, ins: Any, outs: Any) -> Callable[..., Any]:
    return lambda *_: np.zeros(outs[0].aval.shape, outs[0].aval.dtype)


def _unstack(params: Any, ins: Any, outs: Any) -> Callable[..., Any]:
    return lambda x: list(np.moveaxis(x, params["axis"], 0))


def _split(params: Any, ins: Any, outs: Any) -> Callable[..., Any]:
    return lambda x: np.split(x, np.cumsum(params["sizes"])[:-1], params["axis"])


# Primitive -> (params, variables of the operands, of the results) -> function.
SHAPED: dict[str, Callable[..., Callable[..., Any]]] = {
    "select_n": _select_n,
    "broadcast_in_dim": _broadcast,
    "reshape": lambda params, ins, outs: lambda x, *_: np.reshape(x, outs[0].aval.shape),
    "squeeze": lambda params, ins, outs: lambda x: np.reshape(x, outs[0].aval.shape),
    "expand_dims": lambda params, ins, outs: lambda x: np.reshape(x, outs[0].aval.shape),
    "transpose": lambda params, ins, outs: lambda x: np.transpose(x, params["permutation"]),
    "rev": lambda params, ins, outs: lambda x: np.flip(x, params["dimensions"]),
    "slice": _slice,
    "concatenate": lambda params, ins, outs: lambda *xs: np.concatenate(xs, params["dimension"]),
    "split": _split,
    "unstack": _unstack,
    "stack": lambda params, ins, outs: lambda *xs: np.stack(xs, params["axis"]),
    "pad": _pad,
    "iota": _iota,
    "empty": _empty,
    "empty2": _empty,
    "reduce_precision": _reduce_precision,
    "convert_element_type": lambda params, ins, outs: lambda x: np.asarray(x).astype(params["new_dtype"]),
    "bitcast_convert_type": lambda params, ins, outs: lambda x: np.asarray(x).view(params["new_dtype"]),
    "integer_pow": lambda params, ins, outs: lambda x: np.power(x, params["y"]).astype(np.asarray(x).dtype),
    "reduce_sum": _reduce(np.sum),
    "reduce_prod": _reduce(np.prod),
    "reduce_max": _reduce(np.max),
    "reduce_min": _reduce(np.min),
    "reduce_or": _reduce(np.any),
    "reduce_and": _reduce(np.all),
    "argmax": _arg(np.argmax),
    "argmin": _arg(np.argmin),
    "cumsum": _cumulate(np.add),
    "cummax": _cumulate(np.maximum),
    "cummin": _cumulate(np.minimum),
    "dot_general": _dot_general,
    "sort": _sort,
    "top_k": _top_k,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
}
