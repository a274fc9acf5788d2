"""What is kept of a finished contest: its names, the facts beside its times, one line for people, one for a file."""

from collections.abc import Sequence
from statistics import median
from typing import Any, NamedTuple

import jax

from bench.operations import runner
from bench.operations.roofline import Ceilings
from bench.operations.timer import clock
from bench.report.console_table import duration


class Entry(NamedTuple):
    """One implementation in one contest."""

    contest: runner.Contest
    implementation: str

    def __str__(self) -> str:
        return f"{self.contest}, {self.implementation}"


def progress(held: runner.Outcome) -> str:
    """One line: the contest and its fastest implementation."""
    times = {name: median(r.seconds) for name, r in held.results.items() if r.seconds}
    if not times:
        return f"{held.contest.spec.op} {held.contest}: nothing ran"
    best = min(times, key=times.__getitem__)
    took = f"measured in {held.seconds:.0f} s"
    return f"{held.contest.spec.op} {held.contest}: {best} {duration(times[best])}, of {len(times)}; {took}"


def line(held: runner.Outcome) -> dict[str, Any]:
    """What is kept of a contest should the run not come to its end."""
    results = {
        name: {"why": r.refused}
        if r.refused is not None
        else {"seconds": median(r.seconds) if r.seconds else None, "turns": len(r.seconds), "error": r.error}
        for name, r in held.results.items()
    }
    workload, cost = held.contest.spec, held.contest.cost()
    return {
        "op": workload.op,
        "spec": workload.name,
        "direction": held.contest.direction,
        "sizes": workload.label(),
        "dtype": workload.dtypes[0],
        "flops": cost.flops,
        "ceilings": {"flops_per_second": held.flops_per_second, "bytes_per_second": held.bytes_per_second},
        "results": results,
    }


def names_of(entry: Entry) -> dict[str, str]:
    """What an entry is called."""
    workload, direction = entry.contest.spec, entry.contest.direction
    return {"op": workload.op, "spec": workload.name, "direction": direction, "implementation": entry.implementation}


def facts_of(entry: Entry, held: runner.Outcome) -> dict[str, Any]:
    """What the report needs beside the times."""
    workload, result = entry.contest.spec, held.results[entry.implementation]
    cost = entry.contest.cost()
    return names_of(entry) | {
        "sizes": workload.label(),
        "dtype": workload.dtypes[0],
        "sweep": {axis: runner.position(workload, axis) for axis in workload.sweep},
        "flops": cost.flops,
        "bytes": cost.bytes,
        "roofline_seconds": cost.seconds(held.flops_per_second, held.bytes_per_second),
        "temp_bytes": result.temp_bytes,
        "error": result.error,
    }


def run_facts(ceilings: Ceilings | None, refused: Sequence[dict[str, str]]) -> dict[str, Any]:
    """What belongs to a whole run, as `bench.results.documents` takes it."""
    return {
        "timer": clock().name,
        "ceilings": ceilings.summary() if ceilings else {},
        "refused": list(refused),
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "jax": jax.__version__,
    }
