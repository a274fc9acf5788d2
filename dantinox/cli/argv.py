"""Command lines as people write them, put into the words that the parser takes."""

import dataclasses
import importlib
import re
from collections.abc import Sequence
from typing import Any, get_type_hints

from dantinox.cli.suggestions import flag_for, suggestion
from dantinox.config import presets
from dantinox.config.aliases import FLAG_ALIASES, conflict_message, current_value
from dantinox.config.numbers import parse_float, parse_int
from dantinox.config.validation import ConfigError

_FLAG = re.compile(r"--?[A-Za-z][\w.-]*(=|$)")  # neither a number below zero nor text that starts with a hyphen
_NUMBERS = {int: (parse_int, "an integer"), float: (parse_float, "a number")}


def normalize(cls: type, argv: Sequence[str]) -> list[str]:
    """Return the arguments of a program with current names of flags and values, and plain numbers and booleans.

    `--kv-heads 2` becomes `--n-kv-heads 2`, `--steps 1e3` becomes `--steps 1000`, `--qk-norm=false` becomes
    `--no-qk-norm`.

    Args:
        cls: the dataclass whose fields are the flags.
        argv: the arguments.

    Raises:
        ConfigError: a flag is unknown, has no value, or has a value that is not a number; a word belongs to no flag; a
            flag has one value under its name and another under an earlier one.
    """
    types, repeated = _field_types(cls)
    aliases = {old: new for old, new in FLAG_ALIASES.items() if new in types and old not in types}
    words: list[str] = []
    unknown: list[str] = []
    given: dict[str, tuple[str, Any]] = {}  # flag -> (its name in argv, its value)
    rest = list(reversed(argv))
    while rest:
        word = rest.pop()
        flag, equals, value = word.partition("=")
        argv_name = flag.removeprefix("--").replace("-", "_")
        negated = argv_name.startswith("no_") and types.get(aliases.get(argv_name[3:], argv_name[3:])) is bool
        argv_name = argv_name[3:] if negated else argv_name
        name = aliases.get(argv_name, argv_name)
        if word in ("-h", "--help") or name.startswith("tyro_"):
            words.append(word)
            continue
        if not flag.startswith("--") or name not in types:
            unknown.append(flag if _FLAG.match(word) else word)
            while _FLAG.match(word) and not equals and rest and not _FLAG.match(rest[-1]):
                rest.pop()  # its values
            continue
        flag = f"--{name.replace('_', '-')}"
        if types[name] is bool:
            if not equals and not negated and rest and rest[-1].lower() in ("true", "false"):
                value = rest.pop()
            if value.lower() not in ("", "true", "false") or (equals and negated):
                raise ConfigError(f"{flag} is {value!r}; allowed: true, false or no value")
            value = not negated and value.lower() != "false"
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            values = [value] if equals else []
            while not equals and rest and not _FLAG.match(rest[-1]) and (not values or name in repeated):
                values.append(rest.pop())
            values = [_number(flag, types[name], current_value(name, text)) for text in values]
            value = values[0] if values else None
            if value is None and name not in repeated:
                other = f"; one with a hyphen in front is given as {flag}={rest[-1]}" if rest else ""
                raise ConfigError(f"{flag} needs a value{other}")
            attached = len(values) == 1 and (bool(equals) or values[0].startswith("-"))
            words += [f"{flag}={values[0]}"] if attached else [flag, *values]
        first, first_value = given.setdefault(name, (argv_name, value))
        if first != argv_name and first_value != value:
            raise ConfigError(conflict_message(first, first_value, argv_name, value, name))
    if unknown:
        raise ConfigError(_unknown_message(unknown, types))
    return words


def _number(flag: str, hint: Any, text: str) -> str:
    """Return the plain spelling of the value of a flag that takes a number; that of other flags as it is."""
    optional = hint in (int | None, float | None)
    kind = next((kind for kind in _NUMBERS if hint in (kind, kind | None)), None)
    if kind is None:
        return text
    if optional and text.lower() in ("none", "null"):
        return "None"
    parse, what = _NUMBERS[kind]
    number = parse(text)
    if number is None:
        raise ConfigError(f"{flag} is {text!r}; allowed: {what}{' or None' if optional else ''}")
    return str(number) if kind is int else text


def _unknown_message(words: Sequence[str], types: dict[str, Any]) -> str:
    """Return the message about flags that the program does not have, and about words that belong to no flag."""
    hints: dict[str, None] = {}  # a set in order
    for word in words:
        name, _, value = word.partition("=")
        if word.startswith("-") or value:  # other programs take NAME=VALUE
            hint = suggestion(name.lstrip("-"), types) or _flag_elsewhere(name.lstrip("-"))
            hint = f"{name}: {hint}" if hint and len(words) > 1 else hint
        elif "preset" in types and word in presets():
            hint = f"did you mean --preset {word}?"
        else:
            hint = "a value follows its flag, in quotes if it has spaces"
        hints[hint] = None
    return "; ".join([f"Unrecognized options: {', '.join(words)}", *filter(None, hints)])


def _flag_elsewhere(name: str) -> str:
    """Return which other program has a flag; "" if none has."""
    for program in ("train", "generate", "evaluate", "export", "chat"):
        flags, _ = _field_types(importlib.import_module(f"dantinox.cli.{program}").Arguments)
        if flag := flag_for(name, flags):
            return f"--{flag.replace('_', '-')} is a flag of python -m dantinox.{program}"
    return ""


def _field_types(cls: type) -> tuple[dict[str, Any], set[str]]:
    """Return the type of every flag by name, and the flags that take several values after one mention."""
    types: dict[str, Any] = {}
    repeated: set[str] = set()
    for name, hint in get_type_hints(cls, include_extras=True).items():
        if dataclasses.is_dataclass(hint):
            inner_types, inner_repeated = _field_types(hint)
            types, repeated = types | inner_types, repeated | inner_repeated
        else:
            name = name.rstrip("_")  # of a field that would be a word of Python
            types[name] = hint
            if getattr(hint, "__origin__", None) is tuple and not hasattr(hint, "__metadata__"):
                repeated.add(name)
    return types, repeated
