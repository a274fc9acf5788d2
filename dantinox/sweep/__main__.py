"""Train what a sweep file asks for, one run after the other: `python -m dantinox.sweep sweeps/example.yaml`.

The runs lie in runs/NAME/, and the results beside them: results.md, results.csv, results.png. A run is known by its
settings. Called again, the sweep leaves out what is done and goes on with what was interrupted or has failed.
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

from rich.console import Console

from dantinox import cli
from dantinox.config import ConfigError
from dantinox.config.validation import check
from dantinox.metrics import wandb_logger
from dantinox.metrics.logger import read_metrics
from dantinox.sweep import report
from dantinox.sweep.report import Outcome
from dantinox.sweep.search_space import Run, Sweep, read

PROG = "dantinox-sweep"


@dataclass(frozen=True)
class Args:
    """Train what a sweep file asks for."""

    file: str | None = None
    """The sweep, in the form of W&B's sweep files."""
    runs_dir: str = "runs"
    """Folder that holds the sweep's own, which has its name."""
    seed: int = 0
    """Seed of the draws of a random sweep; other than --seed of dantinox.train, which is a parameter."""
    wandb: bool = False
    """Log each run to W&B, as dantinox.train does."""
    dry_run: bool = False
    """List the runs and stop."""
    verbose: bool = False
    """Show tracebacks."""


@dataclass
class Sweeper:
    """Runs of one sweep, each a process of its own: what kills one does not end the others."""

    sweep: Sweep
    runs: list[Run]
    folder: Path
    wandb: bool = False
    lock: int = -1  # a file handle that whoever works here holds
    console: Console = field(default_factory=lambda: Console(highlight=False, soft_wrap=True))
    received: int | None = None  # the signal that ends the sweep

    def all(self) -> list[Outcome]:
        """Train what is not done yet; what became of each run, as far as a signal let it."""
        outcomes = [report.known(run, self.folder) for run in self.runs]
        with self._listening():
            for i, run in enumerate(self.runs):
                head = f"{i + 1}/{len(self.runs)} {run.name}"
                if self.received is None and outcomes[i].state not in ("done", "refused"):
                    outcomes[i] = self._one(run, head)
                    report.write(self.sweep, outcomes, self.folder)
                if self.received is None or outcomes[i].state == "interrupted":
                    self.console.print(f"{head}: {outcomes[i].told(self.sweep.metric)}", markup=False)
        report.write(self.sweep, outcomes, self.folder)
        return outcomes

    def _one(self, run: Run, head: str) -> Outcome:
        path = self.folder / run.name
        begun = (path / "config.yaml").is_file()
        words = [*(["--resume"] if begun else run.flags()), *(["--wandb"] if self.wandb else [])]
        command = [sys.executable, "-m", "dantinox.train", "--run", run.name, "--runs-dir", str(self.folder), *words]
        log = self.folder / f"{run.name}.log"
        self.console.print(f"{head}: {'goes on' if begun else 'begins'}; what it says is in {log}", markup=False)
        with log.open("ab") as out:
            start = out.tell()
            # A group of its own: Ctrl-C comes to us alone, and is passed on once.
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                process_group=0,
                env={"WANDB_RUN_GROUP": self.sweep.name} | os.environ | {"PYTHONUNBUFFERED": "1"},
                pass_fds=(self.lock,),  # whoever kills us leaves a run behind, which still holds the folder
            )
            if self.received is not None:  # while it was made
                self._child.send_signal(self.received)
            code = self._wait(path, head)
        if code == 0:
            return report.finish(run, self.folder)
        if self.received is not None or code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
            return Outcome(run, "interrupted")
        if code < 0:
            return Outcome(run, "failed", why=f"killed by {signal.Signals(-code).name}")
        with log.open("rb") as said:
            said.seek(start)
            lines = said.read().decode(errors="replace").splitlines() or [""]
        return Outcome(run, "failed", why=lines[-1].removeprefix("dantinox-train: error: "))

    def _wait(self, path: Path, head: str) -> int:
        """Until the run ends, with a line on a terminal that says how far it is."""
        assert self._child is not None
        status: Any = self.console.status(head) if self.console.is_terminal else contextlib.nullcontext()
        with status:
            while True:
                try:
                    return self._child.wait(0.5)
                except subprocess.TimeoutExpired:
                    if self.console.is_terminal and (rows := read_metrics(path / "metrics.jsonl")):
                        status.update(f"{head}: step {rows[-1]['step']}, loss {rows[-1]['loss']}")

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        self._child: subprocess.Popen | None = None

        def handle(number: int, _: object) -> None:
            self.received = number
            if self._child is not None and self._child.poll() is None:
                self._child.send_signal(number)

        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[int]:
    """The folder, made and held for us alone; gives the handle that holds it, which processes may inherit.

    Raises:
        ConfigError: another sweep, or a run that one has left behind, is at work there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{folder} is at work for another sweep, or a run of one; wait for it, or end it"
            ) from None
        yield handle
    finally:
        os.close(handle)


def sweep(args: Args) -> int:
    """Read, check and train; 0 where at least one run is done, 1 where none is, 128 + its number after a signal.

    Raises:
        ValueError, OSError: the file or a flag is wrong, and nothing was trained; the message is one line.
    """
    if args.file is None:
        raise ConfigError("file is missing; give a sweep file, such as sweeps/example.yaml")
    check(args.seed >= 0, f"seed is {args.seed}; allowed: 0 or more")
    found = read(Path(args.file))
    try:
        runs = found.runs(args.seed)
    except ConfigError as error:
        raise ConfigError(f"{args.file}: {error}") from None
    folder = Path(args.runs_dir) / found.name
    check(not (folder / "config.yaml").exists(), f"{folder} is a run; give the sweep another name")
    if args.dry_run:
        print(f"{len(runs)} runs in {folder}, each with {fixed(found, runs)}")
        for i, run in enumerate(runs):
            known = report.known(run, folder)
            words = shlex.join(run.flags(found.varied))
            told = f" ({known.state}{known.why and ': '}{known.why})"
            print(f"{i + 1}/{len(runs)} {run.name}: {words}{'' if known.state == 'waiting' else told}")
        return 0
    if args.wandb:
        wandb_logger.require_wandb()
    with locked(folder) as lock:
        sweeper = Sweeper(found, runs, folder, args.wandb, lock)
        outcomes = sweeper.all()
    done = sum(outcome.state == "done" for outcome in outcomes)
    print(f"\n{report.table(found, outcomes)}\n\n{done} of {len(runs)} runs are done; results are in {folder}")
    if sweeper.received is not None:
        print(f"interrupted; each run is saved. Go on with: {again(args)}")
        return 128 + sweeper.received
    if any(outcome.state in ("failed", "interrupted") for outcome in outcomes):
        print(f"what has failed goes on from its last checkpoint with: {again(args)}")
    return 0 if done else 1


def fixed(found: Sweep, runs: Sequence[Run]) -> str:
    """The flags that all runs have."""
    names = [p.name for p in found.parameters if p.name not in found.varied]
    return shlex.join(runs[0].flags(names)) if names else "the settings of nano"


def again(args: Args) -> str:
    """What a user types to go on with a sweep."""
    words = ["python", "-m", "dantinox.sweep", args.file]
    if args.runs_dir != Args.runs_dir:
        words += ["--runs-dir", args.runs_dir]
    if args.seed:
        words += ["--seed", str(args.seed)]
    return shlex.join([*words, *(["--wandb"] if args.wandb else [])])


def main(argv: Sequence[str] | None = None) -> int:
    """The program; its exit code, or SystemExit with 2 for bad input."""
    args = cli.parse(Args, cli.positional_run(argv, "--file"), default=Args(), prog=PROG, description=Args.__doc__)
    with cli.one_line_errors(PROG, args.verbose):
        return sweep(args)


def program() -> NoReturn:
    """Run `main` as a console script."""
    cli.run_main(main)


if __name__ == "__main__":
    program()
