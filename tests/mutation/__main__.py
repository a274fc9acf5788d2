"""Do the tests notice? Plants one fault after the other in a copy of the kernels and expects a test to fail.

    python -m tests.mutation [--list] [--only SUBSTRING] [-j N]

For each fault the tests most likely to notice run first, all of the operation's only where those pass. At the end the
tests that noticed run without any fault: they must pass. Exit status: 0 where at least 95% are caught, 1 where fewer,
2 where a fault no longer fits its file or a run proves nothing.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from tests.mutation import FILES, MUTANTS, Mutant

ROOT = Path(__file__).parents[2]
COPIED = ("kernels", "reference", "dantinox", "bench", "tests", "pyproject.toml")
ENOUGH = 0.95
LIMITS = (300, 900)  # seconds: the likely tests, all tests of the operation


def copy(to: Path) -> None:
    """What the tests need of this tree, uncommitted changes and all."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, to / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, to / name)


class Runner:
    """Runs pytest in copies of the tree; `stop` ends what is still running."""

    def __init__(self) -> None:
        self.running: set[subprocess.Popen] = set()
        self.lock = threading.Lock()
        self.stopped = False

    def pytest(self, folder: Path, arguments: Iterable[str], limit: float) -> tuple[int | None, str]:
        """(exit status, None where time ran out; output)."""
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "--tb=no", "-p", "no:cacheprovider", *arguments]
        # Wide lines, so that no test's name is cut short.
        environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "400"}
        environment.pop("PYTHONPATH", None)
        with self.lock:
            if self.stopped:
                return None, ""
            process = subprocess.Popen(
                command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            self.running.add(process)
        try:
            output, _ = process.communicate(timeout=limit)
            return process.returncode, output
        except subprocess.TimeoutExpired:
            process.kill()
            return None, process.communicate()[0]
        finally:
            with self.lock:
                self.running.discard(process)

    def stop(self) -> None:
        with self.lock:
            self.stopped = True
            for process in self.running:
                process.kill()


class Verdict(NamedTuple):
    """What became of a fault: caught, survived, or error (the run proves nothing); by which test, or why."""

    mutant: Mutant
    what: str
    by: str
    seconds: float


def judge(mutant: Mutant, runner: Runner) -> Verdict:
    """Plant one fault in a copy of its own and run the tests."""
    began = time.monotonic()
    verdict = lambda what, by: Verdict(mutant, what, by, time.monotonic() - began)
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        folder = Path(name)
        copy(folder)
        target = folder / mutant.file
        target.write_text(mutant.applied(target.read_text()))
        first, *_ = files = [f"tests/{file}.py" for file in FILES[mutant.tests]]
        likely = [first, "-k", mutant.likely, *(["-m", ""] if mutant.likely.startswith("slow and") else [])]
        for arguments, limit in zip((likely, files), LIMITS, strict=True):
            status, output = runner.pytest(folder, arguments, limit)
            failed = failures(output)
            if status == 1 and failed:
                return verdict("caught", failed[0])
            if status == 5 and arguments != files:
                return verdict("error", f"-k {mutant.likely!r} selects no test")
            if status != 0:
                return verdict("error", "time ran out" if status is None else " ".join(output.split())[-300:])
    return verdict("survived", "")


def failures(output: str) -> list[str]:
    """The ids of the tests that failed, from pytest's summary."""
    return [line.removeprefix("FAILED ").split(" - ")[0] for line in output.splitlines() if line.startswith("FAILED ")]


def innocent(verdicts: list[Verdict], runner: Runner) -> str:
    """Empty where the tests that noticed a fault pass without one, else what pytest said."""
    tests = sorted({verdict.by for verdict in verdicts if verdict.what == "caught"})
    if not tests:
        return ""
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        copy(Path(name))
        status, output = runner.pytest(Path(name), tests, LIMITS[1])
    return "" if status == 0 else output[-2000:] or "time ran out"


def show(verdict: Verdict) -> None:
    by = verdict.by.removeprefix("tests/kernels/")
    print(f"{verdict.what:9}{verdict.seconds:5.0f} s  {verdict.mutant.title:58}  {by}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="show the faults and stop")
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="the faults whose title holds this")
    parser.add_argument("-j", type=int, default=os.cpu_count() or 1, metavar="N", help="at once (all cores)")
    options = parser.parse_args()
    mutants = [mutant for mutant in MUTANTS if options.only in mutant.title]
    try:
        for mutant in mutants:
            mutant.applied((ROOT / mutant.file).read_text())
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    if options.list or not mutants:
        print("\n".join(mutant.title for mutant in mutants) or f"no fault's title holds {options.only!r}")
        return 0 if mutants else 2
    # However it is stopped, nothing is left behind.
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.default_int_handler)
    began, runner, verdicts = time.monotonic(), Runner(), []
    pool = ThreadPoolExecutor(max(1, options.j))
    try:
        for done in as_completed([pool.submit(judge, mutant, runner) for mutant in mutants]):
            verdicts.append(done.result())
            show(verdicts[-1])
        blame = innocent(verdicts, runner)
    except KeyboardInterrupt:
        # A second signal must not interrupt the clearing up.
        for stop in (signal.SIGINT, signal.SIGTERM):
            signal.signal(stop, signal.SIG_IGN)
        print("stopped", file=sys.stderr)
        return 130
    finally:
        runner.stop()
        pool.shutdown(cancel_futures=True)
    count = {what: sum(verdict.what == what for verdict in verdicts) for what in ("caught", "survived", "error")}
    print(
        f"{count['caught']} of {len(verdicts)} caught, {count['survived']} survived, {count['error']} errors,", end=" "
    )
    print(f"{(time.monotonic() - began) / 60:.1f} minutes, {os.times().children_user / 60:.1f} of a core")
    for verdict in verdicts:
        if verdict.what != "caught":
            show(verdict)
    if blame:
        print(f"tests that noticed a fault fail without one too:\n{blame}", file=sys.stderr)
    if blame or count["error"]:
        return 2
    return 0 if count["caught"] >= ENOUGH * len(verdicts) else 1


if __name__ == "__main__":
    raise SystemExit(main())
