"""Command lines from dataclasses: flags, help texts and one-line errors of all programs."""

import contextlib
import dataclasses
import errno
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, get_type_hints

from dantinox.config.aliases import FLAG_ALIASES, conflict_message, current_value
from dantinox.config.validation import ConfigError

USER_ERRORS = (
    ValueError,
    FileNotFoundError,
    NotADirectoryError,
    IsADirectoryError,
    FileExistsError,
    PermissionError,
    NotImplementedError,
)


def positional_run(argv: Sequence[str] | None, flag: str = "--run") -> list[str]:
    """Return argv (None: that of the process) with `flag` inserted if the first argument is positional."""
    argv = list(sys.argv[1:] if argv is None else argv)
    return [flag, *argv] if argv and not argv[0].startswith("-") else argv


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
        argv = _current_flags(cls, _normalize_bool_flags(cls, sys.argv[1:] if argv is None else argv))
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
    """Print one line to standard error and exit: 2 for invalid input, 1 for a runtime failure."""
    print(f"{prog}: error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(code)


@contextlib.contextmanager
def one_line_errors(prog: str, verbose: bool = False) -> Iterator[None]:
    """Turn user errors into one line and exit code 2, other errors of the system into one line and exit code 1.

    With `verbose` the traceback is shown instead.
    """
    try:
        yield
    except (*USER_ERRORS, OSError) as error:
        if verbose or isinstance(error, BrokenPipeError):
            raise
        text = str(error)
        if isinstance(error, OSError) and error.filename is not None:
            text = f"{str(error.filename)[:200]}: {error.strerror}"
        is_user_error = isinstance(error, USER_ERRORS) or error.errno in (errno.ENAMETOOLONG, errno.ELOOP, errno.EROFS)
        exit_with_error(prog, text, code=2 if is_user_error else 1)


def run_main(main: Callable[[Sequence[str] | None], int | None]) -> NoReturn:
    """Run `main` and exit with its code, 130 after Ctrl-C and 141 after a closed pipe."""
    try:
        raise SystemExit(main(None))
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None


def peek_flag(argv: Sequence[str], *flags: str) -> str | None:
    """Return the last value of one of the flags without parsing argv; None if there is none."""
    flag_value = None
    for i, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name in flags:
            flag_value = value if equals else (argv[i + 1] if i + 1 < len(argv) else None)
    return flag_value


def _normalize_bool_flags(cls: type, argv: Sequence[str]) -> list[str]:
    """Replace `--qk-norm=true` and `--qk-norm=false` by `--qk-norm` and `--no-qk-norm`."""
    names = {name.replace("_", "-") for name, hint in _field_types(cls).items() if hint is bool}
    names |= {old.replace("_", "-") for old, new in FLAG_ALIASES.items() if new.replace("_", "-") in names}
    words = []
    for word in argv:
        flag, _, value = word.partition("=")
        name = flag.removeprefix("--").replace("_", "-")
        if flag.startswith("--") and name in names and value.lower() in ("true", "false"):
            word = f"--{name}" if value.lower() == "true" else f"--no-{name}"
        words.append(word)
    return words


def _current_flags(cls: type, argv: Sequence[str]) -> list[str]:
    """Return argv with flags and values under their current names.

    Raises:
        ConfigError: a flag has one value under its name and another under an earlier one.
    """
    types = _field_types(cls)
    aliases = {old: new for old, new in FLAG_ALIASES.items() if new in types and old not in types}
    words: list[str] = []
    values: dict[str, tuple[str, Any]] = {}  # flag -> (its name in argv, its value)
    rest = list(reversed(argv))
    while rest:
        word = rest.pop()
        flag, equals, value = word.partition("=")
        argv_name = flag.removeprefix("--").replace("-", "_")
        negated = argv_name.startswith("no_") and types.get(aliases.get(argv_name[3:], argv_name[3:])) is bool
        argv_name = argv_name[3:] if negated else argv_name
        name = aliases.get(argv_name, argv_name)
        if not flag.startswith("--") or name not in aliases.values():
            words.append(word)
            continue
        flag = f"--{'no-' if negated else ''}{name.replace('_', '-')}"
        if types[name] is bool:
            words.append(f"{flag}{equals}{value}")
            value = not negated
        elif equals:
            value = current_value(name, value)
            words.append(f"{flag}={value}")
        else:
            words.append(flag)
            value = None
            if rest and not rest[-1].startswith("--"):
                value = current_value(name, rest.pop())
                words.append(value)
        first, first_value = values.setdefault(name, (argv_name, value))
        if first != argv_name and first_value != value:
            raise ConfigError(conflict_message(first, first_value, argv_name, value, name))
    return words


def _field_types(cls: type) -> dict[str, Any]:
    """Return the name and type of every field, including those of nested dataclasses."""
    flags = {}
    for name, hint in get_type_hints(cls).items():
        flags |= _field_types(hint) if dataclasses.is_dataclass(hint) else {name: hint}
    return flags


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
    flags = [line.split()[0].rstrip(",") for line in body if line.startswith("--")]
    if unknown := re.match(r"Unrecognized options: (-.*)", message):  # without their values
        words = [word.partition("=")[0] for word in unknown[1].rstrip(".").split(", ") if word.startswith("-")]
        message = f"Unrecognized options: {', '.join(words)}"
    if message.startswith("Unrecognized options") and flags:
        message += f"; did you mean {flags[0]}?"
    type_line = next(
        (line for line in body if line.startswith("- <class 'int'>") or line.startswith("- <class 'float'>")),
        None,
    )
    if type_line and "could be instantiated" in message:
        message = re.sub(
            r": no type matching (.*) could be instantiated from (.*?)\.?$", r": \2 is not one of \1", message
        )
    return message.rstrip(".")
