"""The table of one target in the terminal: a line per program and a line per hand-written kernel.

For a GPU, "per tile" is the number of instructions that a kernel's steady state issues per tile. For attention on a
TPU, "MXU/Mi" is MXU slots per 1024 x 1024 scores, and "per 1000 pairs" bundles executed per 1000 visible pairs.
"""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from bench.aot import hardware
from bench.aot.cases import Case
from dantinox.kernels import workloads
from dantinox.system.console import Console

Row = dict[str, Any]

GPU_COLUMNS = ("regs", "spill B", "SMEM KiB", "blocks/SM", "occupancy", "wgmma", "tcgen05", "mma", "per tile")
TPU_COLUMNS = ("bundles", "empty", "MXU slots", "MXU share", "VMEM KiB", "spills", "fills", "MXU/Mi", "per 1000 pairs")


def show(target: hardware.Target, rows: Mapping[Case, Row], console: Console) -> None:
    """Print the rows of a target, grouped by operation and workload."""
    gpu = isinstance(target, hardware.Gpu)
    for op in dict.fromkeys(case.op for case in rows):
        table = Table(title=f"{op} compiled for {target.name} ({target.kind})", title_justify="left")
        table.add_column("program", overflow="fold")
        for name in ("s", "roofline ms", "args MiB", "temp MiB", *(GPU_COLUMNS if gpu else TPU_COLUMNS)):
            table.add_column(name, justify="right")
        cases = [case for case in rows if case.op == op]
        for name in dict.fromkeys(case.spec for case in cases):
            table.add_section()
            table.add_row(f"[bold]{name}[/bold]  {workloads.get(op, name).label()}")
            refused: set[tuple[str, str]] = set()
            for case in (case for case in cases if case.spec == name):
                row = rows[case]
                if row["status"] != "refused":
                    _add_row(table, case, row, gpu)
                elif (case.implementation, row["reason"]) not in refused:  # once for all dtypes and directions
                    refused.add((case.implementation, row["reason"]))
                    table.add_row(f"[dim]  {case.implementation}: refused: {_escape(row['reason'])}[/dim]")
        console.print(table)


def _add_row(table: Table, case: Case, row: Row, gpu: bool) -> None:
    title = f"  {case.implementation} {case.dtype} {case.direction}"
    if row["status"] != "compiled":
        table.add_row(f"[red]{title}: {row['status']}: {_escape(row['reason'])}[/red]")
        return
    seconds = row.get("seconds")
    table.add_row(
        f"{title}, {row['totals']['kernels']} kernel{'s' * (row['totals']['kernels'] != 1)}",
        "" if seconds is None else f"{seconds:.1f}",
        "" if row.get("roofline_ms") is None else f"{row['roofline_ms']:.3g}",
        f"{row['argument_bytes'] / 2**20:.1f}",
        f"{row['temp_bytes'] / 2**20:.1f}",
        *(_gpu_totals(row["totals"]) if gpu else _tpu_totals(row["totals"])),
    )
    for kernel in row["kernels"]:
        cells = _gpu_cells(kernel) if gpu else _tpu_cells(kernel)
        table.add_row(f"    {_escape(kernel['name'])}", "", "", "", "", *cells)


def _escape(text: str) -> str:
    """Escape rich's markup."""
    return text.replace("[", r"\[")


def _gpu_totals(t: Row) -> list[str]:
    return ["", str(t["spill_bytes"]), "", "", "", str(t["wgmma"]), str(t["tcgen05"]), str(t["mma"]), ""]


def _tpu_totals(t: Row) -> list[str]:
    share = f"{t['mxu'] / t['mxu_slots']:.1%}" if t["mxu_slots"] else ""
    return [str(t["bundles"]), str(t["empty"]), str(t["mxu"]), share, "", str(t["spills"]), str(t["fills"]), "", ""]


def _gpu_cells(k: Row) -> list[str]:
    return [
        str(k["registers"]),
        str(k["spill_bytes"]),
        f"{k['smem_bytes'] / 1024:.1f}",
        "?" if k["blocks"] is None else str(k["blocks"]),
        "?" if k["occupancy"] is None else f"{k['occupancy']:.0%}",
        str(k["wgmma"]),
        str(k["tcgen05"]),
        str(k["mma"]),
        str(k.get("steady", {}).get("instructions", "")),
    ]


def _tpu_cells(k: Row) -> list[str]:
    return [
        str(k["bundles"]),
        "?" if k["empty"] is None else str(k["empty"]),
        str(k["mxu"]),
        f"{k['mxu_share']:.1%}",
        "?" if k["vmem_bytes"] is None else f"{k['vmem_bytes'] / 1024:.0f}",
        str(k["spills"]),
        str(k["fills"]),
        str(k.get("mxu_per_1024x1024", "")),
        f"{'<= ' * k.get('upper_bound', False)}{1e3 * k['bundles_per_pair']:.3g}" if "bundles_per_pair" in k else "",
    ]
