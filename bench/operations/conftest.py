"""How `bench_*.py` become benchmarks: pytest-benchmark keeps the statistics, `bench.runner` takes the times.

pytest-benchmark runs one test after the other, but implementations must take turns, and on a GPU the time is the
device's own. So the first test of a contest holds all of it, and every test hands its own times to pytest-benchmark by
a clock that replays them.
"""

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from bench.operations import record, runner
from bench.operations.record import Entry
from bench.operations.roofline import Ceilings
from bench.operations.timer import clock
from dantinox.kernels import workloads
from dantinox.system import malloc


class Replay:
    """A timer that tells the recorded durations: each pair of calls is one start and one end."""

    def __init__(self) -> None:
        self.now, self.running, self.durations = 0.0, False, iter(())

    def load(self, seconds: list[float]) -> None:
        """What the next pairs of calls will show."""
        self.durations, self.running = iter(seconds), False

    def __call__(self) -> float:
        if self.running:
            self.now += next(self.durations)
        self.running = not self.running
        return self.now


TIMER = Replay()
RUN: dict[str, Any] = {"held": None, "refused": [], "ceilings": None, "progress": False}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench", "DantinoX benchmarks")
    group.addoption("--spec", action="append", default=[], help="rows by name; default: all of this machine")
    group.addoption("--implementation", action="append", default=[], help="implementations by name; default: all")
    group.addoption("--machine", default=None, choices=workloads.DEVICES, help="whose rows; default: this device's")
    group.addoption("--budget", type=float, default=1.0, help="seconds of timing for each row and direction")
    group.addoption("--seconds", type=float, default=0, help="start no further row after so many seconds; 0: no limit")
    group.addoption("--progress", action="store_true", help="one line a contest instead of pytest's own report")
    group.addoption("--lines", default=None, help="file to append each contest to, as soon as it was held")
    group.addoption("--direction", default=None, choices=("forward", "forward+backward"), help="default: both")


def pytest_configure(config: pytest.Config) -> None:
    malloc.tune_glibc_malloc()
    RUN.update(progress=config.getoption("--progress"), start=time.monotonic())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "entry" not in metafunc.fixturenames:
        return
    option, op = metafunc.config.getoption, metafunc.module.OP
    chosen = bool(option("--spec") or option("--direction"))
    contests = runner.contests(op, option("--machine"), every=chosen)
    if names := option("--spec"):
        contests = [c for c in contests if c.spec.name in names]
    if direction := option("--direction"):
        contests = [c for c in contests if c.direction == direction]
    only = option("--implementation")
    entries = [Entry(c, name) for c in contests for name in runner.contestants(c.spec) if not only or name in only]
    marks = lambda entry: pytest.mark.benchmark(group=str(entry.contest), timer=TIMER)
    metafunc.parametrize("entry", [pytest.param(e, id=str(e), marks=marks(e)) for e in entries])


@pytest.fixture(scope="session")
def ceilings() -> Ceilings:
    RUN["ceilings"] = Ceilings(clock())
    return RUN["ceilings"]


@pytest.fixture
def replay(benchmark: Any, ceilings: Ceilings, request: pytest.FixtureRequest) -> Iterator[Callable[[Entry], None]]:
    """Hands the times of one entry to pytest-benchmark, with everything else that the report shows."""
    option = request.config.getoption

    def run(entry: Entry) -> None:
        held = RUN["held"]
        if held is None or held.contest != entry.contest:
            limit = option("--seconds")
            if limit and held and time.monotonic() - RUN["start"] > limit:
                RUN["refused"].append(record.names_of(entry) | {"why": "no time was left"})
                pytest.skip("no time left")
            only = tuple(option("--implementation"))
            RUN["held"] = held = runner.hold(entry.contest, ceilings, budget=option("--budget"), only=only)
            if RUN["progress"]:
                print(record.progress(held), flush=True)
            if path := option("--lines"):
                with open(path, "a") as file:
                    file.write(json.dumps(record.line(held)) + "\n")
        result = held.results[entry.implementation]
        if result.refused is not None:
            RUN["refused"].append(record.names_of(entry) | {"why": result.refused})
            pytest.skip(result.refused)
        benchmark.extra_info.update(record.facts_of(entry, held))
        TIMER.load(result.seconds)
        benchmark.pedantic(lambda: None, rounds=len(result.seconds), iterations=1)

    yield run


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Without pytest's own report a failure must still be seen."""
    if report.failed and RUN["progress"]:
        print(report.longreprtext, flush=True)


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list, output_json: dict[str, Any]) -> None:
    """What belongs to the whole run."""
    output_json["bench"] = record.run_facts(RUN["ceilings"], RUN["refused"])
