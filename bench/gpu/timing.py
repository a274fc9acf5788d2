"""Time benchmark cases without pytest, and write the results after every case."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.operations import record, runner
from bench.operations.roofline import Ceilings
from bench.operations.timer import clock
from bench.report import results
from bench.report.cpu import this_cpu


@dataclass(frozen=True)
class Arguments:
    """What to time, and how long."""

    op: str
    out: str
    """Folder for <device>/<date>-<op>.json."""
    lines: str
    """File to which each finished case is appended, one JSON object per line."""
    spec: tuple[str, ...] = ()
    """Workloads by name (default: all of this device)."""
    implementation: tuple[str, ...] = ()
    """Implementations and baselines by name (default: all)."""
    budget: float = 0.3
    """Seconds of timing per workload and direction."""
    seconds: float = 0.0
    """Start no further case after this many seconds (0: no limit)."""


def run(arguments: Arguments) -> int:
    """Time the cases in order; return 1 if nothing was measured."""
    this_cpu()  # the load average of now, before the benchmarks add to it
    start, ceilings = time.monotonic(), Ceilings(clock())
    measured: list[tuple[dict[str, Any], list[float]]] = []
    skipped: list[dict[str, str]] = []
    for number, case in enumerate(choose_cases(arguments)):
        if number and arguments.seconds and time.monotonic() - start > arguments.seconds:
            skipped.append(record.entry_names(record.Entry(case, "all")) | {"why": "no time was left"})
            continue
        outcome = runner.run_case(case, ceilings, budget=arguments.budget, only=arguments.implementation)
        print(record.progress_line(outcome), flush=True)
        with open(arguments.lines, "a", encoding="utf-8") as file:
            file.write(json.dumps(record.json_line(outcome)) + "\n")
        for name, result in outcome.results.items():
            entry = record.Entry(case, name)
            if result.skip_reason is not None or not result.seconds:
                skipped.append(record.entry_names(entry) | {"why": result.skip_reason or "not timed"})
            else:
                measured.append((record.entry_facts(entry, outcome), result.seconds))
        # After every case, because a later one may be cut short.
        results.write(results.documents(record.run_facts(ceilings, skipped), measured), Path(arguments.out))
    return 0 if measured else 1


def choose_cases(arguments: Arguments) -> list[runner.BenchmarkCase]:
    """List the cases to time. Workloads that are named may be meant for another device."""
    if not arguments.spec:
        return runner.benchmark_cases(arguments.op)
    cases: dict[runner.BenchmarkCase, None] = {}  # an ordered set
    for device in runner.DEVICES.values():
        for case in runner.benchmark_cases(arguments.op, device, all_directions=True):
            if case.workload.name in arguments.spec:
                cases[case] = None
    return list(cases)
