"""Plant one fault after the other in a copy of the kernels and expect a test to fail.

    python -m tests.mutation [--list] [--only SUBSTRING] [-j N]

The tests that a mutant names run first, all test files of its suite only if those pass. At the end the tests that
failed run without any fault: they must pass. Exit status: 0 if at least 95% of the mutants are caught, 1 if fewer are,
2 if a mutant no longer fits its file or a run is inconclusive.
"""

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.mutation import MUTANTS, Mutant

ROOT = Path(__file__).parents[2]
AOT_ENVIRONMENT = ROOT / ".venv-aot"  # tests of Triton kernels run in it where this one has no Triton
COPIED = ("kernels", "reference", "dantinox", "bench", "tests", "pyproject.toml")
MIN_CAUGHT = 0.95
TIMEOUTS = (300, 900)  # seconds: the tests that a mutant names, all files of its suite
NO_TESTS = (pytest.ExitCode.NO_TESTS_COLLECTED, pytest.ExitCode.USAGE_ERROR)


def copy_tree(folder: Path) -> None:
    """Copy what the tests need of this tree, uncommitted changes included."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    if AOT_ENVIRONMENT.exists():
        (folder / AOT_ENVIRONMENT.name).symlink_to(AOT_ENVIRONMENT)


def can_run(mutant: Mutant) -> bool:
    """Return whether the tests of a mutant run here: those of Triton kernels need Triton."""
    return (
        "triton" not in mutant.suite
        or importlib.util.find_spec("jax_triton") is not None
        or (AOT_ENVIRONMENT / "bin" / "python").exists()
    )


class Runner:
    """Runs pytest in copies of the tree; `stop` ends the processes that still run."""

    def __init__(self) -> None:
        self.running: set[subprocess.Popen] = set()
        self.lock = threading.Lock()
        self.stopped = False

    def run_pytest(self, folder: Path, arguments: Iterable[str], timeout: float) -> tuple[int | None, str]:
        """Run pytest in a folder; returns (exit status, None after a timeout; output)."""
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
            output, _ = process.communicate(timeout=timeout)
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
    """The result of one mutant.

    Attributes:
        outcome: "caught", "survived", or "error" if the run is inconclusive.
        reason: the test that failed, or the error.
    """

    mutant: Mutant
    outcome: str
    reason: str
    seconds: float


def selections(mutant: Mutant) -> list[list[str]]:
    """The arguments of pytest, in order: the tests that a mutant names, then all files of its suite.

    Cases that are named by their ids run even if they are slow.
    """
    with_slow_cases = ["-m", ""] if all("[" in test for test in mutant.tests) else []
    return [[*mutant.node_ids, *with_slow_cases], mutant.files]


def check_mutant(mutant: Mutant, runner: Runner) -> Verdict:
    """Plant one fault in its own copy of the tree and run the tests."""
    start = time.monotonic()

    def verdict(outcome: str, reason: str) -> Verdict:
        return Verdict(mutant, outcome, reason, time.monotonic() - start)

    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        folder = Path(name)
        copy_tree(folder)
        target = folder / mutant.file
        target.write_text(mutant.apply(target.read_text()))
        for arguments, timeout in zip(selections(mutant), TIMEOUTS, strict=True):
            status, output = runner.run_pytest(folder, arguments, timeout)
            failed = failed_tests(output)
            if status == pytest.ExitCode.TESTS_FAILED and failed:
                return verdict("caught", failed[0])
            if status in NO_TESTS:
                return verdict("error", f"no test found by {' '.join(arguments)}")
            if status != pytest.ExitCode.OK:
                return verdict("error", "timeout" if status is None else " ".join(output.split())[-300:])
    return verdict("survived", "")


def failed_tests(output: str) -> list[str]:
    """Read the ids of the tests that failed from pytest's summary."""
    return [line.removeprefix("FAILED ").split(" - ")[0] for line in output.splitlines() if line.startswith("FAILED ")]


def failures_without_fault(verdicts: list[Verdict], runner: Runner) -> str:
    """Run the tests that caught a mutant on the unchanged tree; returns pytest's output, or "" if they pass."""
    tests = sorted({verdict.reason for verdict in verdicts if verdict.outcome == "caught"})
    if not tests:
        return ""
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        copy_tree(Path(name))
        status, output = runner.run_pytest(Path(name), [*tests, "-m", ""], TIMEOUTS[1])
    return "" if status == pytest.ExitCode.OK else output[-2000:] or "timeout"


def print_verdict(verdict: Verdict) -> None:
    reason = verdict.reason.removeprefix("tests/kernels/")
    print(f"{verdict.outcome:9}{verdict.seconds:5.0f} s  {verdict.mutant.title:58}  {reason}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="list the mutants and exit")
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="only mutants with this in their title")
    parser.add_argument("-j", type=int, default=os.cpu_count() or 1, metavar="N", help="mutants at a time (all cores)")
    options = parser.parse_args()
    mutants = [mutant for mutant in MUTANTS if options.only in mutant.title]
    try:
        for mutant in mutants:
            mutant.apply((ROOT / mutant.file).read_text())
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    if options.list or not mutants:
        print("\n".join(mutant.title for mutant in mutants) or f"no mutant's title contains {options.only!r}")
        return 0 if mutants else 2
    if left_out := [mutant for mutant in mutants if not can_run(mutant)]:
        print(f"{len(left_out)} mutants left out: no Python here has jax-triton; `make aot` installs it", flush=True)
        mutants = [mutant for mutant in mutants if can_run(mutant)]
    # Either signal must leave no process and no folder behind.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    start, runner, verdicts = time.monotonic(), Runner(), []
    pool = ThreadPoolExecutor(max(1, options.j))
    try:
        for done in as_completed([pool.submit(check_mutant, mutant, runner) for mutant in mutants]):
            verdicts.append(done.result())
            print_verdict(verdicts[-1])
        failures = failures_without_fault(verdicts, runner)
    except KeyboardInterrupt:
        # A second signal must not interrupt the clean-up.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        print("stopped", file=sys.stderr)
        return 130
    finally:
        runner.stop()
        pool.shutdown(cancel_futures=True)
    count = Counter(verdict.outcome for verdict in verdicts)
    minutes, cpu_minutes = (time.monotonic() - start) / 60, os.times().children_user / 60
    print(
        f"{count['caught']} of {len(verdicts)} caught, {count['survived']} survived, {count['error']} errors,", end=" "
    )
    print(f"{minutes:.1f} minutes, {cpu_minutes:.1f} CPU minutes")
    for verdict in verdicts:
        if verdict.outcome != "caught":
            print_verdict(verdict)
    if failures:
        print(f"tests that caught a mutant fail without a fault too:\n{failures}", file=sys.stderr)
    if failures or count["error"]:
        return 2
    return 0 if count["caught"] >= MIN_CAUGHT * len(verdicts) else 1


if __name__ == "__main__":
    raise SystemExit(main())
