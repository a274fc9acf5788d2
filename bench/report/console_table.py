"""The report in the terminal: a table per operation, with the implementations of a workload below each other."""

from rich.table import Table

from bench.report import cpu
from bench.report.results import Document, Row, by_case, fastest, is_wrong, leaders
from dantinox.system.console import Console

SCALES = ((1, "s"), (1e-3, "ms"), (1e-6, "µs"))


def duration(seconds: float) -> str:
    """Format seconds with the unit that leaves one to three digits before the point."""
    scale, unit = next((s for s in SCALES if seconds >= s[0]), SCALES[-1])
    return f"{seconds / scale:.3g} {unit}"


def size(count: float) -> str:
    """Format bytes with a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.3g} {unit}" if count < 1000 else f"{count:.0f} {unit}"
        count /= 1024
    raise AssertionError


def head(document: Document) -> str:
    """Format device, CPU, date, versions, timer and ceilings in one line."""
    ceilings = ", ".join(f"{name} {value:.3g}" for name, value in document["ceilings"].items())
    versions = ", ".join(f"{name} {value}" for name, value in document["versions"].items())
    machine = " · ".join(filter(None, (document["device"], cpu.describe(document))))
    return f"{machine} · {document['date']} · {versions} · {document['timer']} · ceilings: {ceilings}"


COLUMNS = {  # name: width
    "implementation": 20,
    "median": 9,
    "spread": 7,
    "of best": 8,
    "GFLOP/s": 9,
    "GB/s": 8,
    "roofline": 9,
    "temp": 9,
    "error": 13,
}


def show(op: str, document: Document, console: Console) -> None:
    """Print the rows of one operation, grouped by workload: the fastest ones are green, wrong ones red."""
    console.print(f"\n[bold]{op}[/]  {head(document)}", highlight=False, soft_wrap=True)
    console.print(_grid([list(COLUMNS)], style="dim"))
    for (workload, direction), rows in by_case(document["rows"]).items():
        sizes = f"{rows[0]['dtype']} {rows[0]['sizes']}"
        console.print(f"[bold]{workload}[/], {direction}  [dim]{sizes}[/]", highlight=False)
        best, leading = fastest(rows), leaders(rows)
        colors = {name: "green" for name in leading}
        colors |= {row["implementation"]: "bold red" for row in rows if is_wrong(row, rows)}
        console.print(_grid([_cells(row, best, colors.get(row["implementation"], "")) for row in rows]))
    reasons: dict[tuple[str, str], int] = {}
    for skipped in document["refused"]:
        key = (skipped["implementation"], skipped["why"])
        reasons[key] = reasons.get(key, 0) + 1
    for (implementation, why), count in reasons.items():
        console.print(f"  {implementation} is missing in {count} of these: {why}", style="dim", highlight=False)


def _grid(rows: list[list[str]], style: str = "") -> Table:
    grid = Table.grid(padding=(0, 1))
    for name, width in COLUMNS.items():
        justify = "left" if name == "implementation" else "right"
        grid.add_column(width=width, justify=justify, no_wrap=True, style=style)
    for cells in rows:
        grid.add_row(*cells)
    return grid


def _cells(row: Row, best: float, color: str) -> list[str]:
    mark, end = (f"[{color}]", "[/]") if color else ("", "")
    wrong = "WRONG " if "red" in color else ""
    return [
        f"  {mark}{row['implementation']}{end}",
        f"{mark}{duration(row['seconds'])}{end}",
        f"±{row['spread'] / 2:.0%}",
        f"{row['seconds'] / best:.2f}x",
        f"{row['flops_per_second'] / 1e9:.3g}",
        f"{row['bytes_per_second'] / 1e9:.3g}",
        f"{row['roofline']:.1%}",
        size(row["temp_bytes"]),
        "" if row["error"] is None else f"{mark}{wrong}{row['error']:.1e}{end}" if wrong else f"{row['error']:.1e}",
    ]
