"""Command-line programs, one per file, and their shared helpers (`dantinox.cli.args`)."""

from dantinox.cli.args import (
    IMPLEMENTATION_FLAGS,
    USER_ERRORS,
    exit_with_error,
    log_choices,
    one_line_errors,
    parse,
    peek_flag,
    positional_run,
)
from dantinox.system.streams import run_main

__all__ = [
    "IMPLEMENTATION_FLAGS",
    "USER_ERRORS",
    "exit_with_error",
    "log_choices",
    "one_line_errors",
    "parse",
    "peek_flag",
    "positional_run",
    "run_main",
]
