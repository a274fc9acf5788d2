"""Train a model on text: `python -m dantinox.train`.

A run writes its files to runs/NAME: config.yaml, tokenizer.json, metrics.jsonl, tensorboard/, checkpoints/,
summary.txt, loss.png. Batches are a pure function of (seed, step), so a resumed run needs only its step number.
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
from dantinox.training.resume import check_restart_from_scratch, diff_settings, restore_run, resume_command
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


def parse(argv: Sequence[str]) -> Arguments:
    """Parse the command line: flags override --config, which overrides the preset or the settings of a resumed run."""
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
    """Create the folder of the run; an older run of that name is renamed to NAME.1, NAME.2, ..."""
    run = Path(config.train.runs_dir) / config.train.run
    if run.exists() and not resume:
        number = 1
        while (backup := run.with_name(f"{run.name}.{number}")).exists():
            number += 1
        run.rename(backup)
        print(f"{run} already exists; renamed it to {backup}")
    run.mkdir(parents=True, exist_ok=True)
    return run


def train(config: Config, resume: bool = False) -> Path:
    """Train with the settings `config` and return the folder of the run.

    Raises:
        ConfigError, ValueError, FileNotFoundError: a setting, the data or the run to resume is invalid.
        Interrupted: after Ctrl-C or SIGTERM, once the state is saved.
        NonFiniteError: the loss or a gradient is not finite; the state before it is saved.
        CheckpointWriteError: a checkpoint could not be written; earlier ones are intact.
    """
    if config.train.wandb:
        wandb_logger.require_wandb()
    trainer = Trainer(config)
    config = trainer.config
    folder = Path(config.train.runs_dir) / config.train.run
    state, start_step, progress = None, 0, LoopState()
    if resume:
        changed = diff_settings(config, read_config(folder))
        if Checkpoints(folder).steps():
            state, start_step, progress = restore_run(trainer, folder)
        else:
            check_restart_from_scratch(folder, config)
        if changed and start_step:
            print(f"resumed with {changed}: later steps differ from those of an uninterrupted run")
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
    tokens_per_step = config.train.batch_size * config.train.seq_len
    with (
        wandb_logger.WandbLogger(run, config, resume) if config.train.wandb else contextlib.nullcontext() as tracker,
        contextlib.closing(Checkpoints(run, config.train.max_checkpoints)) as checkpoints,
        contextlib.closing(
            metrics_log.MetricsLog(run, start_step if resume else None, tracker, tokens_per_step)
        ) as log,
    ):
        loop = Loop(trainer, run, checkpoints, log, resume_command(config), progress)
        loop.run(trainer.init_state() if state is None else state, start_step)
    metrics_log.plot_loss(run, config.train.run, stats.unigram_entropy)
    return run


def dry_run(config: Config) -> None:
    """Print the cost of the configuration; nothing is trained or written to runs/."""
    trainer = Trainer(config)
    print(model_summary.describe(trainer.config))
    print(model_summary.compiled_memory(trainer.step, trainer.shapes, trainer.config))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
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
                command = shlex.join(["python", "-m", "dantinox.generate", "--run", str(run), "--prompt", "def "])
                print(f"\nsaved {run}. Generate text with: {command}")
    except Interrupted as interruption:
        return interruption.code
    except KeyboardInterrupt:
        return 130
    except (NonFiniteError, OSError) as error:  # runtime failures: a full disk, a NaN
        if arguments.verbose:
            raise
        cli.exit_with_error(PROG, error, code=1)
    return 0


def program() -> NoReturn:
    """Run `main` as a console script."""
    cli.run_main(main)


if __name__ == "__main__":
    program()
