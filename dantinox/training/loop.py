"""The steps of a run, and what happens between them."""

import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dantinox.checkpoint.manager import Checkpoints
from dantinox.cli.progress_bar import ProgressLine
from dantinox.metrics import logger as metrics_log
from dantinox.model import flops
from dantinox.system.atomic_io import open_atomic
from dantinox.training.profiler import Tracing
from dantinox.training.signals import Interrupted, SignalHandler
from dantinox.training.train_step import TrainState
from dantinox.training.trainer import Trainer

Row = dict[str, Any]
SKIPS = 10  # batches left out in a row, after which --on-nan skip stops too


class NonFiniteError(ArithmeticError):
    """Training stopped at a loss or gradient that is not finite; the message says where and how to go on."""


@dataclass
class LoopState:
    """What the loop knows beside the train state; kept with each checkpoint.

    Attributes:
        best_loss, best_step: the lowest validation loss so far and its step.
        stale: evaluations since.
        skipped: batches left out just before, in a row.
        pending: the row of the newest step, where what follows it (evaluation, metrics) was interrupted.
    """

    best_loss: float | None = None
    best_step: int = 0
    stale: int = 0
    skipped: int = 0
    pending: Row | None = None


@dataclass
class Loop:
    """Training from one state on. `resume` is the command that goes on with this run."""

    trainer: Trainer
    run_dir: Path
    checkpoints: Checkpoints
    log: metrics_log.MetricsLog
    resume: str
    progress: LoopState = field(default_factory=LoopState)

    def run(self, current: TrainState, first: int) -> None:
        """Train from step `first` to the last one; the last state is always saved, after a signal too.

        Raises:
            Interrupted: after SIGINT or SIGTERM, once the state is saved.
            NonFiniteError: a step was not finite; the state before it is saved.
            CheckpointWriteError: a checkpoint could not be written.
        """
        t = self.trainer.config.train
        self.peak = metrics_log.matmul_rate(self.trainer.config.model.dtype) * max(1, _devices(self.trainer))
        with SignalHandler() as self.stop, ProgressLine(t.steps, first) as self.line, Tracing(self) as tracing:
            self.last_log_time, self.last_log_step = time.perf_counter(), first
            if first >= t.steps:
                self.line.print_line(f"step {first} is reached already: --steps is {t.steps}")
            elif self.stopped_early(first):
                self.line.print_line(f"stopped early at step {first} already: --patience is {t.patience}")
            if self.progress.pending is not None:  # what an interrupted run still owes its last step
                with self.stop.interruptible(lambda: self.report_saved(first)):
                    self.run_periodic_tasks(first, current, self.progress.pending)
            step = first
            batch = self.trainer.batch(first)
            while step < t.steps and not self.stopped_early(step):
                number = step + 1
                tracing.before(number, current, batch)
                with jax.profiler.StepTraceAnnotation("train", step_num=number):
                    if step == first:  # most of it is compiling, and there is nothing to lose yet
                        with self.stop.interruptible(lambda: self.report_saved(first)):
                            current, metrics = tracing.step(current, *batch, jnp.int32(step))
                    else:
                        current, metrics = tracing.step(current, *batch, jnp.int32(step))
                    now, batch = batch, self.trainer.batch(number)  # while the device is at work
                    finite = bool(metrics.pop("finite"))
                if not finite:
                    self.not_finite(number, current, now, metrics)
                self.progress.skipped = 0 if finite else self.progress.skipped + 1
                step = number
                tracing.after(step, current)
                self.on_step_end(step, current, metrics)
                if self.stop.received is not None and step < t.steps:
                    self.save_on_interrupt(step, current)
                    raise Interrupted(self.stop.received)
            self.checkpoints.wait()

    def on_step_end(self, step: int, current: TrainState, metrics: dict[str, jax.Array]) -> None:
        """Log, evaluate, save and sample, each at its own pace and all of them at the last step.

        The checkpoint that was due before is on disk when this begins: a kill costs no more than `save_every` steps.
        """
        self.checkpoints.wait()
        t = self.trainer.config.train
        row = None
        if self.is_due(step, t.log_every) or self.is_due(step, t.eval_every) or step == 1:
            row = {"step": step, "loss": 0.0} | {name: float(value) for name, value in metrics.items()}
            row["lr"] = float(self.trainer.learning_rate(step - 1))
            if self.progress.skipped:
                row["skipped"] = self.progress.skipped
            row |= self.rates(step)
            self.line.update(step, row)
        self.run_periodic_tasks(step, current, row)
        if row is not None:
            self.last_log_time, self.last_log_step = time.perf_counter(), step

    def run_periodic_tasks(self, step: int, current: TrainState, row: Row | None) -> None:
        """What comes after a step and its row of metrics; an interrupted run does it anew."""
        t = self.trainer.config.train
        better = False
        self.progress.pending = row
        if self.is_due(step, t.eval_every):
            with self.stop.interruptible(lambda: self.save_on_interrupt(step, current)):
                row["val_loss"] = self.trainer.validation_loss(current.weights)
            better = self.update_best(step, row["val_loss"])
            self.line.print_line(f"step {step}: validation loss {row['val_loss']:.4f}{' (best)' if better else ''}")
        if row is not None:
            self.log.write(row)
        self.progress.pending = None
        last = self.stopped_early(step)
        due = self.is_due(step, t.save_every) or last
        if due or better:
            self.save(step, current, row and row.get("val_loss"), due)
        if (self.is_due(step, t.sample_every) or last) and t.sample_tokens:
            with self.stop.interruptible(lambda: self.save_on_interrupt(step, current)):
                text = self.trainer.sample_text(current.weights, t.sample_tokens)
            self.line.print_line(f"--- sample at step {step} ---\n{text}\n---")
            self.log.text("sample", text, step)
        if last and step < t.steps:
            self.line.print_line(
                f"stopped early at step {step}: {self.progress.stale} evaluations without a validation loss below "
                f"{self.progress.best_loss:.4f}, that of step {self.progress.best_step}"
            )

    def is_due(self, step: int, every: int) -> bool:
        """Is it time for what happens every so many steps, and at the last one?"""
        return step == self.trainer.config.train.steps or (every > 0 and step % every == 0)

    def update_best(self, step: int, loss: float) -> bool:
        """Remember a validation loss; True where it is the best so far."""
        known = self.progress
        if math.isfinite(loss) and (known.best_loss is None or loss < known.best_loss):
            known.best_loss, known.best_step, known.stale = loss, step, 0
            return True
        known.stale += 1
        return False

    def stopped_early(self, step: int) -> bool:
        """Has the validation loss not become better for `patience` evaluations, of which this step was the last?"""
        t = self.trainer.config.train
        return 0 < t.patience <= self.progress.stale and self.is_due(step, t.eval_every)

    def save(self, step: int, current: TrainState, val_loss: float | None, due: bool = True) -> None:
        """Write a checkpoint in the background; what is known goes with it."""
        corpus = self.trainer.corpus
        metadata = {
            "val_loss": val_loss,
            "due": due,
            "loop": asdict(self.progress),
            "corpus": corpus.path.name,
            "tokenizer": corpus.tokenizer.fingerprint,
        }
        if step in self.checkpoints.steps():  # saved where it was interrupted; now its evaluation is known
            self.checkpoints.update_metadata(step, metadata)
        else:
            self.checkpoints.save(step, current, metadata)

    def save_on_interrupt(self, step: int, current: TrainState) -> None:
        """Save at once, and say how to go on."""
        if step not in self.checkpoints.steps():
            self.save(step, current, None)
        self.checkpoints.wait()
        self.report_saved(step)

    def report_saved(self, step: int) -> None:
        """How to go on after a signal."""
        if step:
            self.line.print_line(f"interrupted; step {step} is saved. Go on with: {self.resume}")
        else:
            self.line.print_line("interrupted before the first step; there is nothing to save")

    def not_finite(self, step: int, current: TrainState, batch: tuple, metrics: dict[str, jax.Array]) -> None:
        """Write the batch of a step that was not made to a file, and stop or let it pass, as `on_nan` says.

        Raises:
            NonFiniteError: training cannot go on.
        """
        t = self.trainer.config.train
        path = self.run_dir / f"nan-{step}.npz"
        told = {name: float(metrics[name]) for name in ("loss", "grad_norm")}
        with open_atomic(path) as file:
            np.savez(file, inputs=batch[0], targets=batch[1], step=step, seed=t.seed, **told)
        figures = ", ".join(f"{name} {value:g}" for name, value in told.items())
        what = f"step {step} is not finite ({figures}): its update was not made, and its batch is in {path}"
        if t.on_nan == "skip" and self.progress.skipped + 1 < SKIPS:
            self.line.print_line(f"{what}; going on without it")
            return
        before = "nothing was trained yet"
        if step > 1:
            if step - 1 not in self.checkpoints.steps():
                self.save(step - 1, current, None)
            self.checkpoints.wait()
            before = f"step {step - 1} is saved. Go on without that batch: {self.resume} --on-nan skip"
        if t.on_nan == "skip":
            before = f"the {SKIPS}th in a row; step {step - 1} is saved. Go on with: {self.resume}"
        raise NonFiniteError(f"{what}; {before}")

    def rates(self, step: int) -> dict[str, float]:
        """Tokens a second since the last row, and the share of the device's measured matmul rate that makes."""
        c = self.trainer.config
        seconds = time.perf_counter() - self.last_log_time
        tokens = (step - self.last_log_step) * c.train.batch_size * c.train.seq_len / seconds
        return {
            "tokens_per_s": tokens,
            "mfu": tokens * flops.flops_per_token(c.model, c.train.seq_len) / self.peak,
        }


def _devices(trainer: Trainer) -> int:
    # Simulated CPU devices share the cores that the peak was measured on.
    return 1 if trainer.mesh is None or jax.default_backend() == "cpu" else trainer.mesh.size
