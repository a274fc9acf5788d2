"""Command lines from dataclasses: flags, help texts and one-line errors of all programs."""

import contextlib
import errno
import io
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from dantinox.cli.argv import normalize
from dantinox.config.validation import ConfigError
from dantinox.system import streams

USER_ERRORS = (
    ValueError,
    FileNotFoundError,
    NotADirectoryError,
    IsADirectoryError,
    FileExistsError,
    PermissionError,
    NotImplementedError,
)


IMPLEMENTATION_FLAGS = {
    "attention": "--attn",
    "moe_mlp": "--moe",
    "decode_attention": "--decode",
    "linear_cross_entropy": "--loss",
}
"""Operation -> the flag that chooses its implementation."""


def positional_run(argv: Sequence[str] | None, *flags: str) -> list[str]:
    """Return argv (None: that of the process) with `flags`, by default --run, before the words it begins with.

    A folder of weights in the format of Hugging Face gets --from instead of --run.
    """
    rest = list(sys.argv[1:] if argv is None else argv)
    words = []
    for flag in flags or ("--run",):
        if rest and not rest[0].startswith("-"):
            is_folder = flag == "--run" and os.path.isfile(os.path.join(rest[0], "config.json"))
            words += ["--from" if is_folder else flag, rest.pop(0)]
    return words + rest


def parse(cls: type, argv: Sequence[str] | None, *, default: Any, prog: str, description: str) -> Any:
    """Parse flags, named after the fields of the dataclass `cls` and of nested ones, into an instance.

    Invalid flags and values end the program with one line and exit code 2; --help prints the help and exits with 0.

    Args:
        cls: a dataclass.
        argv: the arguments; None: those of the process.
        default: instance with the default values.
        prog: name of the program.
        description: first lines of the help.
    """
    import tyro  # a slow import

    try:
        argv = normalize(cls, sys.argv[1:] if argv is None else argv)
    except ConfigError as error:
        exit_with_error(prog, error)
    captured = io.StringIO()
    try:
        with (
            contextlib.redirect_stderr(captured),
            _columns(1000 if "--help" not in argv and "-h" not in argv else None),
        ):
            return tyro.cli(
                cls,
                args=list(argv),
                default=default,
                prog=prog,
                description=description,
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        exit_with_error(prog, _one_line(captured.getvalue()))


def exit_with_error(prog: str, message: object, code: int = 2) -> NoReturn:
    """Print one line to standard error and exit: 2 for invalid input, 1 for a runtime failure.

    Raises:
        BrokenPipeError: it is the message: the reader of the output is gone, which is not an error of the program.
    """
    if isinstance(message, BrokenPipeError):
        streams.report(f"{prog}: interrupted, for the reader of standard output is gone")
        raise message
    streams.report(f"{prog}: error: {' '.join(str(message).split())}")
    raise SystemExit(code)


def log_choices() -> None:
    """Log the chosen implementations to standard error."""
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    logging.getLogger("jax").setLevel(logging.WARNING)


@contextlib.contextmanager
def one_line_errors(
    prog: str, verbose: bool = False, implementation_flags: Mapping[str, str] | None = None
) -> Iterator[None]:
    """Turn user errors into one line and exit code 2, other errors of the system into one line and exit code 1.

    Args:
        prog: name of the program.
        verbose: show the traceback instead.
        implementation_flags: those of `IMPLEMENTATION_FLAGS` that the program has.
    """
    try:
        yield
    except (*USER_ERRORS, OSError) as error:
        if verbose or isinstance(error, BrokenPipeError):
            raise
        text = str(error)
        if isinstance(error, OSError) and error.strerror is not None:
            text = (f"{str(error.filename)[:200]}: " if error.filename is not None else "") + error.strerror
        if isinstance(error, NotImplementedError):
            text = _with_flags(text, implementation_flags or {})
        is_user_error = isinstance(error, USER_ERRORS) or error.errno in (errno.ENAMETOOLONG, errno.ELOOP, errno.EROFS)
        exit_with_error(prog, text, code=2 if is_user_error else 1)


def peek_flag(argv: Sequence[str], *flags: str) -> str | None:
    """Return the last value of one of the flags without parsing argv; None if there is none."""
    flag_value = None
    for i, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name in flags:
            flag_value = value if equals else (argv[i + 1] if i + 1 < len(argv) else None)
    return flag_value


def _with_flags(refusal: str, flags: Mapping[str, str]) -> str:
    """Write the refusal of an implementation with a flag: `--attn xla` instead of `implementation='xla'`."""
    flag = flags.get(refusal.partition(":")[0])
    return refusal if flag is None else re.sub(r"implementation='([^']*)'", rf"{flag} \1", refusal)


@contextlib.contextmanager
def _columns(width: int | None) -> Iterator[None]:
    """Set the width that messages are wrapped to; None: that of the terminal."""
    before = os.environ.get("COLUMNS")
    if width is not None:
        os.environ["COLUMNS"] = str(width)
    try:
        yield
    finally:
        if width is not None:
            os.environ.pop("COLUMNS")
            if before is not None:
                os.environ["COLUMNS"] = before


def _one_line(panel: str) -> str:
    """Extract the message from a framed panel of several lines."""
    lines = [line.strip(" │╭╮╰╯─\t") for line in panel.splitlines()]
    body = [line for line in lines if line and not re.fullmatch(r"[-─]+", line)]
    message = next((line for line in body[1:] if line), "wrong arguments")
    message = re.sub(r"^Error parsing [\w.]+: ", "", message)
    return message.rstrip(".")
