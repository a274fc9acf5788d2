"""Show on standard error what a program does while it takes long."""

import contextlib
import sys
import threading
import time
from typing import Self


class Progress:
    """Context manager around a task that may take long; a task that does not is not mentioned.

    On a terminal one line shows the task, its share that is done and its seconds, and is erased at the end. Elsewhere
    plain lines show the same, one after `quiet_seconds`, then one every `line_seconds`, and one at the end.

    A thread prints, so a task that never calls `advance` is shown, too.

    Args:
        task: what is done, such as "reading 12 files".
        total: amount of work in any unit; 0: unknown.
    """

    terminal_seconds = 0.5
    quiet_seconds = 2.0
    line_seconds = 10.0

    def __init__(self, task: str, total: int = 0) -> None:
        self.task, self.total, self.done = task, total, 0
        self._stream, self._is_terminal = sys.stderr, False
        with contextlib.suppress(AttributeError, ValueError):  # no stream, or a closed one
            self._is_terminal = self._stream.isatty()
        self._end, self._shown_width = threading.Event(), 0
        self._thread = threading.Thread(target=self._show_until_end, daemon=True)

    def __enter__(self) -> Self:
        self._start = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(self, error_type: object, *_: object) -> None:
        self._end.set()
        self._thread.join()
        if self._shown_width and self._is_terminal:
            self._write("\r" + " " * self._shown_width + "\r")
        elif self._shown_width and error_type is None:
            self._write(f"{self.task}: done in {self._seconds():.0f} s\n")

    def advance(self, amount: int = 1) -> None:
        """Add to the work that is done."""
        self.done += amount

    def _seconds(self) -> float:
        return time.perf_counter() - self._start

    def _show_until_end(self) -> None:
        first, later = (self.terminal_seconds, 0.2) if self._is_terminal else (self.quiet_seconds, self.line_seconds)
        wait = first
        while not self._end.wait(wait):
            share = f"{min(self.done / self.total, 1):.0%}, " if self.total else ""
            line = f"{self.task}: {share}{self._seconds():.0f} s"
            self._write("\r" + line.ljust(self._shown_width) if self._is_terminal else line + "\n")
            self._shown_width = max(self._shown_width, len(line))
            wait = later

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # progress is not worth an error
            self._stream.write(text)
            self._stream.flush()


def megabytes(size: int) -> str:
    """Format a number of bytes, in steps that a person reads at a glance."""
    return f"{size / 1e6:,.1f} MB" if size < 1e8 else f"{size / 1e6:,.0f} MB"
