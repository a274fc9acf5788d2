"""Validation of settings and arguments; each error is one line with the name, its value and the allowed values."""

import difflib
import math
import operator
import sys
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np


def check_int(name: str, value: object, least: int, end: int | None = None, off: str = "") -> int:
    """Return `value` as an int with least <= value < end.

    Args:
        name: name of the argument, for the message.
        value: any integer; booleans and floats are refused.
        least: smallest allowed value.
        end: smallest value that is too large; None: no upper limit.
        off: the value that turns the setting off, for the message.

    Raises:
        ValueError: the value is not allowed.
    """
    try:
        number = least - 1 if isinstance(value, bool | np.bool_) else operator.index(value)  # type: ignore
    except TypeError:
        number = least - 1
    if number < least or (end is not None and number >= end):
        allowed = f"an integer, {least} or more" if end is None else f"an integer from {least} to {end - 1}"
        raise ValueError(f"{name} is {value!r}; allowed: {allowed}{f', or {off}' if off else ''}")
    return number


def check_finite(name: str, value: object, allowed: str) -> float:
    """Return `value` as a finite float; the message of the ValueError otherwise says what is `allowed`."""
    try:
        if isinstance(value, bool | np.bool_ | str):
            raise TypeError
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ValueError(f"{name} is {value!r}; allowed: {allowed}") from None
    if not math.isfinite(number):
        raise ValueError(f"{name} is {number}; allowed: {allowed}")
    return number


class ConfigError(ValueError):
    """An invalid setting; the message is one line with the setting, its value and the allowed values."""


def check(ok: bool, message: str) -> None:
    """Raise `ConfigError(message)` unless `ok`."""
    if not ok:
        raise ConfigError(message)


def check_fields(config: Any) -> None:
    """Check the type of every field, and the options of literals."""
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        options = get_args(hint) if get_origin(hint) is Literal else None
        if options is not None:
            check(value in options, f"{name} is {value!r}; allowed: {', '.join(map(str, options))}")
        elif hint in (int, int | None):
            optional = hint == (int | None)
            fits = (isinstance(value, int) and not isinstance(value, bool)) or (optional and value is None)
            check(fits, f"{name} is {value!r}; allowed: an integer{' or None' if optional else ''}")
        elif hint in (float, float | None):
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            fits = (is_number and abs(value) <= sys.float_info.max) or (hint is not float and value is None)
            check(fits, f"{name} is {value!r}; allowed: a finite number{'' if hint is float else ' or None'}")
        elif hint is bool:
            check(isinstance(value, bool), f"{name} is {value!r}; allowed: true or false")
        elif hint is str:
            check(isinstance(value, str), f"{name} is {value!r}; allowed: text")


def check_positive(config: Any, *names: str) -> None:
    """Check that each named setting is above zero or None."""
    for name in names:
        value = getattr(config, name)
        check(value is None or value > 0, f"{name} is {value}; it must be positive")


def check_fraction(config: Any, *names: str) -> None:
    """Check that each named setting is in [0, 1)."""
    for name in names:
        check(0 <= getattr(config, name) < 1, f"{name} is {getattr(config, name)}; allowed: 0 <= {name} < 1")


def did_you_mean(name: str, known: Any) -> str:
    """Return a suggestion for an unknown name, or the list of known names."""
    close = difflib.get_close_matches(str(name).replace("-", "_"), list(known), n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"
