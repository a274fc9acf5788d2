"""Silence duplicate Orbax and TensorStore tracebacks of errors that they also raise."""

import logging
import sys
from typing import Any


def install_log_filters() -> None:
    """Let their tracebacks pass unprinted, and nothing else; asked twice, it listens once."""
    logging.getLogger("absl").addFilter(_not_orbax)
    logging.getLogger("asyncio").addFilter(_not_tensorstore)
    if not isinstance(sys.unraisablehook, _Unraisable):
        sys.unraisablehook = _Unraisable(sys.unraisablehook)


def _not_orbax(record: logging.LogRecord) -> bool:
    """Orbax logs the traceback of what fails in the background, three times over."""
    return not (record.exc_info and "orbax" in record.pathname)


def _not_tensorstore(record: logging.LogRecord) -> bool:
    """Of many writes that fail together Orbax awaits the first; asyncio logs each of the others when it is freed."""
    return "OCDBT" not in record.getMessage()


class _Unraisable:
    """Writes that fail after the first find its event loop closed, in threads where nobody can catch that."""

    def __init__(self, before: Any) -> None:
        self.before = before

    def __call__(self, told: Any) -> None:
        late = isinstance(told.exc_value, RuntimeError) and str(told.exc_value) == "Event loop is closed"
        if not (late and told.object is None):  # Python names the object, Tensorstore has none
            self.before(told)
