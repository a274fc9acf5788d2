"""Evaluate the integer instructions of PTX, for all threads of a warpgroup at once.

A value is an int where all threads have the same, an array of int64 with one element per thread where they differ, or
None where it is not known: everything that comes from floating point or from loads of data. Values are unsigned, except
for arrays of 64-bit values.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

Value = Any  # int, numpy array or None
WARP = 32


def width_of(kind: str) -> int:
    """Bits of a type: `s32` has 32, `pred` 1."""
    return 1 if kind == "pred" else int(kind.lstrip("bsuf").split("x")[0] or 0)


def as_signed(value: Value, width: int) -> Value:
    """Read an unsigned value as a signed one."""
    if isinstance(value, np.ndarray):
        return value if width == 64 else value - ((value >> (width - 1)) << width)
    return value - ((value >> (width - 1)) << width)


def wrap(value: Value, width: int) -> Value:
    """Take a result modulo 2 ** width."""
    if isinstance(value, np.ndarray):
        return value.astype(np.int64) if width == 64 else value.astype(np.int64) & ((1 << width) - 1)
    return int(value) & ((1 << width) - 1)


def choose(condition: Value, a: Value, b: Value) -> Value:
    """Return a where the condition holds, else b."""
    if condition is None or (isinstance(condition, np.ndarray) and (a is None or b is None)):
        return None
    if isinstance(condition, np.ndarray):
        return np.where(condition != 0, a, b)
    return a if condition else b


def _divide(a: Value, b: Value) -> Value:
    quotient = abs(a) // abs(b)
    return quotient * np.sign(a) * np.sign(b) if isinstance(quotient, np.ndarray) else quotient * _sign(a) * _sign(b)


def _sign(x: int) -> int:
    return 1 if x >= 0 else -1


def _minimum(a: Value, b: Value) -> Value:
    return np.minimum(a, b) if isinstance(a, np.ndarray) or isinstance(b, np.ndarray) else min(a, b)


def _maximum(a: Value, b: Value) -> Value:
    return np.maximum(a, b) if isinstance(a, np.ndarray) or isinstance(b, np.ndarray) else max(a, b)


_BINARY: dict[str, Callable[[Value, Value], Value]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "min": _minimum,
    "max": _maximum,
    "div": _divide,
    "rem": lambda a, b: a - b * _divide(a, b),
}
_COMPARE: dict[str, Callable[[Value, Value], Value]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}


def operation(opcode: str) -> Callable[..., Value] | None:
    """Return a function of the sources of an instruction that gives its result, or None where it is not known."""
    name, *modifiers = opcode.split(".")
    kinds = [part for part in modifiers if part == "pred" or (part[0] in "bsuf" and part[1:].split("x")[0].isdigit())]
    if any(kind.startswith(("f", "bf")) for kind in kinds):
        return None
    if name in ("mov", "cvta"):
        return lambda *sources: sources[0]
    if not kinds:
        return None
    width, signed = width_of(kinds[-1]), kinds[-1][0] == "s"
    evaluate = _integer(name, modifiers, kinds, width, signed)
    if evaluate is None:
        return None

    def result(*sources: Value) -> Value:
        if name != "selp" and any(source is None for source in sources):
            decided = {"and": 0, "or": 1}.get(name)  # whatever the other one is
            return decided if width == 1 and any(x is decided for x in sources) else None
        return evaluate(*sources)

    return result


def _integer(
    name: str, modifiers: list[str], kinds: list[str], width: int, signed: bool
) -> Callable[..., Value] | None:
    def read(value: Value) -> Value:
        if isinstance(value, int) and value < 0:  # a literal
            value = wrap(value, width)
        return as_signed(value, width) if signed else value

    if name == "selp":
        return lambda a, b, condition: choose(condition, a, b)
    if name == "setp":
        compare = _COMPARE.get(modifiers[0])
        if compare is None or len(modifiers) != 2:
            return None
        return lambda a, b: wrap(compare(read(a), read(b)), 1)
    if name in _BINARY:
        binary, relu = _BINARY[name], "relu" in modifiers

        def run(a: Value, b: Value) -> Value:
            if name in ("div", "rem") and np.any(np.equal(b, 0)):
                return None
            value = binary(read(a), read(b))
            return wrap(_maximum(value, 0) if relu else value, width)

        return run
    if name in ("mul", "mad"):
        to, shift = (2 * width if "wide" in modifiers else width), (width if "hi" in modifiers else 0)
        return lambda a, b, c=0: wrap(((read(a) * read(b)) >> shift) + c, to)
    if name == "shl":
        return lambda a, b: wrap(a << _minimum(b, 63), width)
    if name == "shr":
        return lambda a, b: wrap(read(a) >> _minimum(b, 63), width)
    if name == "not":
        return lambda a: wrap(~a, width)
    if name == "neg":
        return lambda a: wrap(-read(a), width)
    if name == "abs":
        return lambda a: wrap(abs(read(a)), width)
    if name == "bfe" and not signed:
        return lambda a, start, size: (a >> start) & ((1 << size) - 1)
    if name == "cvt" and len(kinds) == 2:
        return lambda a: wrap(read(a), width_of(kinds[0]))
    return None


def shuffle(mode: str, value: Value, lane: Value) -> Value:
    """Return what each thread of a warp reads from another one."""
    if value is None or isinstance(value, int):
        return value
    warps = value.reshape(-1, WARP)
    if mode == "idx" and isinstance(lane, int):
        values = np.repeat(warps[:, lane % WARP], WARP)
        return int(values[0]) if (values == values[0]).all() else values
    if mode == "bfly" and isinstance(lane, int):
        return warps[:, np.arange(WARP) ^ lane].reshape(-1)
    return None
