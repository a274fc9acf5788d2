"""Parameters of a sweep: their values or distributions, with the names of W&B."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from statistics import NormalDist
from typing import Any

from dantinox.config import ConfigError
from dantinox.config.validation import check, did_you_mean

DIGITS = 4  # significant digits of drawn numbers, which are part of folder names
Quantile = Callable[[float], float]


@dataclass(frozen=True)
class Parameter:
    """One setting of a sweep.

    Attributes:
        draw: maps u in [0, 1) to a value; uniform u give the distribution.
        values: all values in order; None for a continuous distribution.
        ends: values that must be valid settings: all values, or the bounds of the distribution.
    """

    name: str
    draw: Callable[[float], Any]
    values: tuple[Any, ...] | None
    ends: tuple[Any, ...]

    @classmethod
    def parse(cls, name: str, specification: Any) -> "Parameter":
        """Parse the specification of a parameter in a sweep file.

        Raises:
            ConfigError: a key or a number is invalid; the message does not name the parameter.
        """
        check(isinstance(specification, dict), f"is {specification!r}; allowed: value, values, or min and max")
        kind = (
            specification["distribution"] if "distribution" in specification else _default_distribution(specification)
        )
        check(isinstance(kind, str) and kind in KEYS, f"distribution is {kind!r}; {did_you_mean(kind, KEYS)}")
        required, optional = KEYS[kind]
        for key in specification:
            allowed = {"distribution", *required, *optional}
            check(key in allowed, f"unknown key {key!r} beside {kind}; {did_you_mean(key, allowed)}")
        for key in required:
            check(key in specification, f"{key} is missing; distribution {kind} needs it")
        if kind in ("constant", "categorical", "categorical_w_probabilities"):
            values = [specification["value"]] if kind == "constant" else specification["values"]
            return cls._categorical(name, _check_values(values), specification.get("probabilities"))
        if kind == "int_uniform":
            low, high = (_number(specification, key) for key in ("min", "max"))
            check(type(low) is int and type(high) is int, f"min is {low} and max is {high}; allowed: integers")
            _check_order(low, high)
            values = tuple(range(low, high + 1)) if high - low < 10_000 else None
            return cls(name, lambda u: low + int(u * (high - low + 1)), values, (low, high))
        return cls._continuous(name, kind, specification)

    @classmethod
    def _categorical(cls, name: str, values: tuple[Any, ...], weights: Any) -> "Parameter":
        if weights is None:
            weights = [1] * len(values)
        is_invalid = not isinstance(weights, list) or len(weights) != len(values) or not all(map(_is_number, weights))
        check(not is_invalid, f"probabilities are {weights!r}; allowed: a number for each of {len(values)} values")
        check(min(weights) >= 0 and sum(weights) > 0, f"probabilities are {weights!r}; allowed: 0 or more, not all 0")
        sums = list(accumulate(weights))

        def draw(u: float) -> Any:
            return next(value for value, top in zip(values, sums) if u * sums[-1] < top)

        return cls(name, draw, values, values)

    @classmethod
    def _continuous(cls, name: str, kind: str, specification: Mapping[str, Any]) -> "Parameter":
        step = _number(specification, "q", 1) if kind.startswith("q_") else None
        check(step is None or step > 0, f"q is {step}; allowed: more than 0")
        quantile, ends = _quantile(kind.removeprefix("q_"), specification)

        def round_value(x: float) -> float:
            if step is not None:
                return round(x / step) * step if isinstance(step, int) else float(f"{round(x / step) * step:.10g}")
            x = float(f"{x:.{DIGITS}g}")
            return min(max(x, ends[0]), ends[1]) if ends else x

        return cls(name, lambda u: round_value(quantile(u)), None, tuple(map(round_value, ends)))


def _quantile(kind: str, specification: Mapping[str, Any]) -> tuple[Quantile, tuple[float, ...]]:
    """Return (quantile function of the distribution, its bounds if it has any)."""
    if kind in ("normal", "log_normal"):
        mu, sigma = _number(specification, "mu", 0.0), _number(specification, "sigma", 1.0)
        check(sigma > 0, f"sigma is {sigma}; allowed: more than 0")
        inv_cdf = NormalDist(mu, sigma).inv_cdf

        def normal_quantile(u: float) -> float:
            return inv_cdf(min(max(u, 1e-12), 1 - 1e-12))  # u may be 0

        return (normal_quantile if kind == "normal" else lambda u: math.exp(normal_quantile(u))), ()
    low, high = (_number(specification, key) for key in ("min", "max"))
    _check_order(low, high)
    if kind == "uniform":
        return lambda u: low + u * (high - low), (low, high)
    check(low > 0, f"min is {low}; distribution log_uniform_values needs more than 0")
    return lambda u: math.exp(math.log(low) + u * (math.log(high) - math.log(low))), (low, high)


# Distribution -> (required keys, optional keys). W&B's log_uniform, of exponents of e, is left out, because W&B advises
# against it.
_BOUNDS, _NORMAL = (("min", "max"), ()), ((), ("mu", "sigma"))
KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "constant": (("value",), ()),
    "categorical": (("values",), ()),
    "categorical_w_probabilities": (("values", "probabilities"), ()),
    "int_uniform": _BOUNDS,
    "uniform": _BOUNDS,
    "log_uniform_values": _BOUNDS,
    "normal": _NORMAL,
    "log_normal": _NORMAL,
}
_CONTINUOUS = ("uniform", "log_uniform_values", "normal", "log_normal")
KEYS |= {f"q_{kind}": (KEYS[kind][0], (*KEYS[kind][1], "q")) for kind in _CONTINUOUS}


def _default_distribution(specification: Mapping[str, Any]) -> str:
    """Return the distribution of a specification that names none."""
    if "value" in specification:
        return "constant"
    if "values" in specification:
        return "categorical_w_probabilities" if "probabilities" in specification else "categorical"
    if not {"min", "max"} <= specification.keys():
        raise ConfigError(
            f"has {', '.join(map(str, specification)) or 'nothing'}; allowed: value, values, or min and max"
        )
    return "int_uniform" if type(specification["min"]) is int and type(specification["max"]) is int else "uniform"


def _check_values(values: Any) -> tuple[Any, ...]:
    check(isinstance(values, list) and len(values) > 0, f"values are {values!r}; allowed: a list of one or more")
    for value in values:
        plain = value is None or isinstance(value, bool | int | float | str)
        check(plain, f"value is {value!r}; allowed: null, true, false, a number or text")
        check(not isinstance(value, float) or math.isfinite(value), f"value is {value}; allowed: a finite number")
    return tuple(values)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _number(specification: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = specification.get(key, default)
    hint = " (YAML reads 1e-4 as text; write 1.0e-4)" if isinstance(value, str) else ""
    check(_is_number(value), f"{key} is {value!r}; allowed: a number{hint}")
    return value


def _check_order(low: float, high: float) -> None:
    check(low < high, f"min is {low} and max is {high}; allowed: min below max")
