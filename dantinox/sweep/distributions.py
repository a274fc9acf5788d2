"""The parameters of a sweep: their values, or how they are drawn, as W&B's files name them."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from statistics import NormalDist
from typing import Any

from dantinox.config import ConfigError
from dantinox.config.validation import check, did_you_mean

DIGITS = 4  # of a drawn number: it stands in the name of a folder
Quantile = Callable[[float], float]


@dataclass(frozen=True)
class Parameter:
    """One setting of a sweep.

    Attributes:
        draw: u in [0, 1) -> a value; u evenly spread gives the distribution.
        values: all that it can be, in order; None where that is a continuum.
        ends: values that must be possible if the file is right: all of them, or the bounds.
    """

    name: str
    draw: Callable[[float], Any]
    values: tuple[Any, ...] | None
    ends: tuple[Any, ...]

    @classmethod
    def read(cls, name: str, about: Any) -> "Parameter":
        """What stands below a parameter's name.

        Raises:
            ConfigError: a key or a number is wrong; the message does not name the parameter.
        """
        check(isinstance(about, dict), f"is {about!r}; allowed: value, values, or min and max")
        kind = about["distribution"] if "distribution" in about else _usual(about)
        check(isinstance(kind, str) and kind in KEYS, f"distribution is {kind!r}; {did_you_mean(kind, KEYS)}")
        needed, other = KEYS[kind]
        for key in about:
            allowed = {"distribution", *needed, *other}
            check(key in allowed, f"unknown key {key!r} beside {kind}; {did_you_mean(key, allowed)}")
        for key in needed:
            check(key in about, f"{key} is missing; distribution {kind} needs it")
        if kind in ("constant", "categorical", "categorical_w_probabilities"):
            values = [about["value"]] if kind == "constant" else about["values"]
            return cls._of(name, _listed(values), about.get("probabilities"))
        if kind == "int_uniform":
            low, high = (_number(about, key) for key in ("min", "max"))
            check(type(low) is int and type(high) is int, f"min is {low} and max is {high}; allowed: integers")
            _ordered(low, high)
            draw = lambda u: low + int(u * (high - low + 1))
            values = tuple(range(low, high + 1)) if high - low < 10_000 else None
            return cls(name, draw, values, (low, high))
        return cls._continuous(name, kind, about)

    @classmethod
    def _of(cls, name: str, values: tuple[Any, ...], weights: Any) -> "Parameter":
        if weights is None:
            weights = [1] * len(values)
        wrong = not isinstance(weights, list) or len(weights) != len(values) or not all(map(_is_number, weights))
        check(not wrong, f"probabilities are {weights!r}; allowed: a number for each of {len(values)} values")
        check(min(weights) >= 0 and sum(weights) > 0, f"probabilities are {weights!r}; allowed: 0 or more, not all 0")
        sums = list(accumulate(weights))

        def draw(u: float) -> Any:
            return next(value for value, top in zip(values, sums) if u * sums[-1] < top)

        return cls(name, draw, values, values)

    @classmethod
    def _continuous(cls, name: str, kind: str, about: Mapping[str, Any]) -> "Parameter":
        step = _number(about, "q", 1) if kind.startswith("q_") else None
        check(step is None or step > 0, f"q is {step}; allowed: more than 0")
        quantile, ends = _quantile(kind.removeprefix("q_"), about)

        def rounded(x: float) -> float:
            if step is not None:
                return round(x / step) * step if isinstance(step, int) else float(f"{round(x / step) * step:.10g}")
            x = float(f"{x:.{DIGITS}g}")
            return min(max(x, ends[0]), ends[1]) if ends else x

        return cls(name, lambda u: rounded(quantile(u)), None, tuple(map(rounded, ends)))


def _quantile(kind: str, about: Mapping[str, Any]) -> tuple[Quantile, tuple[float, ...]]:
    """(inverse of the cumulated distribution, its bounds if it has any)."""
    if kind in ("normal", "log_normal"):
        mu, sigma = _number(about, "mu", 0.0), _number(about, "sigma", 1.0)
        check(sigma > 0, f"sigma is {sigma}; allowed: more than 0")
        normal = NormalDist(mu, sigma).inv_cdf
        inside = lambda u: normal(min(max(u, 1e-12), 1 - 1e-12))  # a draw can be 0
        return (inside if kind == "normal" else lambda u: math.exp(inside(u))), ()
    low, high = (_number(about, key) for key in ("min", "max"))
    _ordered(low, high)
    if kind == "uniform":
        return lambda u: low + u * (high - low), (low, high)
    check(low > 0, f"min is {low}; distribution log_uniform_values needs more than 0")
    return lambda u: math.exp(math.log(low) + u * (math.log(high) - math.log(low))), (low, high)


# Distribution -> (keys that it needs, keys that it may have). W&B's log_uniform, of exponents of e, is not among them:
# its own checks advise against it.
_BOUNDS, _BELL = (("min", "max"), ()), ((), ("mu", "sigma"))
KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "constant": (("value",), ()),
    "categorical": (("values",), ()),
    "categorical_w_probabilities": (("values", "probabilities"), ()),
    "int_uniform": _BOUNDS,
    "uniform": _BOUNDS,
    "log_uniform_values": _BOUNDS,
    "normal": _BELL,
    "log_normal": _BELL,
}
_CONTINUOUS = ("uniform", "log_uniform_values", "normal", "log_normal")
KEYS |= {f"q_{kind}": (KEYS[kind][0], (*KEYS[kind][1], "q")) for kind in _CONTINUOUS}


def _usual(about: Mapping[str, Any]) -> str:
    """The distribution that is meant where none is named."""
    if "value" in about:
        return "constant"
    if "values" in about:
        return "categorical_w_probabilities" if "probabilities" in about else "categorical"
    if not {"min", "max"} <= about.keys():
        raise ConfigError(f"has {', '.join(map(str, about)) or 'nothing'}; allowed: value, values, or min and max")
    return "int_uniform" if type(about["min"]) is int and type(about["max"]) is int else "uniform"


def _listed(values: Any) -> tuple[Any, ...]:
    check(isinstance(values, list) and len(values) > 0, f"values are {values!r}; allowed: a list of one or more")
    for value in values:
        plain = value is None or isinstance(value, bool | int | float | str)
        check(plain, f"value {value!r} is none that a flag can have")
        check(not isinstance(value, float) or math.isfinite(value), f"value {value} is not finite")
    return tuple(values)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _number(about: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = about.get(key, default)
    hint = " (YAML takes 1e-4 for text; 1.0e-4 is a number)" if isinstance(value, str) else ""
    check(_is_number(value), f"{key} is {value!r}; allowed: a number{hint}")
    return value


def _ordered(low: float, high: float) -> None:
    check(low < high, f"min is {low} and max is {high}; allowed: min below max")
