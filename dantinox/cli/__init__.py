"""Command lines: what all programs share; each program has a file of its own."""

from dantinox.cli.args import USER_ERRORS, console, fail, parse, run_first, user_errors, value_of

__all__ = [
    "USER_ERRORS",
    "console",
    "fail",
    "parse",
    "run_first",
    "user_errors",
    "value_of",
]
