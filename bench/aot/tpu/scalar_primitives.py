"""The primitives of `jax.lax` that a kernel's control flow uses, on NumPy arrays with one scalar per grid step."""

from collections.abc import Callable
from typing import Any

import numpy as np

Values = Any  # a NumPy scalar, or an array with a value per step
Rule = Callable[..., Values]


def _divide(a: Values, b: Values) -> Values:
    a, b = np.asarray(a), np.asarray(b)
    if a.dtype.kind not in "iu":
        return np.divide(a, b)
    b = np.where(b == 0, 1, b)
    return (np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b))).astype(a.dtype)  # towards zero


def _remainder(a: Values, b: Values) -> Values:
    return np.fmod(a, np.where(np.asarray(b) == 0, 1, b).astype(np.asarray(b).dtype))


def _select(which: Values, *cases: Values) -> Values:
    return np.choose(np.asarray(which).astype(np.intp), cases, mode="clip").astype(np.asarray(cases[0]).dtype)


def _shift_right_logical(x: Values, n: Values) -> Values:
    x = np.asarray(x)
    unsigned = np.dtype(f"u{x.dtype.itemsize}")
    return (x.astype(unsigned) >> np.asarray(n).astype(unsigned)).astype(x.dtype)


_ELEMENTWISE: dict[str, Rule] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": _divide,
    "rem": _remainder,
    "max": np.maximum,
    "min": np.minimum,
    "neg": np.negative,
    "sign": np.sign,
    "abs": np.abs,
    "floor": np.floor,
    "ceil": np.ceil,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.bitwise_not,
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "shift_left": np.left_shift,
    "shift_right_arithmetic": np.right_shift,
    "shift_right_logical": _shift_right_logical,
    "select_n": _select,
    "clamp": lambda low, x, high: np.minimum(np.maximum(x, low), high),
    "stop_gradient": lambda x: x,
    "copy": lambda x: x,
    "copy_p": lambda x: x,
    "multiple_of": lambda x: x,
}


def _ignore_params(rule: Rule) -> Rule:
    return lambda params, *operands: rule(*operands)


# Primitive -> rule(params, *operands)
SCALAR_PRIMITIVES: dict[str, Rule] = {name: _ignore_params(rule) for name, rule in _ELEMENTWISE.items()} | {
    "convert_element_type": lambda params, x: np.asarray(x).astype(params["new_dtype"]),
    "integer_pow": lambda params, x: np.power(x, params["y"]),
}
