"""Train the runs of a sweep file one after the other: `python -m dantinox.sweep sweeps/example.yaml`.

The folder runs/NAME/ contains the runs and the results: results.md, results.csv, results.png. Runs are identified by
their settings. Running a sweep again skips finished runs and resumes interrupted or failed ones.
"""

import contextlib
import fcntl
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from dantinox import cli
from dantinox.config import ConfigError
from dantinox.config.validation import check
from dantinox.metrics import wandb_logger
from dantinox.metrics.logger import read_metrics
from dantinox.sweep import report
from dantinox.sweep.report import Outcome
from dantinox.sweep.search_space import Run, Sweep, load_sweep
from dantinox.system import streams
from dantinox.system.console import Console, plain_console
from dantinox.system.run_lock import RunLock
from dantinox.training.signals import handled, stop_signals

PROG = "dantinox-sweep"


@dataclass(frozen=True)
class Arguments:
    """Train the runs of a sweep file."""

    file: str | None = None
    """The sweep file, in the format of W&B."""
    runs_dir: str = "runs"
    """Folder in which the sweep creates a folder of its name."""
    seed: int = 0
    """Seed of the draws of a random sweep; --seed of dantinox.train is a parameter of the sweep instead."""
    wandb: bool = False
    """Log each run to W&B, as with --wandb of dantinox.train."""
    dry_run: bool = False
    """List the runs without training."""
    verbose: bool = False
    """Show tracebacks."""


@dataclass
class Sweeper:
    """Trains the runs of one sweep, each in its own process, so that a crash loses only one run."""

    sweep: Sweep
    runs: list[Run]
    folder: Path
    wandb: bool = False
    lock: int = -1  # file handle of the lock of the folder, inherited by the runs
    console: Console = field(default_factory=plain_console)
    received: int | None = None  # the signal that ends the sweep

    def train_runs(self) -> list[Outcome]:
        """Train the runs that are not done, until a signal arrives, and return the outcome of every run."""
        outcomes = [report.load_outcome(run, self.folder) for run in self.runs]
        with self._forward_signals():
            for i, run in enumerate(self.runs):
                label = f"{i + 1}/{len(self.runs)} {run.name}"
                if self.received is None and outcomes[i].state not in ("done", "refused"):
                    outcomes[i] = self._train_run(run, label)
                    report.write_results(self.sweep, outcomes, self.folder)
                if self.received is None or outcomes[i].state == "interrupted":
                    self._print(f"{label}: {outcomes[i].one_line(self.sweep.metric)}")
        report.write_results(self.sweep, outcomes, self.folder)
        return outcomes

    def _train_run(self, run: Run, label: str) -> Outcome:
        """Start or resume a run in a process of its own and wait for it."""
        path = self.folder / run.name
        has_started = (path / "config.yaml").is_file()
        flags = [*(["--resume"] if has_started else run.flags()), *(["--wandb"] if self.wandb else [])]
        command = [sys.executable, "-m", "dantinox.train", "--run", run.name, "--runs-dir", str(self.folder), *flags]
        log = self.folder / f"{run.name}.log"
        self._print(f"{label}: {'resumes' if has_started else 'starts'}; its output is in {log}")
        with log.open("ab") as output:
            output_start = output.tell()
            # A process group of its own, so that Ctrl-C reaches only this process, which forwards it once.
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                process_group=0,
                env={"WANDB_RUN_GROUP": self.sweep.name}
                | os.environ
                | {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"},
                pass_fds=(self.lock,),  # a run that outlives this process keeps the lock
            )
            if self.received is not None:  # a signal that arrived before the process existed
                self._child.send_signal(self.received)
            try:
                code = self._wait(path, label)
            except BaseException:
                self._child.terminate()  # it saves its state
                self._child.wait()
                raise
        if code == 0:
            return report.collect_result(run, self.folder)
        if self.received is not None or code in [128 + number for number in stop_signals()]:
            return Outcome(run, "interrupted")
        if code < 0:
            return Outcome(run, "failed", reason=f"killed by {signal.Signals(-code).name}")
        with log.open("rb") as output:
            output.seek(output_start)
            lines = output.read().decode(errors="replace").splitlines() or [""]
        return Outcome(run, "failed", reason=lines[-1].removeprefix("dantinox-train: error: "))

    def _print(self, text: str) -> None:
        """Print a line; without a terminal any more, as after SIGHUP, the sweep ends in order and in silence."""
        try:
            self.console.print(text, markup=False)
        except BrokenPipeError:
            raise
        except OSError:
            streams.discard(self.console.file)

    def _wait(self, path: Path, label: str) -> int:
        """Wait for the run, show its progress on a terminal, and return its exit code."""
        assert self._child is not None
        status: Any = self.console.status(label) if self.console.is_terminal else contextlib.nullcontext()
        with status:
            while True:
                try:
                    return self._child.wait(0.5)
                except subprocess.TimeoutExpired:
                    if self.console.is_terminal and (rows := read_metrics(path / "metrics.jsonl")):
                        loss = "not finite" if rows[-1]["loss"] is None else f"{rows[-1]['loss']:.4f}"
                        status.update(f"{label}: step {rows[-1]['step']}, loss {loss}")

    @contextlib.contextmanager
    def _forward_signals(self) -> Iterator[None]:
        """Within this context the signals that stop a program are recorded and sent to the current run."""
        self._child: subprocess.Popen | None = None

        def handle(number: int, _: object) -> None:
            self.received = self.received or number
            if self._child is not None and self._child.poll() is None:
                self._child.send_signal(number)

        with handled(handle):
            yield


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[int]:
    """Create and lock a folder; yield the file handle of the lock, which processes may inherit.

    The lock of the handle is for runs that outlive their sweep, on this machine. `RunLock` is for sweeps on other
    machines, and for a training of this name, which would rename the folder.

    Raises:
        ConfigError: another sweep, or a run of one, uses the folder.
        RunLockedError: the same, on another machine.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{folder} is in use by another sweep or a run of one; wait for it, or stop it") from None
        with RunLock(folder):
            yield handle
    finally:
        os.close(handle)


def run_sweep(arguments: Arguments) -> int:
    """Load the sweep file and train its runs.

    Returns:
        The exit code: 0 if at least one run is done, 1 if none is, 128 + number after a signal.

    Raises:
        ValueError, OSError: the file or a flag is invalid, and nothing was trained; the message is one line.
    """
    if arguments.file is None:
        raise ConfigError("file is missing; give a sweep file, such as sweeps/example.yaml")
    check(arguments.seed >= 0, f"seed is {arguments.seed}; allowed: 0 or more")
    sweep = load_sweep(Path(arguments.file))
    try:
        runs = sweep.runs(arguments.seed)
    except ConfigError as error:
        raise ConfigError(f"{arguments.file}: {error}") from None
    folder = Path(arguments.runs_dir) / sweep.name
    check(not (folder / "config.yaml").exists(), f"{folder} is a run; give the sweep another name")
    if arguments.dry_run:
        print(f"{len(runs)} runs in {folder}, each with {common_flags(sweep, runs)}")
        for i, run in enumerate(runs):
            outcome = report.load_outcome(run, folder)
            flags = shlex.join(run.flags(sweep.varied))
            state = f" ({outcome.state}{outcome.reason and ': '}{outcome.reason})"
            print(f"{i + 1}/{len(runs)} {run.name}: {flags}{'' if outcome.state == 'waiting' else state}")
        return 0
    if arguments.wandb:
        wandb_logger.require_wandb()
    try:
        with lock_folder(folder) as lock:
            sweeper = Sweeper(sweep, runs, folder, arguments.wandb, lock)
            outcomes = sweeper.train_runs()
    except BrokenPipeError:
        streams.report(f"interrupted; each run is saved. Resume with: {sweep_resume_command(arguments)}")
        raise
    done = sum(outcome.state == "done" for outcome in outcomes)
    print(f"\n{report.results_table(sweep, outcomes)}\n\n{done} of {len(runs)} runs are done; results are in {folder}")
    if sweeper.received is not None:
        print(f"interrupted; each run is saved. Resume with: {sweep_resume_command(arguments)}")
        return 128 + sweeper.received
    if any(outcome.state in ("failed", "interrupted") for outcome in outcomes):
        print(f"resume failed runs from their last checkpoint with: {sweep_resume_command(arguments)}")
    return 0 if done else 1


def common_flags(sweep: Sweep, runs: Sequence[Run]) -> str:
    """Return the flags that all runs share."""
    names = [p.name for p in sweep.parameters if p.name not in sweep.varied]
    return shlex.join(runs[0].flags(names)) if names else "the settings of nano"


def sweep_resume_command(arguments: Arguments) -> str:
    """Return the command that resumes a sweep."""
    words = ["python", "-m", "dantinox.sweep", arguments.file]
    if arguments.runs_dir != Arguments.runs_dir:
        words += ["--runs-dir", arguments.runs_dir]
    if arguments.seed:
        words += ["--seed", str(arguments.seed)]
    return shlex.join([*words, *(["--wandb"] if arguments.wandb else [])])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code; invalid input exits with 2."""
    arguments = cli.parse(
        Arguments, cli.positional_run(argv, "--file"), default=Arguments(), prog=PROG, description=Arguments.__doc__
    )
    with cli.one_line_errors(PROG, arguments.verbose):
        return run_sweep(arguments)


def program() -> NoReturn:
    """Run `main` as a console script."""
    cli.run_main(main)


if __name__ == "__main__":
    program()
