"""Attribute each DeprecationWarning to the code that made the deprecated call.

`optax.global_norm` and others warn with `stacklevel=1`, so Python names the library as the source, and a filter by
module cannot tell our call of a deprecated function from a library's own. `attribute_to_caller` walks out of the
package that warns: if the first frame outside is ours, the warning is ours.
"""

import functools
import sys
import warnings
from types import FrameType
from typing import Any

OURS = ("dantinox", "bench", "kernels", "reference", "tests")
_SKIPPED = ("warnings", "functools", "contextlib")


def own_caller(frame: FrameType | None) -> FrameType | None:
    """Return the frame that called into the package of `frame`, if it is ours and that package is not."""
    package = _package(frame)
    if package in OURS:
        return None
    while frame is not None and _package(frame) in (package, *_SKIPPED):
        frame = frame.f_back
    return frame if _package(frame) in OURS else None


def _package(frame: FrameType | None) -> str:
    return "" if frame is None else frame.f_globals.get("__name__", "").split(".")[0]


def attribute_to_caller() -> None:
    """Replace `warnings.warn`, so that the filters of pyproject.toml see our module where the call is ours."""
    original = warnings.warn
    if hasattr(original, "__wrapped__"):  # already replaced
        return

    @functools.wraps(original)
    def warn(message: Any, category: Any = None, stacklevel: int = 1, source: Any = None, **options: Any) -> None:
        kind = type(message) if isinstance(message, Warning) else category or UserWarning
        caller = own_caller(sys._getframe(1)) if issubclass(kind, DeprecationWarning) else None
        if caller is not None:
            module = caller.f_globals["__name__"]
            return warnings.warn_explicit(message, kind, caller.f_code.co_filename, caller.f_lineno, module)
        # One frame more; frames of `skip_file_prefixes` are not counted.
        level = stacklevel if options.get("skip_file_prefixes") else stacklevel + 1
        return original(message, category, level, source, **options)

    warnings.warn = warn
