"""Time bench rows without pytest: `bench.runner` on the rows given, results written after each."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.operations import record, runner
from bench.operations.roofline import Ceilings
from bench.operations.timer import clock
from bench.report import results


@dataclass(frozen=True)
class Arguments:
    """Which rows, and how long."""

    op: str
    out: str
    """Folder for <device>/<date>-<op>.json."""
    lines: str
    """File to which each case is appended, a JSON object per line."""
    spec: tuple[str, ...] = ()
    """Rows by name; none: all of this device."""
    implementation: tuple[str, ...] = ()
    """Implementations by name, peers too; none: all."""
    budget: float = 0.3
    """Seconds of timing for each row and direction."""
    seconds: float = 0.0
    """Start no further row after so many seconds; 0: no limit."""


def run(arguments: Arguments) -> int:
    """Time the rows in order; 1 where nothing was measured."""
    start, ceilings = time.monotonic(), Ceilings(clock())
    cases = runner.contests(arguments.op, every=bool(arguments.spec))
    if arguments.spec:  # rows may be meant for another machine
        named = [case for machine in runner.MACHINE.values() for case in runner.contests(arguments.op, machine, True)]
        cases = list(dict.fromkeys(case for case in named if case.spec.name in arguments.spec))
    measured: list[tuple[dict[str, Any], list[float]]] = []
    refused: list[dict[str, str]] = []
    for number, case in enumerate(cases):
        if number and arguments.seconds and time.monotonic() - start > arguments.seconds:
            refused.append({"op": arguments.op, "spec": case.spec.name, "direction": case.direction})
            refused[-1] |= {"implementation": "all", "why": "no time was left"}
            continue
        outcome = runner.hold(case, ceilings, budget=arguments.budget, only=arguments.implementation)
        print(record.progress(outcome), flush=True)
        with open(arguments.lines, "a") as file:
            file.write(json.dumps(record.line(outcome)) + "\n")
        for name, result in outcome.results.items():
            entry = record.Entry(case, name)
            if result.refused is not None or not result.seconds:
                refused.append(record.names_of(entry) | {"why": result.refused or "not timed"})
            else:
                measured.append((record.facts_of(entry, outcome), result.seconds))
        # After each row: what comes later may not end.
        results.write(results.documents(record.run_facts(ceilings, refused), measured), Path(arguments.out))
    return 0 if measured else 1
