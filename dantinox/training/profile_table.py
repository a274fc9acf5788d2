"""The table of a trace: time per part of the model. `--profile-steps` and `bench.profile` print it."""

from collections.abc import Sequence

from rich.table import Table

from dantinox.training.profile_report import Row


def parts_table(rows: Sequence[Row], steps: int) -> Table:
    """Make the table of the rows of `profile_report.time_by_scope`, in milliseconds per step."""
    table = Table(title="parts, all blocks together; ms per step")
    for column in ("part", "ms", "of it backward", "share"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for row in rows:
        times = (f"{ms / steps:.3f}" for ms in (row.self_ms, row.backward_ms))
        table.add_row(row.name, *times, f"{row.share:.1%}")
    return table
