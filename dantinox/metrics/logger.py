"""Metrics of a run: JSON lines, TensorBoard events, the loss curve, and the measured matmul rate."""

import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from dantinox.metrics.wandb_logger import WandbLogger
from dantinox.system.atomic_io import open_atomic
from dantinox.system.json_text import json_text

# TensorBoard shows tags with one prefix as one group; names with a prefix of their own (router/entropy.0) keep it.
TAGS = {
    "loss": "train/loss",
    "skipped": "train/skipped_batches",
    "val_loss": "val/loss",
    "lr": "rate/learning_rate",
    "tokens_per_s": "rate/tokens_per_second",
    "mfu": "rate/mfu",
    "grad_norm": "norm/gradient",
    "balance": "router/balance",
    "router_z": "router/z",
}
STEP_TIME = "rate/step_milliseconds"


def matmul_rate(dtype: str, size: int | None = None, repeats: int = 8) -> float:
    """Measure the FLOP/s of a square matmul of this dtype on one device; the best of `repeats` runs."""
    size = size or (1024 if jax.default_backend() == "cpu" else 8192)
    a, b = (jax.random.normal(jax.random.key(i), (size, size)).astype(dtype) for i in (0, 1))
    matmul = jax.jit(jnp.matmul)
    matmul(a, b).block_until_ready()
    best_seconds = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        matmul(a, b).block_until_ready()
        best_seconds = min(best_seconds, time.perf_counter() - start)
    return 2 * size**3 / best_seconds


class MetricsLog:
    """Writes metrics to metrics.jsonl, one JSON object per line, to TensorBoard and to W&B.

    metrics.jsonl and W&B have the names of the row, TensorBoard has `TAGS`.
    """

    def __init__(
        self,
        run: Path,
        resume_at: int | None = None,
        tracker: WandbLogger | None = None,
        tokens_per_step: int | None = None,
    ) -> None:
        """Open the files.

        Args:
            run: folder of the run.
            resume_at: keep rows up to this step, the resumed run writes later ones again; None: a new run.
            tracker: logger of W&B.
            tokens_per_step: TensorBoard then shows the time per step, too.
        """
        # The writer of TensorBoard needs no TensorFlow.
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        path = run / "metrics.jsonl"
        previous_rows = [row for row in read_metrics(path) if row["step"] <= resume_at] if resume_at else []
        with open_atomic(path) as file:
            file.write("".join(json_text(row) + "\n" for row in previous_rows).encode())
        self._file = path.open("a", encoding="utf-8")
        self._events = EventFileWriter(str(run / "tensorboard"))
        self._tracker = tracker
        self._tokens_per_step = tokens_per_step
        if resume_at is not None:
            self._purge_events(resume_at + 1)

    def write(self, row: dict[str, Any]) -> None:
        """Write one row: `step`, `loss`, and `val_loss` if evaluated; values that are not finite become null."""
        self._file.write(json_text(row) + "\n")
        self._file.flush()
        scalars = tensorboard_scalars(row, self._tokens_per_step)
        self._add_event(row["step"], [_scalar(tag, value) for tag, value in scalars.items()])
        if self._tracker is not None:
            self._tracker.write(row)

    def write_text(self, tag: str, text: str, step: int) -> None:
        """Write a text, which TensorBoard shows on its text page."""
        self._add_event(step, [_text(tag, text)])
        if self._tracker is not None:
            self._tracker.write_text(tag, text, step)

    def _purge_events(self, step: int) -> None:
        """Make TensorBoard discard the events of an interrupted run from this step on."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        self._events.add_event(Event(wall_time=time.time(), step=step, session_log=SessionLog(status=SessionLog.START)))

    def _add_event(self, step: int, values: list[Any]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._events.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def close(self) -> None:
        """Flush and close the files."""
        try:
            self._file.close()
        finally:
            self._events.close()


def tensorboard_scalars(row: Mapping[str, float | None], tokens_per_step: int | None = None) -> dict[str, float]:
    """Return the scalars of a row by their TensorBoard tag, which is GROUP/NAME."""
    scalars = {_tag(name): math.nan if value is None else value for name, value in row.items() if name != "step"}
    if tokens_per_step and row.get("tokens_per_s"):
        scalars[STEP_TIME] = tokens_per_step / row["tokens_per_s"] * 1e3
    return scalars


def _tag(name: str) -> str:
    return TAGS.get(name, name if "/" in name else f"train/{name}")


def _scalar(tag: str, value: float) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary

    return Summary.Value(tag=tag, simple_value=value)


def _text(tag: str, text: str) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.types_pb2 import DT_STRING

    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
    # An indent of four spaces is a verbatim block in Markdown.
    block = "\n".join("    " + line for line in text.splitlines())
    return Summary.Value(tag=tag, metadata=metadata, tensor=TensorProto(dtype=DT_STRING, string_val=[block.encode()]))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl up to the first damaged line, such as a last one that a kill cut short."""
    return list(_rows(path)) if path.exists() else []


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text("utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            return
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            return
        yield row


def plot_loss(run: Path, title: str, unigram: float | None = None) -> Path:
    """Plot training and validation loss of metrics.jsonl against the step, as runs/NAME/loss.png."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_metrics(run / "metrics.jsonl")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    losses = [math.nan if row["loss"] is None else row["loss"] for row in rows]
    axes.plot([row["step"] for row in rows], losses, color="#b8b8b8", lw=1, label="train")
    val_points = [(r["step"], r["val_loss"]) for r in rows if r.get("val_loss") is not None]
    if val_points:
        axes.plot(*zip(*val_points, strict=True), color="#a01c20", lw=2, marker="o", ms=3, label="validation")
        axes.annotate(f"{val_points[-1][1]:.3f}", val_points[-1], textcoords="offset points", xytext=(0, 8), ha="right")
    if unigram is not None:
        axes.axhline(unigram, color="#1f3a5f", lw=1, ls="--", label=f"unigram entropy {unigram:.2f}")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path = run / "loss.png"
    figure.savefig(path, dpi=130)
    return path
