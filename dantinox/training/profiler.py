"""The profiler around training steps."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from dantinox.training import profile_report
from dantinox.training.train_step import TrainState

if TYPE_CHECKING:
    from dantinox.training.loop import Loop


class Tracing:
    """The profiler's trace of the steps that --profile-steps names, for TensorBoard; a context manager.

    A CPU's operations are named after the compiler's fusions, so the parts of the model are added as a plane of their
    own: for that the step is compiled ahead, once, in a form whose program can be read.
    """

    def __init__(self, loop: "Loop") -> None:
        self.range, self.folder = loop.trainer.config.train.profile_range(), loop.run_dir / "tensorboard"
        self.step: Any = loop.trainer.step
        self.stop, self.saved = loop.stop, loop.report_saved
        self.running = False

    def __enter__(self) -> "Tracing":
        return self

    def __exit__(self, *_: object) -> None:
        if self.running:
            self.finish()

    def before(self, step: int, current: TrainState, batch: tuple) -> None:
        """Compile ahead if anything is to be traced; begin at the first step that is."""
        if self.range is None or step > self.range[1]:
            return
        if not hasattr(self.step, "as_text"):
            with self.stop.interruptible(lambda: self.saved(step - 1)):
                self.step = self.step.lower(current, *batch, jnp.int32(0)).compile()
        if step >= self.range[0] and not self.running:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # an event for each Python call would bury what is looked for
            jax.profiler.start_trace(str(self.folder), profiler_options=options)
            self.running = True

    def after(self, step: int, current: TrainState) -> None:
        """End the trace after the last step that is wanted."""
        if self.running and step >= self.range[1]:
            jax.block_until_ready(current)
            self.finish()

    def finish(self) -> None:
        """Write the trace, and the named parts of the model behind it."""
        self.running = False
        jax.profiler.stop_trace()
        path = max(self.folder.glob("plugins/profile/*/*.xplane.pb"), key=lambda path: path.stat().st_mtime)
        spans = profile_report.spans(jax.profiler.ProfileData.from_file(str(path)))
        with path.open("ab") as file:
            file.write(profile_report.scopes_plane(spans, profile_report.op_names(self.step.as_text())))
