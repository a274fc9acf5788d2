"""A progress bar on a terminal, or a plain line every few seconds if the output is a file."""

import contextlib
import time
from collections.abc import Iterator

from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from dantinox.system import streams
from dantinox.system.console import plain_console

REFRESH_SECONDS = 0.1  # between two updates of the bar: more are not readable, and each takes about a millisecond


class ProgressLine:
    """Context manager that shows step | loss | lr | tokens/s | MFU | ETA.

    An output that cannot be written is given up, so that it never costs the run more than its messages.

    Args:
        total: the last step.
        quiet_seconds: seconds between lines if the output is not a terminal.

    Attributes:
        is_closed: whether the reader of the output is gone.
        has_failed: whether the output could not be written, for this reason or another.
    """

    def __init__(self, total: int, done: int = 0, quiet_seconds: float = 10.0) -> None:
        """Start at step `done`, from which training starts."""
        self.total, self.quiet_seconds = total, quiet_seconds
        self.is_closed = self.has_failed = False
        self.console = plain_console()
        self._first: tuple[int, float] | None = None  # the first step shown and its time
        self._printed = -float("inf")  # when a step was last shown
        self._bar = Progress(
            BarColumn(bar_width=20),
            TextColumn("{task.fields[line]}", markup=False),
            console=self.console,
            auto_refresh=False,
        )
        self._task = self._bar.add_task("", total=total, completed=done, line="compiling the training step")

    def __enter__(self) -> "ProgressLine":
        if self.console.can_update:
            with self._writing():
                self._bar.start()
                self._bar.refresh()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.can_update:
            with self._writing():
                self._bar.refresh()
                self._bar.stop()

    def update(self, step: int, row: dict[str, float]) -> None:
        """Show the metrics of a step, unless the last ones were shown just now; those of the last step always."""
        now = time.perf_counter()
        parts = [
            f"step {step:0{len(str(self.total))}}/{self.total} ({step / self.total:.0%})",
            f"loss {row['loss']:.4f}",
            f"lr {row['lr']:.2e}",
            f"{row['tokens_per_s']:,.0f} tok/s",
            f"mfu {row['mfu']:.0%}",
            self._eta(step, now),
        ]
        while self.console.can_update and len(parts) > 3 and len(" | ".join(parts)) > self.console.width:
            del parts[-2]  # the time left stays
        line = " | ".join(parts)
        pause = REFRESH_SECONDS if self.console.can_update else self.quiet_seconds
        is_due = now - self._printed >= pause or step == self.total
        if is_due:
            self._printed = now
        with self._writing():
            if self.console.can_update:
                self._bar.update(self._task, completed=step, line=line, refresh=is_due)
            elif is_due:
                self.console.print(line, markup=False)

    def print_line(self, text: str) -> None:
        """Print a line above the bar."""
        with self._writing():
            self.console.print(text, markup=False)

    def print_table(self, table: Table) -> None:
        """Print a table above the bar."""
        with self._writing():
            self.console.print(table, soft_wrap=False)

    def print_last(self, text: str) -> None:
        """Print the line that the program ends with, to standard error if the output cannot be written."""
        self.print_line(text)
        if self.has_failed:
            streams.report(text)

    def _eta(self, step: int, now: float) -> str:
        """Return the remaining time at the rate since the first step shown: until then it is mostly compilation."""
        if self._first is None:
            self._first = step, now
        first_step, start = self._first
        if step == first_step:
            return "compiled"
        minutes, seconds = divmod(round((self.total - step) * (now - start) / (step - first_step)), 60)
        return f"eta {minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"eta {minutes}:{seconds:02}"

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            streams.discard(self.console.file)
            self.is_closed |= isinstance(error, BrokenPipeError)
            if not self.is_closed and not self.has_failed:
                streams.report(f"standard output: {error.strerror}; training continues without it")
            self.has_failed = True
