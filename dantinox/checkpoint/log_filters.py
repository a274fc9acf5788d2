"""Silence duplicate Orbax and TensorStore tracebacks of errors that they also raise."""

import logging
import sys
from typing import Any


def install_log_filters() -> None:
    """Install the log filters. Calling it again has no effect."""
    logging.getLogger("absl").addFilter(_not_orbax)
    logging.getLogger("asyncio").addFilter(_not_tensorstore)
    if not isinstance(sys.unraisablehook, _Unraisable):
        sys.unraisablehook = _Unraisable(sys.unraisablehook)


def _not_orbax(record: logging.LogRecord) -> bool:
    """Filter the tracebacks that Orbax logs, up to three times, for a failure in the background."""
    return not (record.exc_info and "orbax" in record.pathname)


def _not_tensorstore(record: logging.LogRecord) -> bool:
    """Filter what asyncio logs for failed writes that Orbax does not await: it awaits only the first of several."""
    return "OCDBT" not in record.getMessage()


class _Unraisable:
    """Ignore the errors of writes that fail in a thread after the event loop was closed by the first failure."""

    def __init__(self, previous_hook: Any) -> None:
        self.previous_hook = previous_hook

    def __call__(self, unraisable: Any) -> None:
        is_closed_loop = (
            isinstance(unraisable.exc_value, RuntimeError) and str(unraisable.exc_value) == "Event loop is closed"
        )
        if not (is_closed_loop and unraisable.object is None):  # errors of Python itself have an object
            self.previous_hook(unraisable)
