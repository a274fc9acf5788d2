"""What a run reports: rates, JSON lines, TensorBoard events and the loss curve."""

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from dantinox.metrics.wandb_logger import WandbLogger
from dantinox.system.atomic_io import open_atomic


def matmul_rate(dtype: str, size: int | None = None, repeats: int = 8) -> float:
    """FLOP/s that one device reaches on a square matmul of this dtype: the best of a few runs."""
    size = size or (1024 if jax.default_backend() == "cpu" else 8192)
    a, b = (jax.random.normal(jax.random.key(i), (size, size)).astype(dtype) for i in (0, 1))
    product = jax.jit(jnp.matmul)
    product(a, b).block_until_ready()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        product(a, b).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


class MetricsLog:
    """metrics.jsonl, one JSON object a line, and the same scalars as TensorBoard events, and at W&B."""

    def __init__(self, run: Path, resume_at: int | None = None, tracker: WandbLogger | None = None) -> None:
        """`resume_at`: keep lines up to this step, drop those that a resumed run will write again; None: a new run."""
        # TensorBoard's writer alone: no TensorFlow.
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        path = run / "metrics.jsonl"
        kept = [row for row in read_metrics(path) if row["step"] <= resume_at] if resume_at else []
        with open_atomic(path) as file:
            file.write("".join(json.dumps(row) + "\n" for row in kept).encode())
        self._file = path.open("a")
        self._events = EventFileWriter(str(run / "tensorboard"))
        self._tracker = tracker
        if resume_at is not None:
            self._begin_again(resume_at + 1)

    def write(self, row: dict[str, Any]) -> None:
        """One line; `step` and `loss` are always there, `val_loss` where it was evaluated; null: not finite."""
        self._file.write(json.dumps({name: value if math.isfinite(value) else None for name, value in row.items()}))
        self._file.write("\n")
        self._file.flush()
        self._add(row["step"], [_scalar(name, value) for name, value in row.items() if name != "step"])
        if self._tracker is not None:
            self._tracker.write(row)

    def text(self, tag: str, text: str, step: int) -> None:
        """A text for TensorBoard's text page."""
        self._add(step, [_text(tag, text)])
        if self._tracker is not None:
            self._tracker.text(tag, text, step)

    def _begin_again(self, step: int) -> None:
        """Tell TensorBoard to forget what an interrupted run showed of this step and later ones."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        self._events.add_event(Event(wall_time=time.time(), step=step, session_log=SessionLog(status=SessionLog.START)))

    def _add(self, step: int, values: list[Any]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._events.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def close(self) -> None:
        """Flush both."""
        try:
            self._file.close()
        finally:
            self._events.close()


def _scalar(tag: str, value: float) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary

    return Summary.Value(tag=tag, simple_value=value)


def _text(tag: str, text: str) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.types_pb2 import DT_STRING

    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
    # Four spaces make it a verbatim block in TensorBoard's Markdown.
    block = "\n".join("    " + line for line in text.splitlines())
    return Summary.Value(tag=tag, metadata=metadata, tensor=TensorProto(dtype=DT_STRING, string_val=[block.encode()]))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line cut short by a kill is left out."""
    return list(_rows(path)) if path.exists() else []


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return


def plot_loss(run: Path, title: str, unigram: float | None = None) -> Path:
    """Draw runs/NAME/loss.png from metrics.jsonl: training and validation loss against the step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_metrics(run / "metrics.jsonl")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    losses = [math.nan if row["loss"] is None else row["loss"] for row in rows]
    axes.plot([row["step"] for row in rows], losses, color="#b8b8b8", lw=1, label="train")
    held = [(r["step"], r["val_loss"]) for r in rows if r.get("val_loss") is not None]
    if held:
        axes.plot(*zip(*held, strict=True), color="#a01c20", lw=2, marker="o", ms=3, label="validation")
        axes.annotate(f"{held[-1][1]:.3f}", held[-1], textcoords="offset points", xytext=(0, 8), ha="right")
    if unigram is not None:
        axes.axhline(unigram, color="#1f3a5f", lw=1, ls="--", label=f"unigram entropy {unigram:.2f}")
    axes.set(xlabel="step", ylabel="loss (nats a token)", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path = run / "loss.png"
    figure.savefig(path, dpi=130)
    return path
