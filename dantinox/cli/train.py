"""Train a model on text: `python -m dantinox.train`.

Everything a run writes lies in runs/NAME: config.yaml, tokenizer.json, metrics.jsonl, tensorboard/, checkpoints/,
summary.txt, loss.png. Batches are a pure function of (seed, step), so a run is resumed from its step number alone.
"""

import contextlib
import logging
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from dantinox import cli
from dantinox.checkpoint.load import read_config
from dantinox.checkpoint.manager import Checkpoints
from dantinox.config import Config, presets
from dantinox.metrics import logger as metrics_log
from dantinox.metrics import model_summary, wandb_logger
from dantinox.system import malloc
from dantinox.system.atomic_io import open_atomic
from dantinox.training.loop import Loop, LoopState, NonFiniteError
from dantinox.training.resume import check_restart_from_scratch, diff_settings, restore, resume_command
from dantinox.training.signals import Interrupted, sigterm_as_exception
from dantinox.training.trainer import Trainer

PROG = "dantinox-train"


@dataclass(frozen=True)
class Arguments:
    """Flags beyond the settings."""

    settings: Config
    preset: str | None = None
    """Settings to start from; --config and flags are laid over them."""
    config: str | None = None
    """A YAML file of `name: value` lines, laid over the preset."""
    resume: bool = False
    """Go on from the newest checkpoint of --run, with the settings of that run; where it has none yet, begin anew."""
    dry_run: bool = False
    """Say what the configuration costs (parameters, FLOPs, compiled memory, cache) and stop."""
    verbose: bool = False
    """Say which implementations were chosen, and show tracebacks."""


def parse(argv: Sequence[str]) -> Arguments:
    """Settings from the preset, then --config, then flags; a resumed run starts from its own settings instead."""
    with cli.one_line_errors(PROG):
        preset, file = cli.peek_flag(argv, "--preset"), cli.peek_flag(argv, "--config")
        run = cli.peek_flag(argv, "--run")
        if "--resume" in argv and run and not preset and not file:
            base = read_config(Path(cli.peek_flag(argv, "--runs-dir", "--runs_dir") or "runs") / run)
        else:
            base = Config.from_preset(preset or "nano")
            if file is not None:
                base = Config.from_yaml(file, base)
        return cli.parse(
            Arguments,
            argv,
            default=Arguments(base, preset=preset, config=file),
            prog=PROG,
            description=f"Train a DantinoX model. Presets: {', '.join(presets())} (default: nano).",
        )


def prepare_run(config: Config, resume: bool) -> Path:
    """The run's folder. An older run of that name is kept beside it as NAME.1, NAME.2, ..."""
    run = Path(config.train.runs_dir) / config.train.run
    if run.exists() and not resume:
        number = 1
        while (kept := run.with_name(f"{run.name}.{number}")).exists():
            number += 1
        run.rename(kept)
        print(f"{run} was there already; it is now {kept}")
    run.mkdir(parents=True, exist_ok=True)
    return run


def train(config: Config, resume: bool = False) -> Path:
    """Run the training that `config` describes and return its folder.

    Raises:
        ConfigError, ValueError, FileNotFoundError: a setting, the data or the run to resume is not fit.
        Interrupted: after Ctrl-C or SIGTERM, once the state is saved.
        NonFiniteError: the loss or a gradient is not finite; the state before it is saved.
        CheckpointWriteError: a checkpoint could not be written; those before it are as they were.
    """
    if config.train.wandb:
        wandb_logger.require_wandb()
    trainer = Trainer(config)
    config = trainer.config
    folder = Path(config.train.runs_dir) / config.train.run
    current, first, known = None, 0, LoopState()
    if resume:
        changed = diff_settings(config, read_config(folder))
        if Checkpoints(folder).steps():
            current, first, known = restore(trainer, folder)
        else:
            check_restart_from_scratch(folder, config)
        if changed and first:
            print(f"resumed with {changed}: the steps to come are not those of a run that was never interrupted")
    run = prepare_run(config, resume)
    text = model_summary.describe(config)
    print(text)
    stats = trainer.corpus.stats
    print(
        f"{'data':15} {config.data.data}: {len(trainer.corpus.train):,} training tokens, "
        f"{len(trainer.corpus.val):,} validation tokens; unigram entropy {stats.unigram_entropy:.3f} nats per token"
    )
    for name, content in (("summary.txt", text + "\n"), ("config.yaml", config.to_yaml())):
        with open_atomic(run / name) as file:
            file.write(content.encode())
    trainer.corpus.tokenizer.save(run)
    with (
        wandb_logger.WandbLogger(run, config, resume) if config.train.wandb else contextlib.nullcontext() as tracker,
        contextlib.closing(Checkpoints(run, config.train.max_checkpoints)) as checkpoints,
        contextlib.closing(metrics_log.MetricsLog(run, first if resume else None, tracker)) as log,
    ):
        loop = Loop(trainer, run, checkpoints, log, resume_command(config), known)
        loop.run(trainer.init_state() if current is None else current, first)
    metrics_log.plot_loss(run, config.train.run, stats.unigram_entropy)
    return run


def dry_run(config: Config) -> None:
    """Print what the configuration costs; nothing is trained or written to runs/."""
    trainer = Trainer(config)
    print(model_summary.describe(trainer.config))
    print(model_summary.compiled_memory(trainer.step, trainer.shapes, trainer.config))


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns the exit code."""
    malloc.tune_glibc_malloc()
    arguments = parse(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    if arguments.verbose:
        for name in ("kernels", "dantinox"):
            logging.getLogger(name).setLevel(logging.INFO)
    try:
        with sigterm_as_exception(), cli.one_line_errors(PROG, arguments.verbose):
            if arguments.dry_run:
                dry_run(arguments.settings)
            else:
                run = train(arguments.settings, arguments.resume)
                write = shlex.join(["python", "-m", "dantinox.generate", "--run", str(run), "--prompt", "def "])
                print(f"\nsaved {run}. Let it write: {write}")
    except Interrupted as stopped:
        return stopped.code
    except KeyboardInterrupt:
        return 130
    except (NonFiniteError, OSError) as error:  # what cannot be known beforehand: a full disk, a NaN
        if arguments.verbose:
            raise
        cli.exit_with_error(PROG, error, code=1)
    return 0


def program() -> NoReturn:
    """`main` as a console script."""
    cli.run_main(main)


if __name__ == "__main__":
    program()
