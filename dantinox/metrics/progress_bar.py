"""A progress bar on a terminal, or a plain line every few seconds if the output is a file."""

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table


class ProgressLine:
    """Context manager that shows step | loss | lr | tokens/s | MFU | ETA.

    Args:
        total: the last step.
        done: the step that training starts from.
        quiet_seconds: seconds between lines if the output is not a terminal.
    """

    def __init__(self, total: int, done: int = 0, quiet_seconds: float = 10.0) -> None:
        self.total, self.quiet_seconds = total, quiet_seconds
        self.console = Console(highlight=False, soft_wrap=True)
        self._start = self._last = time.perf_counter()
        self._first = done
        self._bar = Progress(
            BarColumn(bar_width=20),
            TextColumn("{task.fields[line]}"),
            console=self.console,
            auto_refresh=False,
        )
        self._task = self._bar.add_task("", total=total, completed=done, line="compiling the training step")

    def __enter__(self) -> "ProgressLine":
        if self.console.is_terminal:
            self._bar.start()
            self._bar.refresh()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self._bar.stop()

    def update(self, step: int, row: dict[str, float]) -> None:
        """Show the metrics of a step."""
        now = time.perf_counter()
        if step == self._first + 1:  # the first step is mostly compilation, so the ETA excludes it
            self._start, self._first = now, step
        eta = (self.total - step) * (now - self._start) / max(1, step - self._first)
        line = (
            f"step {step:0{len(str(self.total))}}/{self.total} ({step / self.total:.0%}) | loss {row['loss']:.4f} | "
            f"lr {row['lr']:.2e} | {row['tokens_per_s']:,.0f} tok/s | mfu {row['mfu']:.0%} | "
            + (f"eta {int(eta // 60)}:{int(eta % 60):02}" if step > self._first else "compiled")
        )
        if self.console.is_terminal:
            self._bar.update(self._task, completed=step, line=line, refresh=True)
        elif now - self._last >= self.quiet_seconds or step in (self.total, self._first):
            self.console.print(line)
            self._last = now

    def print_line(self, text: str) -> None:
        """Print a line above the bar."""
        self.console.print(text, markup=False)

    def print_table(self, table: Table) -> None:
        """Print a table above the bar."""
        self.console.print(table, soft_wrap=False)
