"""Measure which block sizes and which implementations are fastest on this device (`python -m bench.tune`).

Starts from the heuristics and changes one size at a time for as long as that helps. Each choice is measured in a
process of its own, in turns with the heuristics, so a crash costs one choice and a busy machine slows both. The results
are written after each workload, to kernels/tuned/<device>.json, which the operations read. Ctrl-C ends it.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.operations.runner import BenchmarkCase, benchmark_cases
from bench.tune import results
from bench.tune.measurement import Order
from bench.tune.neighbors import neighbors
from dantinox import cli, kernels
from dantinox.kernels import dispatch, tuning
from dantinox.system.console import Console

PROG = "bench.tune"
SECONDS_PER_CHOICE = 300.0  # after which a process is stopped
TUNED = ("pallas", "triton", "xla")


@dataclass(frozen=True)
class Arguments:
    """What to measure."""

    op: tuple[str, ...] = dispatch.OPERATIONS
    """Operations (default: all)."""
    spec: tuple[str, ...] = ()
    """Workloads by name (default: those that `make bench` times on this device)."""
    implementation: tuple[str, ...] = TUNED
    """Implementations whose block sizes to measure."""
    minutes: float = 30.0
    """Start no further choice after this many minutes."""
    rounds: int = 7
    """Turns of each choice."""
    out: Path | None = None
    """File of the results (default: kernels/tuned/<device>.json)."""


@dataclass
class Tuner:
    """Measures the workloads of a run, until its time is over."""

    arguments: Arguments
    deadline: float
    console: Console

    def is_over(self) -> bool:
        """Return whether the time of the run is over."""
        return time.monotonic() > self.deadline

    def run(self, order: Order) -> dict[str, Any] | str:
        """Run an order in a process of its own; return its result, or why it failed."""
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        words = [sys.executable, "-m", "bench.tune.measurement"]
        try:
            done = subprocess.run(
                words, input=order.to_json(), env=environment, capture_output=True, timeout=SECONDS_PER_CHOICE,
                encoding="utf-8", errors="replace", check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"it took longer than {SECONDS_PER_CHOICE:.0f} s"
        if done.returncode:
            lines = [line for line in done.stderr.strip().splitlines() if line and not line.startswith(("-", "For "))]
            return " ".join(lines[-1:])[:200] or f"exit code {done.returncode}"
        return json.loads(done.stdout.splitlines()[-1])

    def tune_block_sizes(self, case: BenchmarkCase, implementation: str) -> dict[str, results.Choice]:
        """Return the choices that are faster than those of the heuristics, by name."""
        op, name, rounds = case.workload.op, case.workload.name, self.arguments.rounds
        own = self.run(Order(op, name, case.backward, implementation))
        if isinstance(own, str):
            self.say(f"  {implementation}: {own}")
            return {}
        best: dict[str, results.Choice] = {}
        for key, heuristic in own["choices"].items():
            current, tried = heuristic, [heuristic]
            while True:
                found: list[results.Choice] = []
                for choice in neighbors(current):
                    if choice in tried or self.is_over():
                        continue
                    tried.append(choice)
                    base = {other: row.choice for other, row in best.items() if other != key}
                    result = self.run(Order(op, name, case.backward, implementation, base, {key: choice}, rounds))
                    if not isinstance(result, str):
                        row = results.Choice(choice, heuristic, result["ratio"], tuple(result["spread"]), name)
                        found += [row] * row.is_faster()
                row = min(found, key=lambda row: row.ratio, default=None)
                if row is None or row.ratio >= (best[key].ratio if key in best else 1):
                    break
                best[key], current = row, row.choice
            last = f"{best[key].choice}, {best[key].ratio:.2f} of the time" if key in best else "kept"
            self.say(f"  {key}: {heuristic}: {len(tried) - 1} others: {last}")
        return best

    def compare_implementations(self, case: BenchmarkCase, choices: dict[str, results.Choice]) -> dict[str, Any]:
        """Return the implementations that are fastest by more than the noise, by call."""
        base = {key: row.choice for key, row in choices.items()}
        order = Order(case.workload.op, case.workload.name, case.backward, base=base, rounds=self.arguments.rounds)
        result = self.run(order)
        if isinstance(result, str):
            self.say(f"  implementations: {result}")
            return {}
        self.say("  " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in result["ratios"].items()))
        return results.fastest(result, case.workload.name)

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, highlight=False, soft_wrap=True)


def cases_of(arguments: Arguments) -> list[BenchmarkCase]:
    """Return the workloads to measure, with gradients where they have some.

    Raises:
        ValueError: a name is unknown.
    """
    for op in arguments.op:
        if op not in dispatch.OPERATIONS:
            raise ValueError(f"--op is {op!r}; allowed: {', '.join(dispatch.OPERATIONS)}")
    for name in arguments.implementation:
        if name not in TUNED:
            raise ValueError(f"--implementation is {name!r}; allowed: {', '.join(TUNED)}")
    found: dict[tuple[str, str], BenchmarkCase] = {}
    for op in arguments.op:
        for case in benchmark_cases(op):
            found[op, case.workload.name] = case  # the last direction: with gradients if it has some
    if not arguments.spec:
        return list(found.values())
    for name in arguments.spec:
        if not any(workload == name for _, workload in found):
            raise ValueError(f"--spec is {name!r}; allowed: {', '.join(name for _, name in found)}")
    return [case for (_, name), case in found.items() if name in arguments.spec]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write; returns the exit code."""
    arguments = cli.parse(Arguments, argv, default=Arguments(), prog=PROG, description=__doc__.split("\n")[0])
    with cli.one_line_errors(PROG):
        for name in ("minutes", "rounds"):
            if getattr(arguments, name) <= 0:
                raise ValueError(f"--{name} is {getattr(arguments, name)}; allowed: more than 0")
        device = dispatch.current_device()
        path = arguments.out or tuning.table_path(device)
        document = results.read(path, device.kind)
        tuner = Tuner(arguments, time.monotonic() + 60 * arguments.minutes, Console(width=140))
        cases = cases_of(arguments)
        for number, case in enumerate(cases, 1):
            if tuner.is_over():
                tuner.say(f"no time left for {len(cases) - number + 1} of {len(cases)} workloads")
                break
            tuner.say(f"{case.workload.op}, {case}")
            able = [name for name, why in kernels.implementations(case.workload.op).items() if why is None]
            choices: dict[str, results.Choice] = {}
            for implementation in arguments.implementation:
                if implementation in able:
                    choices |= tuner.tune_block_sizes(case, implementation)
            winners = {} if tuner.is_over() else tuner.compare_implementations(case, choices)
            document = results.merge(document, choices, winners, case.workload.name)
            results.write(path, document)
        tuner.say(f"wrote {path}: {results.summary(document)}")
    return 0


if __name__ == "__main__":
    cli.run_main(main)
