"""What a benchmark run records: names and facts of each entry, a line for the terminal, a line for a file."""

from collections.abc import Sequence
from statistics import median
from typing import Any, NamedTuple

import jax

from bench.operations.roofline import Ceilings
from bench.operations.runner import BenchmarkCase, CaseResult, sweep_coordinate
from bench.operations.timer import clock
from bench.report.console_table import duration
from bench.report.cpu import this_cpu
from bench.report.results import is_wrong


class Entry(NamedTuple):
    """One candidate in one benchmark case."""

    case: BenchmarkCase
    candidate: str

    def __str__(self) -> str:
        return f"{self.case}, {self.candidate}"


def progress_line(result: CaseResult) -> str:
    """Format a case and its fastest candidate in one line."""
    case = f"{result.case.workload.op} {result.case}"
    dtype = result.case.workload.dtypes[0]
    rows = [
        {"implementation": name, "error": candidate.error, "dtype": dtype}
        for name, candidate in result.results.items()
        if candidate.seconds
    ]
    wrong = [row["implementation"] for row in rows if is_wrong(row, rows)]
    times = {
        name: median(candidate.seconds)
        for name, candidate in result.results.items()
        if candidate.seconds and name not in wrong
    }
    if wrong:
        case = f"{case}: WRONG {', '.join(wrong)}"
    if not times:
        return f"{case}: nothing ran" if not wrong else case
    best = min(times, key=times.__getitem__)
    return f"{case}: {best} {duration(times[best])}, of {len(times)}; measured in {result.seconds:.0f} s"


def json_line(result: CaseResult) -> dict[str, Any]:
    """Summarize a case for a file that must be complete even if the run does not finish."""
    results = {}
    for name, candidate in result.results.items():
        if candidate.skip_reason is not None:
            results[name] = {"why": candidate.skip_reason}
        else:
            seconds = median(candidate.seconds) if candidate.seconds else None
            results[name] = {"seconds": seconds, "turns": len(candidate.seconds), "error": candidate.error}
    workload, cost = result.case.workload, result.case.cost()
    return {
        "op": workload.op,
        "spec": workload.name,
        "direction": result.case.direction,
        "sizes": workload.label(),
        "dtype": workload.dtypes[0],
        "flops": cost.flops,
        "ceilings": {"flops_per_second": result.flops_per_second, "bytes_per_second": result.bytes_per_second},
        "results": results,
    }


def entry_names(entry: Entry) -> dict[str, str]:
    """The names by which a report identifies an entry."""
    workload, direction = entry.case.workload, entry.case.direction
    return {"op": workload.op, "spec": workload.name, "direction": direction, "implementation": entry.candidate}


def entry_facts(entry: Entry, result: CaseResult) -> dict[str, Any]:
    """Everything about an entry that a report needs beside its times."""
    workload, candidate = entry.case.workload, result.results[entry.candidate]
    cost = entry.case.cost()
    return entry_names(entry) | {
        "sizes": workload.label(),
        "dtype": workload.dtypes[0],
        "sweep": {axis: sweep_coordinate(workload, axis) for axis in workload.sweep},
        "flops": cost.flops,
        "bytes": cost.bytes,
        "roofline_seconds": cost.seconds(result.flops_per_second, result.bytes_per_second),
        "temp_bytes": candidate.temp_bytes,
        "error": candidate.error,
    }


def run_facts(ceilings: Ceilings | None, skipped: Sequence[dict[str, str]]) -> dict[str, Any]:
    """Everything about a run as a whole, as `bench.report.results.documents` takes it.

    Args:
        ceilings: the ceilings of the roofline, or None if nothing was measured.
        skipped: `entry_names` and "why" of each entry that has no times.
    """
    return {
        "timer": clock().name,
        "ceilings": ceilings.summary() if ceilings else {},
        "refused": list(skipped),
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "cpu": this_cpu(),
        "jax": jax.__version__,
    }
