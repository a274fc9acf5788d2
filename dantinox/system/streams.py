"""Standard input, output and error of a program: any encoding, closed streams, and readers that go away."""

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import IO, NoReturn


def prepare() -> None:
    r"""Make the standard streams take any text; programs call it before they print.

    A character that the encoding of a stream lacks is written as an escape, such as `\xe9`. A stream that is closed
    becomes the null device, whose descriptor keeps the next file that is opened from being taken for the stream.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - as long as the program
        elif mode == "w" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def discard(stream: IO[str]) -> None:
    """Send what a stream still buffers, and what is written to it later, to the null device."""
    with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as null:  # or it has no descriptor
        os.dup2(null.fileno(), stream.fileno())


def flush() -> OSError | None:
    """Flush the standard streams before the program ends; discard those that fail and return the first error."""
    errors = []
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            discard(stream)
            errors.append(error)
    return errors[0] if errors else None


def report(text: str) -> None:
    """Print a line to standard error; without a reader, do nothing."""
    stream = getattr(sys.stderr, "rich_proxied_file", sys.stderr)  # not to the progress bar, which is on stdout
    try:
        print(text, file=stream, flush=True)
    except OSError:
        discard(stream)


def run_main(main: Callable[[Sequence[str] | None], int | None]) -> NoReturn:
    """Run `main` and exit with its code, 130 after Ctrl-C and 141 after a closed pipe.

    What it prints may have any character, whatever the encoding of the output.
    """
    prepare()
    try:
        code = main(None)
    except SystemExit as stop:
        code = stop.code
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        code = 141
    except OSError as error:
        if error.filename is not None or error.strerror is None:
            raise
        report(f"error: {error.strerror}")  # of a stream: a full disk, a terminal that is gone
        code = 1
    if (error := flush()) is not None and not code:
        code = 141 if isinstance(error, BrokenPipeError) else 1
        if code == 1:
            report(f"standard output: {error.strerror}")
    raise SystemExit(code)
