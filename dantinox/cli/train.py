"""Train a model on text: `python -m dantinox.train`.

A run writes its files to runs/NAME: config.yaml, tokenizer.json, metrics.jsonl, tensorboard/, checkpoints/,
summary.txt, loss.png. Batches are a pure function of (seed, step), so a resumed run needs only its step number.
"""

import contextlib
import itertools
import logging
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from dantinox import cli
from dantinox.checkpoint.load import read_config
from dantinox.checkpoint.manager import Checkpoints
from dantinox.config import Config, ConfigError, presets, read_settings
from dantinox.distributed import processes, startup_check, watch
from dantinox.distributed.agreement import AgreedError, ask_first, check_same, first_failure, together
from dantinox.distributed.mesh import uneven_cuts
from dantinox.kernels import first_use
from dantinox.metrics import logger as metrics_log
from dantinox.metrics import model_summary, wandb_logger
from dantinox.system import malloc, streams
from dantinox.system.atomic_io import open_atomic
from dantinox.system.run_lock import RunLock, require_unlocked
from dantinox.training.loop import Loop, LoopState, NonFiniteError
from dantinox.training.pretrained import check_pretrained, with_pretrained
from dantinox.training.resume import Start, resume_command, resume_run
from dantinox.training.signals import Interrupted, sigterm_as_exception
from dantinox.training.trainer import Trainer

PROG = "dantinox-train"


@dataclass(frozen=True)
class Arguments:
    """The settings and other flags."""

    settings: Config
    preset: str | None = None
    """Preset to start from; --config and flags override it."""
    config: str | None = None
    """A YAML file of `name: value` lines, which override the preset."""
    resume: bool = False
    """Resume --run from its newest checkpoint with its settings; without a checkpoint, start from scratch."""
    dry_run: bool = False
    """Print the cost of the configuration (parameters, FLOPs, compiled memory, KV cache) without training."""
    verbose: bool = False
    """Log the chosen implementations and show tracebacks."""
    coordinator: str | None = None
    """HOST:PORT of the first of several processes; SLURM, Open MPI, Kubernetes and Cloud TPU need no such flags."""
    processes: int | None = None
    """Number of processes of the run, for --coordinator."""
    process: int | None = None
    """Number of this process, from 0, for --coordinator."""


def parse(argv: Sequence[str]) -> Arguments:
    """Parse the command line: flags override --config, which overrides the preset.

    With --resume, flags override the settings of the run; the preset and --config only name the run.
    """
    with cli.one_line_errors(PROG):
        preset, file = cli.peek_flag(argv, "--preset"), cli.peek_flag(argv, "--config")
        base = Config.from_preset(preset or "nano")
        if wants_resume(argv):
            named = base.flat() | ({} if file is None else read_settings(file))
            runs_dir, run = find_run(argv, named)
            require_unlocked(Path(runs_dir) / run)
            base = read_config(Path(runs_dir) / run).replace(run=run, runs_dir=runs_dir)
            if preset or file:
                print_ignored(named, base, " and ".join(filter(None, [preset and "--preset", file and "--config"])))
        else:
            named = {} if file is None else read_settings(file)
            if file is not None:
                base = Config.from_yaml(file, base)
            folder = cli.peek_flag(argv, "--init-from", "--init_from")
            if folder := base.train.init_from if folder is None else folder:
                base = with_pretrained(base, folder, named)
            runs_dir, run = find_run(argv, base.flat())
        if cli.peek_flag(argv, "--run") not in (None, run):  # a path
            argv = [*argv, f"--run={run}", f"--runs-dir={runs_dir}"]
        return cli.parse(
            Arguments,
            argv,
            default=Arguments(base, preset=preset, config=file),
            prog=PROG,
            description=f"Train a DantinoX model. Presets: {', '.join(presets())} (default: nano).",
        )


def wants_resume(argv: Sequence[str]) -> bool:
    """Return whether the last --resume or --no-resume, with or without a value, asks to resume; --help never does."""
    resume = False
    if "--help" in argv or "-h" in argv:
        return False
    for word, following in itertools.pairwise([*argv, ""]):
        flag, equals, value = word.partition("=")
        if flag in ("--resume", "--no-resume"):
            resume = (flag == "--resume") != ((value if equals else following).lower() == "false")
    return resume


def find_run(argv: Sequence[str], base: Mapping[str, Any]) -> tuple[str, str]:
    """Return (runs_dir, run): --run is a name in --runs-dir, or the path of a run; `base` has the defaults.

    Raises:
        ConfigError: --run is a path, and neither one in --runs-dir nor that of a run.
    """
    given = cli.peek_flag(argv, "--runs-dir", "--runs_dir")
    runs_dir = str(base["runs_dir"]) if given is None else given
    run = cli.peek_flag(argv, "--run")
    if run is None:
        return runs_dir, str(base["run"])
    plain = run.rstrip("/")
    if "/" not in plain:
        return runs_dir, plain
    parent, name = os.path.split(plain)
    if os.path.abspath(parent) == os.path.abspath(runs_dir):
        return runs_dir, name
    if given is None and os.path.isfile(os.path.join(plain, "config.yaml")):
        return parent, name
    raise ConfigError(
        f"run is {run!r}; allowed: a plain folder name, or the path of a run "
        f"(for a new one there: --runs-dir {parent} --run {name})"
    )


def print_ignored(named: Mapping[str, Any], saved: Config, flags: str) -> None:
    """Print which settings of --preset or --config a resumed run does not take."""
    old, follow = saved.flat(), ["vocab_size", "head_dim", "run", "runs_dir"]
    if named["dtype"] == "auto":
        follow.append("dtype")
    if names := [name for name in old if named[name] != old[name] and name not in follow]:
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        text = "; ".join(f"{name} {old[name]!r}, not {named[name]!r}" for name in names[:4])
        print(f"resuming with the settings of the run, not those of {flags} ({text}{more}); flags change them")


def lock_new_run(config: Config) -> RunLock:
    """Create the folder of the run, locked; an older run of that name is renamed to NAME.1, NAME.2, ...

    Raises:
        RunLockedError: another process writes a run of that name.
    """
    run = Path(config.train.runs_dir) / config.train.run
    run.parent.mkdir(parents=True, exist_ok=True)
    while True:
        if run.exists():
            backup = rename_older(run)
            print(f"{run} already exists; renamed it to {backup}")
        with contextlib.suppress(FileExistsError):  # another process creates the run at the same moment
            return RunLock.create(run)


def rename_older(run: Path) -> Path:
    """Rename a run that no process writes to the first free name."""
    number = 1
    while (backup := run.with_name(f"{run.name}.{number}")).exists():
        number += 1
    if not run.is_dir():
        return run.rename(backup)
    require_unlocked(run)  # and the runs in it, if it is the folder of a sweep
    lock = RunLock(run).acquire()
    try:
        lock.move_folder(backup)
    finally:
        lock.release()
    return backup


def train(config: Config, resume: bool = False) -> Path:
    """Train with the settings `config` and return the folder of the run.

    Raises:
        ConfigError, ValueError, FileNotFoundError: a setting, the data or the run to resume is invalid.
        RunLockedError: another process trains a run of that name.
        Interrupted: after Ctrl-C or SIGTERM, once the state is saved.
        NonFiniteError: the loss or a gradient is not finite; the state before it is saved.
        CheckpointWriteError: a checkpoint could not be written; earlier ones are intact.
        LockLostError: the folder of the run was moved, or another process took it over; earlier checkpoints are intact.
    """
    if config.train.wandb:
        wandb_logger.require_wandb()
    folder = Path(config.train.runs_dir) / config.train.run
    startup_check.check_code_and_settings(config)
    with contextlib.ExitStack() as stack:

        def enter(make: Callable[[], RunLock]) -> RunLock | None:
            lock = ask_first("the run's folder", lambda: stack.enter_context(make()), share=False)
            startup_check.check_folder(folder)
            return lock

        if resume:
            saved = read_config(folder)
            lock = enter(lambda: RunLock(folder))
            train_locked(resume_run(config, saved, folder, Trainer), lock, resume)
        else:
            ask_first("the run's name", lambda: require_unlocked(folder))  # before the text is read
            check_pretrained(config)
            start = Start(together("text", lambda: Trainer(config), in_turn=True), None, 0, LoopState())
            train_locked(start, enter(lambda: lock_new_run(config)), resume)
    return folder


def train_locked(start: Start, lock: RunLock | None, resume: bool) -> None:
    """Train in a folder that this process, or process 0 of several, has locked."""
    trainer, config = start.trainer, start.trainer.config
    run = Path(config.train.runs_dir) / config.train.run
    check_same(
        {"text": trainer.corpus.content_id, "tokenizer": trainer.corpus.tokenizer.fingerprint, "step": start.step}
    )
    is_first = processes.is_first()
    text = model_summary.describe(config)
    print(text)
    stats, kind = trainer.corpus.stats, "learned " if config.data.has_segments else ""
    print(
        f"{'data':15} {config.data.data}: {stats.train_tokens:,} {kind}training tokens, "
        f"{stats.val_tokens:,} validation tokens; unigram entropy {stats.unigram_entropy:.3f} nats per token"
    )
    if trainer.mesh is not None:
        for line in uneven_cuts(trainer.mesh, config.model.vocab_size, config.model.dim):
            print(f"{'mesh':15} {line}")
    if is_first:
        for name, content in (("summary.txt", text + "\n"), ("config.yaml", config.to_yaml())):
            with open_atomic(run / name) as file:
                file.write(content.encode())
        trainer.corpus.tokenizer.save(run)
    tokens_per_step = config.train.batch_size * config.train.seq_len
    with (
        wandb_logger.WandbLogger(run, config, resume)
        if config.train.wandb and is_first
        else contextlib.nullcontext() as tracker,
        contextlib.closing(
            Checkpoints(run, config.train.max_checkpoints, *(() if lock is None else (lock.check,)))
        ) as checkpoints,
        contextlib.closing(metrics_log.MetricsLog(run, start.step if resume else None, tracker, tokens_per_step))
        if is_first
        else contextlib.nullcontext() as log,
        first_use.verdicts_by(first_failure if processes.count() > 1 else None),
    ):
        loop = Loop(trainer, run, checkpoints, log, resume_command(config), start.progress)
        loop.run(trainer.init_state() if start.state is None else start.state, start.step)
    if is_first:
        metrics_log.plot_loss(run, config.train.run, stats.unigram_entropy)


def dry_run(config: Config) -> None:
    """Print the cost of the configuration; nothing is trained or written to runs/."""
    check_pretrained(config)
    trainer = Trainer(config)
    print(model_summary.describe(trainer.config))
    print(model_summary.compiled_memory(trainer.step, trainer.shapes, trainer.config))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    malloc.tune_glibc_malloc()
    argv = list(sys.argv[1:] if argv is None else argv)
    with cli.one_line_errors(PROG):
        place = [cli.peek_flag(argv, flag) for flag in ("--coordinator", "--processes", "--process")]
        if "--help" in argv or "-h" in argv or not processes.join(*place):
            return run(argv)
    return watch.run(lambda: run(argv))


def run(argv: Sequence[str]) -> int:
    """Run the program in a process that has joined those of its run, if there are others."""
    try:
        arguments = together("the command line", lambda: parse(argv), quiet=True)
    except AgreedError as error:
        return report_agreed(error)
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    if arguments.verbose:
        for name in ("kernels", "dantinox"):
            logging.getLogger(name).setLevel(logging.INFO)
    try:
        with (
            sigterm_as_exception(),
            cli.one_line_errors(PROG, arguments.verbose, cli.IMPLEMENTATION_FLAGS),
            watch.watched(),
        ):
            if arguments.dry_run:
                dry_run(arguments.settings)
            else:
                run = train(arguments.settings, arguments.resume)
                command = shlex.join(["python", "-m", "dantinox.generate", "--run", str(run), "--prompt", "def "])
                print(f"\nsaved {run}. Generate text with: {command}")
    except Interrupted as interruption:
        return interruption.code
    except KeyboardInterrupt:
        return 130
    except AgreedError as error:
        return report_agreed(error)
    except (NonFiniteError, OSError) as error:  # runtime failures: a full disk, a NaN
        if arguments.verbose:
            raise
        cli.exit_with_error(PROG, error, code=1)
    return 0


def report_agreed(error: AgreedError) -> int:
    """Print an error of which several processes know, unless process 0 does so, and return the exit code."""
    if processes.is_first() or not error.silent:
        streams.report(f"{PROG}: error: {error}")
    return error.code


def program() -> NoReturn:
    """Run `main` as a console script."""
    cli.run_main(main)


if __name__ == "__main__":
    program()
