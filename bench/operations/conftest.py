"""Turn `bench_*.py` into benchmarks: pytest-benchmark keeps the statistics, `bench.operations.runner` takes the times.

pytest-benchmark runs one test after the other, but the candidates of a case must take turns, and on a GPU the time is
the device's own. So the first test of a case runs all of it, and every test hands its own times to pytest-benchmark
through a timer that replays them.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from bench.operations import record, runner
from bench.operations.record import Entry
from bench.operations.roofline import Ceilings
from bench.operations.timer import clock
from bench.report.cpu import this_cpu
from dantinox.kernels import workloads
from dantinox.system import malloc


class ReplayTimer:
    """A timer that replays recorded durations: each pair of calls is a start and an end."""

    def __init__(self) -> None:
        self.now, self.running, self.durations = 0.0, False, iter(())

    def load(self, seconds: list[float]) -> None:
        """Set the durations of the next pairs of calls."""
        self.durations, self.running = iter(seconds), False

    def __call__(self) -> float:
        """Return the time; every second call ends the next of the recorded durations."""
        if self.running:
            self.now += next(self.durations)
        self.running = not self.running
        return self.now


@dataclass
class Run:
    """State of the pytest run.

    Attributes:
        result: the newest result of a case.
        skipped: names and reasons of the entries without times.
        ceilings: the ceilings of the roofline.
        progress: whether to print a line per case.
        start: `time.monotonic` at the start.
    """

    result: runner.CaseResult | None = None
    skipped: list[dict[str, str]] = field(default_factory=list)
    ceilings: Ceilings | None = None
    progress: bool = False
    start: float = 0.0


TIMER = ReplayTimer()
RUN = Run()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options that select the cases and limit their time."""
    group = parser.getgroup("bench", "DantinoX benchmarks")
    group.addoption("--spec", action="append", default=[], help="workloads by name; default: all of this device")
    group.addoption("--implementation", action="append", default=[], help="implementations by name; default: all")
    group.addoption("--machine", default=None, choices=workloads.DEVICES, help="whose workloads; default: this one's")
    group.addoption("--budget", type=float, default=1.0, help="seconds of timing per workload and direction")
    group.addoption("--seconds", type=float, default=0, help="start no further case after this time; 0: no limit")
    group.addoption("--progress", action="store_true", help="print a line per case instead of pytest's own report")
    group.addoption("--lines", default=None, help="file to which each finished case is appended, as a line of JSON")
    group.addoption("--direction", default=None, choices=("forward", "forward+backward"), help="default: both")


def pytest_configure(config: pytest.Config) -> None:
    """Set up the allocator and start the clock of the run."""
    malloc.tune_glibc_malloc()
    this_cpu()  # the load average of now, before the benchmarks add to it
    RUN.progress, RUN.start = config.getoption("--progress"), time.monotonic()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make one test per case and implementation."""
    if "entry" not in metafunc.fixturenames:
        return
    option, op = metafunc.config.getoption, metafunc.module.OP
    selective = bool(option("--spec") or option("--direction"))
    cases = runner.benchmark_cases(op, option("--machine"), all_directions=selective)
    if names := option("--spec"):
        cases = [case for case in cases if case.workload.name in names]
    if direction := option("--direction"):
        cases = [case for case in cases if case.direction == direction]
    only = option("--implementation")
    entries = [
        Entry(case, name) for case in cases for name in runner.candidates(case.workload) if not only or name in only
    ]
    params = [
        pytest.param(entry, id=str(entry), marks=pytest.mark.benchmark(group=str(entry.case), timer=TIMER))
        for entry in entries
    ]
    metafunc.parametrize("entry", params)


@pytest.fixture(scope="session")
def ceilings() -> Ceilings:
    """The ceilings of the roofline, measured once per run."""
    RUN.ceilings = Ceilings(clock())
    return RUN.ceilings


@pytest.fixture
def replay(benchmark: Any, ceilings: Ceilings, request: pytest.FixtureRequest) -> Iterator[Callable[[Entry], None]]:
    """A function that hands the times of an entry to pytest-benchmark, with the facts that the report shows."""
    option = request.config.getoption

    def skip(entry: Entry, reason: str, message: str) -> None:
        RUN.skipped.append(record.entry_names(entry) | {"why": reason})
        pytest.skip(message)

    def run_case(entry: Entry) -> runner.CaseResult:
        only = tuple(option("--implementation"))
        result = runner.run_case(entry.case, ceilings, budget=option("--budget"), only=only)
        if RUN.progress:
            print(record.progress_line(result), flush=True)
        if path := option("--lines"):
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record.json_line(result)) + "\n")
        return result

    def replay_entry(entry: Entry) -> None:
        if RUN.result is None or RUN.result.case != entry.case:
            limit = option("--seconds")
            if limit and RUN.result and time.monotonic() - RUN.start > limit:
                skip(entry, "no time was left", "no time left")
            RUN.result = run_case(entry)
        candidate = RUN.result.results[entry.candidate]
        if candidate.skip_reason is not None:
            skip(entry, candidate.skip_reason, candidate.skip_reason)
        benchmark.extra_info.update(record.entry_facts(entry, RUN.result))
        TIMER.load(candidate.seconds)
        benchmark.pedantic(lambda: None, rounds=len(candidate.seconds), iterations=1)

    yield replay_entry


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Print failures, which pytest's own report would show."""
    if report.failed and RUN.progress:
        print(report.longreprtext, flush=True)


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list, output_json: dict[str, Any]) -> None:
    """Add the facts about the run as a whole."""
    output_json["bench"] = record.run_facts(RUN.ceilings, RUN.skipped)
