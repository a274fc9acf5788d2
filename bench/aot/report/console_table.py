"""The table of one target in the terminal: a line per program and a line per hand-written kernel.

For a GPU, "per tile" is the number of instructions that a kernel's steady state issues per tile. For a TPU, "executed"
is the number of bundles that a kernel executes over its grid, in thousands; "per work" divides it: by thousands of
visible pairs for attention, by 2^30 multiply-adds of one product for a grouped matmul or a mixture of experts. "MXU"
does the same with executed MXU slots, per 2^20 pairs or per 2^30 multiply-adds; "HBM MiB" is what the kernel's blocks
move. Two numbers are for rows that are spread evenly over the groups, and by Zipf's law.
"""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from bench.aot import hardware
from bench.aot.cases import Case
from dantinox.kernels import cost, workloads
from dantinox.system.console import Console

Row = dict[str, Any]

COLUMNS = ("s", "roofline ms", "args MiB", "temp MiB")
GPU_COLUMNS = ("regs", "spill B", "SMEM KiB", "blocks/SM", "occupancy", "wgmma", "tcgen05", "mma", "per tile")
TPU_COLUMNS = ("bundles", "empty", "MXU share", "VMEM KiB", "spills", "fills", "executed", "per work", "MXU", "HBM MiB")
GROUPED = ("grouped_matmul", "moe_mlp")
PROGRAM_WIDTH = 44
WIDE = ("executed", "per work", "MXU", "HBM MiB")  # two numbers, where rows are spread over groups


class Printer:
    """Prints the rows of a target one by one, with a heading where the operation or the workload changes.

    Args:
        target: the accelerator.
        console: where to.
    """

    def __init__(self, target: hardware.Target, console: Console) -> None:
        self._target, self._console = target, console
        self._op, self._spec = "", ""
        self._refused: set[tuple[str, str]] = set()

    def add(self, case: Case, row: Row) -> None:
        """Print a row. A reason to refuse is printed once for all dtypes and directions."""
        gpu, target = isinstance(self._target, hardware.Gpu), self._target
        table = Table(box=None, pad_edge=False, title_justify="left", show_header=case.op != self._op)
        if case.op != self._op:
            table.title = f"\n{case.op} compiled for {target.name} ({target.kind})"
            self._op, self._spec = case.op, ""
        table.add_column("program", overflow="fold", width=PROGRAM_WIDTH)
        for name in (*COLUMNS, *(GPU_COLUMNS if gpu else TPU_COLUMNS)):
            width = 8 if name in WIDE and case.op not in GROUPED else 15 if name in WIDE else max(len(name), 6)
            table.add_column(name, justify="right", width=width, overflow="fold")
        if case.spec != self._spec:
            self._spec = case.spec
            self._refused = set()
            label = workloads.get(case.op, case.spec).label()
            self._console.print(table if table.show_header else "", end="")
            self._console.print(f"[bold]{case.spec}[/bold]  {label}")
            table.show_header, table.title = False, None
        if row["status"] == "refused":
            if (key := (case.implementation, row["reason"])) not in self._refused:
                self._refused.add(key)
                self._console.print(f"[dim]  {case.implementation}: refused: {_escape(row['reason'])}[/dim]")
        elif row["status"] != "compiled":
            title = f"  {case.implementation} {case.dtype} {case.direction}"
            self._console.print(f"[red]{title}: {row['status']}: {_escape(row['reason'])}[/red]")
        else:
            _add_row(table, case, row, gpu)
            self._console.print(table)
            for kernel in row["kernels"]:
                if "uncounted" in kernel:
                    reason = f"{kernel['name']} is not counted: {kernel['uncounted']}"
                    self._console.print(f"[dim]      {_escape(reason)}[/dim]")


def _add_row(table: Table, case: Case, row: Row, gpu: bool) -> None:
    title = f"  {case.implementation} {case.dtype} {case.direction}"
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
        cells = _gpu_cells(kernel) if gpu else _tpu_cells(kernel, case)
        table.add_row(f"    {_escape(kernel['name'])}", *[""] * len(COLUMNS), *cells)
        for region in kernel.get("regions", ()):
            if region["spills"] or region["fills"]:
                cells = [str(region["bundles"]), "", "", "", str(region["spills"]), str(region["fills"])]
                cells += [f"{region['times']} times", "", "", ""]
                table.add_row(f"[dim]      {_escape(region['name'])}[/dim]", *[""] * len(COLUMNS), *cells)


def _escape(text: str) -> str:
    """Escape rich's markup."""
    return text.replace("[", r"\[")


def _gpu_totals(t: Row) -> list[str]:
    return ["", str(t["spill_bytes"]), "", "", "", str(t["wgmma"]), str(t["tcgen05"]), str(t["mma"]), ""]


def _tpu_totals(t: Row) -> list[str]:
    share = f"{t['mxu'] / t['mxu_slots']:.1%}" if t["mxu_slots"] else ""
    return [str(t["bundles"]), str(t["empty"]), share, "", str(t["spills"]), str(t["fills"]), "", "", "", ""]


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


def _tpu_cells(k: Row, case: Case) -> list[str]:
    bound = "<= " * k.get("upper_bound", False)
    pairs, multiply_adds = _work(workloads.get(case.op, case.spec))
    executed, mxu = _by_skew(k.get("executed")), _by_skew(k.get("mxu_executed"))
    per_work = [1e3 / pairs, 2**20 / pairs] if pairs else [2**30 / multiply_adds] * 2 if multiply_adds else []
    return [
        str(k["bundles"]),
        "?" if k["empty"] is None else str(k["empty"]),
        f"{k['mxu_share']:.1%}",
        "?" if k["vmem_bytes"] is None else f"{k['vmem_bytes'] / 1024:.0f}",
        str(k["spills"]),
        str(k["fills"]),
        bound * bool(executed) + _join(executed, 1e-3),
        bound * bool(executed) + _join(executed, per_work[0]) if per_work else "",
        _join(mxu, per_work[1]) if per_work else "",
        _join(_by_skew(k.get("moved")), 2**-20),
    ]


def _by_skew(value: Any) -> list[int]:
    """The counts of a kernel: one, or one per skew."""
    return list(value.values()) if isinstance(value, Mapping) else [value] if value is not None else []


def _join(counts: list[int], factor: float) -> str:
    """Format counts, and equal ones once."""
    return " / ".join(dict.fromkeys(_digits(count * factor) for count in counts))


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _work(workload: workloads.Workload) -> tuple[int, int]:
    """Visible pairs of attention, and multiply-adds of one product of a grouped matmul; 0 where there are none."""
    if isinstance(workload, workloads.Attention) and workload.segments is None:
        per_head = cost.visible_pairs(workload.T, workload.S, causal=workload.causal, window=workload.window)
        return workload.B * workload.H * per_head, 0
    if isinstance(workload, workloads.GroupedMatmul):
        return 0, workload.N * workload.M * workload.F
    if isinstance(workload, workloads.MoE):
        return 0, workload.N * workload.k * workload.M * workload.F
    return 0, 0
