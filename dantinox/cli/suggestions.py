"""Which flag was meant: suggestions for unknown flags, none rather than a wrong one."""

import re
from collections.abc import Collection

from dantinox.cli.foreign_flags import EXPLANATIONS, NO_COUNTERPART, OTHER_NAMES


def suggestion(name: str, flags: Collection[str]) -> str:
    """Return what to give instead of an unknown flag; "" if that is not clear.

    In this order: the flag or another program's flag of that name, the only flag that begins like it, the only one that
    it resembles.

    Args:
        name: the flag without hyphens in front.
        flags: the names of the program's flags, with underscores.
    """
    name = _underscored(name)
    if flag := flag_for(name, flags):
        return _did_you_mean(flag)
    for names, reason in NO_COUNTERPART.items():
        if _is_among(name, names) and _mentioned_flags(reason) <= set(flags):
            return f"there is none: {reason}"
    if len(name) >= 3 and len(begun := [flag for flag in flags if flag.startswith(name)]) == 1:
        return _did_you_mean(begun[0])
    meant = {flag for flag in flags if _resembles(name, flag)}
    if not meant:
        others = {other for names in OTHER_NAMES.values() for other in names.split()}
        meant = {flag_for(other, flags) for other in others if _resembles(name, other)} - {None}
    return _did_you_mean(meant.pop()) if len(meant) == 1 else ""


def flag_for(name: str, flags: Collection[str]) -> str | None:
    """Return the flag of which `name` is another spelling, or another program's name; None if there is none."""
    name = _underscored(name)
    spelled = (flag for flag in flags if _compact(flag) == _compact(name))
    if flag := next(spelled, None):
        return flag
    if any(
        _is_among(name, names) and _mentioned_flags(reason) <= set(flags) for names, reason in NO_COUNTERPART.items()
    ):
        return None
    return next((flag for flag, names in OTHER_NAMES.items() if flag in flags and _is_among(name, names)), None)


def _did_you_mean(flag: str) -> str:
    note = EXPLANATIONS.get(flag)
    return f"did you mean --{flag.replace('_', '-')}{f' ({note})' if note else ''}?"


def _mentioned_flags(text: str) -> set[str]:
    return {flag.replace("-", "_") for flag in re.findall(r"--([a-z0-9-]+)", text)}


def _is_among(name: str, names: str) -> bool:
    return _compact(name) in map(_compact, names.split())


def _underscored(name: str) -> str:
    return name.replace("-", "_").replace(".", "_").lower()


def _compact(name: str) -> str:
    return name.replace("_", "")


def _resembles(name: str, flag: str) -> bool:
    """Return whether two names differ by typing errors only: as many words, and long words nearly equal.

    Short words must have the same letters, for min and max, or k and p, are not typing errors.
    """
    words, flag_words = name.split("_"), flag.split("_")
    differ = [pair for pair in zip(words, flag_words) if pair[0] != pair[1]]
    if len(words) != len(flag_words) or any(letter.isdigit() for pair in differ for letter in "".join(pair)):
        return False
    shortest = 4 if len(differ) < len(words) else 5
    return all(
        (min(map(len, pair)) >= shortest or (len(pair[0]) == 4 and sorted(pair[0]) == sorted(pair[1])))
        and _within(*pair, 2 if len(pair[1]) >= 8 else 1)
        for pair in differ
    )


def _within(a: str, b: str, edits: int) -> bool:
    """Return whether so many insertions, deletions, substitutions and swaps of neighbours make `a` of `b`."""
    while a and b and a[0] == b[0]:
        a, b = a[1:], b[1:]
    if not a or not b:
        return len(a) + len(b) <= edits
    if not edits:
        return False
    pairs = [(a[1:], b), (a, b[1:]), (a[1:], b[1:])]
    if a[:2] == b[:2][::-1]:
        pairs.append((a[2:], b[2:]))
    return any(_within(*pair, edits - 1) for pair in pairs)
