"""The training loop: steps, and the logging, evaluation, checkpoints and samples between them."""

import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dantinox.checkpoint.manager import Checkpoints
from dantinox.checkpoint.train_state import TrainState
from dantinox.distributed import processes, watch
from dantinox.distributed.agreement import everywhere
from dantinox.distributed.stop_vote import StopVote
from dantinox.metrics import logger as metrics_log
from dantinox.metrics.progress_bar import ProgressLine
from dantinox.model import flops
from dantinox.system.atomic_io import open_atomic
from dantinox.system.json_text import finite
from dantinox.training.profiler import StepTracer
from dantinox.training.signals import SIGPIPE, Interrupted, SignalHandler
from dantinox.training.trainer import Trainer

Row = dict[str, Any]
MAX_SKIPPED = 10  # consecutive skipped batches after which --on-nan skip stops too


class NonFiniteError(ArithmeticError):
    """Training stopped because a loss or gradient is not finite; the message says where and how to continue."""


@dataclass
class LoopState:
    """State of the loop beside the train state; stored with each checkpoint.

    Attributes:
        best_loss, best_step: the lowest validation loss so far and its step.
        stale: number of evaluations since.
        skipped: number of consecutive batches skipped before the newest step.
        pending: metrics of the newest step if its logging and evaluation were interrupted.
    """

    best_loss: float | None = None
    best_step: int = 0
    stale: int = 0
    skipped: int = 0
    pending: Row | None = None


@dataclass
class Loop:
    """Training of one run.

    Attributes:
        log: None in all processes but the first.
        resume: the command that resumes the run.
    """

    trainer: Trainer
    run_dir: Path
    checkpoints: Checkpoints
    log: metrics_log.MetricsLog | None
    resume: str
    progress: LoopState = field(default_factory=LoopState)

    def run(self, state: TrainState, start: int) -> None:
        """Train from step `start` to the last step. The last state is always saved, also after a signal.

        Raises:
            Interrupted: after SIGINT, SIGTERM, SIGHUP or a closed standard output, once the state is saved.
            NonFiniteError: a step was not finite; the state before it is saved.
            CheckpointWriteError: a checkpoint could not be written.
        """
        t = self.trainer.config.train
        self.peak = metrics_log.matmul_rate(self.trainer.config.model.dtype) * max(1, _num_devices(self.trainer))
        several = processes.count() > 1
        self.vote = StopVote(self.trainer.mesh) if several and self.trainer.mesh is not None else None
        with (
            SignalHandler(deferred=several) as self.signals,
            ProgressLine(t.steps, start) as self.line,
            StepTracer(self) as tracer,
        ):
            self.last_log_time, self.last_log_step = time.perf_counter(), start
            if start >= t.steps:
                self.line.print_line(f"nothing to train: the run is at step {start} and --steps is {t.steps}")
            elif self.stopped_early(start):
                self.line.print_line(
                    f"nothing to train: the run stopped early at step {start} (--patience {t.patience})"
                )
            if self.progress.pending is not None:  # finish the logging and evaluation of an interrupted run
                with self.signals.interruptible(lambda: self.report_saved(start)):
                    self.run_periodic_tasks(start, state, self.progress.pending)
            step = start
            batch = self.trainer.batch(start)
            while step < t.steps and not self.stopped_early(step):
                number = step + 1
                tracer.before_step(number, state, batch)
                with jax.profiler.StepTraceAnnotation("train", step_num=number):
                    if step == start:  # the first step is mostly compilation, and no progress is lost
                        with self.signals.interruptible(lambda: self.report_saved(start)):
                            state, metrics = tracer.step(state, *batch, np.int32(step))
                    else:
                        state, metrics = tracer.step(state, *batch, np.int32(step))
                    ballots = None if self.vote is None else self.vote.cast(self.stop_signal())
                    watch.mark()
                    step_batch, batch = batch, self.trainer.batch(number)  # while the device computes
                    is_finite = bool(metrics.pop("finite"))
                if not is_finite:
                    self.handle_non_finite(number, state, step_batch, metrics)
                self.progress.skipped = 0 if is_finite else self.progress.skipped + 1
                step = number
                tracer.after_step(step, state)
                self.on_step_end(step, state, metrics)
                watch.mark()
                stop = self.agreed_stop(ballots)
                if stop is not None and step < t.steps:
                    self.save_on_interrupt(step, state, stop[1])
                    raise everywhere(Interrupted(stop[0]))
            self.checkpoints.wait()

    def stop_signal(self) -> int | None:
        """Return the signal that asked this process to stop, if one did."""
        return self.signals.received or (SIGPIPE if self.line.is_closed else None)

    def agreed_stop(self, ballots: jax.Array | None) -> tuple[int, int] | None:
        """Return (signal, process that got it) if the run stops after this step."""
        if self.vote is not None:
            return self.vote.count(ballots)
        return None if (signal := self.stop_signal()) is None else (signal, 0)

    def on_step_end(self, step: int, state: TrainState, metrics: dict[str, jax.Array]) -> None:
        """Log, evaluate, save and sample, each at its own interval, and all of them at the last step.

        First wait for the previous checkpoint to be on disk, so that a kill loses at most `save_every` steps.
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
        self.run_periodic_tasks(step, state, row)
        if row is not None:
            self.last_log_time, self.last_log_step = time.perf_counter(), step

    def run_periodic_tasks(self, step: int, state: TrainState, row: Row | None) -> None:
        """Evaluate, log, save and sample after a step; a resumed run repeats what was interrupted."""
        t = self.trainer.config.train
        is_best = False
        self.progress.pending = row
        if self.is_due(step, t.eval_every):
            with self.signals.interruptible(lambda: self.save_on_interrupt(step, state)):
                row["val_loss"] = self.trainer.validation_loss(state.weights)
            is_best = self.update_best(step, row["val_loss"])
            self.line.print_line(f"step {step}: validation loss {row['val_loss']:.4f}{' (best)' if is_best else ''}")
        if row is not None and self.log is not None:
            self.log.write(row)
        self.progress.pending = None
        stop_early = self.stopped_early(step)
        due = self.is_due(step, t.save_every) or stop_early
        if due or is_best:
            self.save(step, state, row and row.get("val_loss"), due)
        if (self.is_due(step, t.sample_every) or stop_early) and t.sample_tokens:
            with self.signals.interruptible(lambda: self.save_on_interrupt(step, state)):
                text = self.trainer.sample_text(state.weights, t.sample_tokens)
            self.line.print_line(f"--- sample at step {step} ---\n{text}\n---")
            if self.log is not None:
                self.log.write_text("sample", text, step)
        if stop_early and step < t.steps:
            best_loss, stale = self.progress.best_loss, self.progress.stale
            self.line.print_line(
                f"stopped early at step {step}: {stale} evaluations without a finite validation loss"
                if best_loss is None
                else f"stopped early at step {step}: {stale} evaluations without improvement over "
                f"validation loss {best_loss:.4f} of step {self.progress.best_step}"
            )

    def is_due(self, step: int, every: int) -> bool:
        """Return whether a task with interval `every` is due; at the last step every task is."""
        return step == self.trainer.config.train.steps or (every > 0 and step % every == 0)

    def update_best(self, step: int, loss: float) -> bool:
        """Record a validation loss and return whether it is the best so far."""
        progress = self.progress
        if math.isfinite(loss) and (progress.best_loss is None or loss < progress.best_loss):
            progress.best_loss, progress.best_step, progress.stale = loss, step, 0
            return True
        progress.stale += 1
        return False

    def stopped_early(self, step: int) -> bool:
        """Return whether early stopping triggers at this step."""
        t = self.trainer.config.train
        return 0 < t.patience <= self.progress.stale and self.is_due(step, t.eval_every)

    def save(self, step: int, state: TrainState, val_loss: float | None, due: bool = True) -> None:
        """Write a checkpoint in the background, with the state of the loop as metadata."""
        corpus = self.trainer.corpus
        metadata = {
            "val_loss": finite(val_loss),
            "due": due,
            "loop": finite(asdict(self.progress)),
            "corpus": corpus.content_id,
            "tokenizer": corpus.tokenizer.fingerprint,
        }
        if self.checkpoints.has(step):  # saved at an interrupt, before its evaluation
            self.checkpoints.update_metadata(step, metadata)
        else:
            self.checkpoints.save(step, state, metadata)

    def save_on_interrupt(self, step: int, state: TrainState, process: int = 0) -> None:
        """Save a checkpoint and print how to resume; `process` was interrupted."""
        if not self.checkpoints.has(step):
            self.save(step, state, None)
        self.checkpoints.wait()
        self.report_saved(step, process)

    def report_saved(self, step: int, process: int = 0) -> None:
        """Print how to resume after a signal to `process`."""
        if step:
            subject = "interrupted" if self.vote is None else f"process {process} was interrupted"
            self.line.print_last(f"{subject}; step {step} is saved. Resume with: {self.resume}")
        else:
            self.line.print_last("interrupted before the first step; there is nothing to save")

    def handle_non_finite(self, step: int, state: TrainState, batch: tuple, metrics: dict[str, jax.Array]) -> None:
        """Write the batch of a discarded step to a file, and stop or skip the batch, depending on `on_nan`.

        Raises:
            NonFiniteError: training stops.
        """
        t = self.trainer.config.train
        path = self.run_dir / f"nan-{step}.npz"
        values = {name: float(metrics[name]) for name in ("loss", "grad_norm")}
        if processes.is_first():
            arrays = batch if self.vote is None else self.trainer.host_batch(step - 1)
            with open_atomic(path) as file:
                named = dict(zip(("inputs", "targets", "segments"), arrays, strict=False))
                np.savez(file, step=step, seed=t.seed, **named, **values)
        text = ", ".join(f"{name} {value:g}" for name, value in values.items())
        message = f"step {step} is not finite ({text}): its update was discarded, and its batch is in {path}"
        if t.on_nan == "skip" and self.progress.skipped + 1 < MAX_SKIPPED:
            self.line.print_line(f"{message}; skipped the batch")
            return
        advice = "there is no earlier step to save"
        if step > 1:
            if not self.checkpoints.has(step - 1):
                self.save(step - 1, state, None)
            self.checkpoints.wait()
            advice = f"step {step - 1} is saved. Skip the batch with: {self.resume} --on-nan skip"
        if t.on_nan == "skip":
            advice = f"{MAX_SKIPPED} steps in a row; step {step - 1} is saved. Resume with: {self.resume}"
        raise everywhere(NonFiniteError(f"{message}; {advice}"))

    def rates(self, step: int) -> dict[str, float]:
        """Return tokens per second since the last row, and the MFU relative to the measured matmul rate."""
        c = self.trainer.config
        seconds = time.perf_counter() - self.last_log_time
        tokens = (step - self.last_log_step) * c.train.batch_size * c.train.seq_len / seconds
        return {
            "tokens_per_s": tokens,
            "mfu": tokens * flops.flops_per_token(c.model, c.train.seq_len) / self.peak,
        }


def _num_devices(trainer: Trainer) -> int:
    # Simulated CPU devices share the cores on which the peak was measured.
    return 1 if trainer.mesh is None or jax.default_backend() == "cpu" else trainer.mesh.size
