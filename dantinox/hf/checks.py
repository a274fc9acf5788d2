"""Checks of single values of config.json."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from dantinox.config import ConfigError

MAX_INT, MAX_NUMBER = 2**31 - 1, 1e300


def check_type(name: str, value: Any, kind: Any) -> None:
    """Raise `ConfigError` if a value is not one of a type: int, float or bool."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_NUMBER
    fits: dict[Any, Callable[[], bool]] = {
        int: lambda: is_number and isinstance(value, int) and abs(value) <= MAX_INT,
        float: lambda: is_number,
        bool: lambda: isinstance(value, bool),
    }
    if not fits[kind]():
        allowed = {int: "an integer", float: "a number", bool: "true or false"}[kind]
        raise ConfigError(f"{name} is {value!r}; allowed: {allowed}")


def check_integer(name: str, value: Any, most: int, least: int = 1) -> None:
    """Raise `ConfigError` if a value is not an integer in a range."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name} is {value!r}; allowed: an integer, {least} or more")
    if value > most:
        raise ConfigError(f"{name} is {value}; allowed: an integer, {most} or less")


def check_value(hf_config: Mapping[str, Any], name: str, allowed: Any) -> None:
    """Raise `ConfigError` if a setting exists and has another value."""
    value = hf_config.get(name)
    is_close = (
        isinstance(value, int | float)
        and isinstance(allowed, float)
        and abs(value) <= MAX_NUMBER
        and math.isclose(value, allowed, rel_tol=1e-6)
    )
    if value is not None and value != allowed and not is_close:
        raise ConfigError(f"{name} is {value!r}, which DantinoX does not support; allowed: {allowed!r}")
