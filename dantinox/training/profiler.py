"""Trace training steps with the JAX profiler."""

from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from dantinox.checkpoint.train_state import TrainState
from dantinox.distributed import processes
from dantinox.training import profile_report, profile_table

if TYPE_CHECKING:
    from dantinox.training.loop import Loop


class StepTracer:
    """Context manager that traces the steps of --profile-steps for TensorBoard and prints the time per part.

    The operations of a CPU are named after the compiler's fusions, so `finish` adds a plane with the named scopes of
    the model. It needs the text of the compiled program, so the step is compiled ahead of time.
    """

    def __init__(self, loop: "Loop") -> None:
        self.range, self.folder = loop.trainer.config.train.profile_range(), loop.run_dir / "tensorboard"
        if not processes.is_first():  # another one on the same host would have the same name
            self.folder /= f"process-{processes.index()}"
        self.step: Any = loop.trainer.step
        self.signals, self.report_saved, self.line = loop.signals, loop.report_saved, loop.line
        self.running, self.first, self.last = False, 0, 0

    def __enter__(self) -> "StepTracer":
        return self

    def __exit__(self, *_: object) -> None:
        if self.running:
            self.finish()

    def before_step(self, step: int, state: TrainState, batch: tuple) -> None:
        """Compile the step ahead of time if any step is traced, and start the trace at the first one."""
        if self.range is None or step > self.range[1]:
            return
        if not hasattr(self.step, "as_text"):
            with self.signals.interruptible(lambda: self.report_saved(step - 1)):
                self.step = self.step.lower(state, *batch, np.int32(0)).compile()
        if step >= self.range[0] and not self.running:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # no event per Python call
            jax.profiler.start_trace(str(self.folder), profiler_options=options)
            self.running, self.first, self.last = True, step, step - 1

    def after_step(self, step: int, state: TrainState) -> None:
        """Stop the trace after the last step to trace."""
        self.last = step
        if self.running and step >= self.range[1]:
            jax.block_until_ready(state)
            self.finish()

    def finish(self) -> None:
        """Write the trace, append the plane of named scopes, and print the table of parts and the path."""
        self.running = False
        jax.profiler.stop_trace()
        path = max(self.folder.glob("plugins/profile/*/*.xplane.pb"), key=lambda path: path.stat().st_mtime)
        spans = profile_report.collect_spans(jax.profiler.ProfileData.from_file(str(path)))
        names = profile_report.op_names(self.step.as_text())
        with path.open("ab") as file:
            file.write(profile_report.scopes_plane(spans, names))
        if steps := max(0, self.last - self.first + 1):
            self.line.print_table(profile_table.parts_table(profile_report.time_by_scope(spans, names), steps))
        traced = (
            f"steps {self.first} to {self.last}" if steps > 1 else f"step {self.last}" if steps else "no whole step"
        )
        logdir = self.folder.parent.parent
        self.line.print_line(f"traced {traced}: {path}\nlook at it: tensorboard --logdir {logdir}")
