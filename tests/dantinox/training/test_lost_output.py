"""Runs whose terminal or reader goes away, and runs without a finite loss: nothing is lost, and one line tells."""

import io
import json
import os
import signal
import sys

import pytest

from dantinox.checkpoint.manager import Checkpoints
from dantinox.metrics import logger as metrics_log
from dantinox.metrics.logger import MetricsLog, plot_loss, read_metrics
from dantinox.training.signals import Interrupted
from dantinox.training.trainer import Trainer
from tests.dantinox.training import test_resume as runs
from tests.helpers.documented_messages import message_pattern

here, one_compilation, whole = runs.here, runs.one_compilation, runs.whole  # fixtures
PLOT_LOSS = plot_loss  # the fixtures replace it in its module


class Pipe:
    """A pipe as standard output."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read_fd, write_fd = os.pipe()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(os.fdopen(write_fd, "wb"), "utf-8"))

    def close(self) -> None:
        """The reader goes away."""
        os.close(self.read_fd)


@pytest.mark.slow
def test_closed_pipe_saves_and_the_resumed_run_equals_an_uninterrupted_one(whole, monkeypatch, capsys):
    with monkeypatch.context() as patch, pytest.raises(Interrupted) as stop:
        runs.at_step(patch, 7, Pipe(patch).close)
        runs.run("piped")
    assert stop.value.code == 141
    (told,) = capsys.readouterr().err.splitlines()  # noticed when the validation loss of step 8 is printed
    assert told == f"interrupted; step 8 is saved. Resume with: {runs.resume('piped')}"
    assert message_pattern("the reader of the output ends, as `head` does in a pipe").fullmatch(told)
    path = runs.run("piped", resume=True)
    assert runs.rows(path) == runs.rows(whole) and runs.weights(path) == runs.weights(whole)


@pytest.mark.parametrize("reader", ["there", "gone"])
@pytest.mark.sampled(2)
def test_hangup_saves_and_the_resumed_run_equals_an_uninterrupted_one(reader, whole, monkeypatch, capsys):
    def hang_up():
        if reader == "gone":
            pipe.close()
        signal.raise_signal(signal.SIGHUP)

    name = f"hung-up-{reader}"
    with monkeypatch.context() as patch, pytest.raises(Interrupted) as stop:
        pipe = Pipe(patch) if reader == "gone" else None
        runs.at_step(patch, 7, hang_up)
        runs.run(name)
    assert stop.value.code == 129
    out, err = capsys.readouterr()
    told = f"interrupted; step 6 is saved. Resume with: {runs.resume(name)}\n"
    assert told in (out if reader == "there" else err)
    path = runs.run(name, resume=True)
    assert runs.rows(path) == runs.rows(whole) and runs.weights(path) == runs.weights(whole)


def test_ignored_hangup_does_not_stop_the_run(whole, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        runs.at_step(monkeypatch, 7, lambda: signal.raise_signal(signal.SIGHUP))
        path = runs.run("nohup")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert runs.rows(path) == runs.rows(whole) and runs.weights(path) == runs.weights(whole)


def test_full_disk_below_the_output_does_not_stop_the_run(whole, monkeypatch, capsys):
    with open("/dev/full", "w", encoding="utf-8") as full, monkeypatch.context() as patch:
        runs.at_step(patch, 7, lambda: patch.setattr(sys, "stdout", full))
        path = runs.run("full")
    assert runs.rows(path) == runs.rows(whole) and runs.weights(path) == runs.weights(whole)
    told = capsys.readouterr().err
    assert told == "standard output: No space left on device; training continues without it\n"
    assert message_pattern("the output cannot be written, as on a full disk").fullmatch(told.strip())


def strict_json(text: str):
    """The value of a text, which has neither NaN nor Infinity."""

    def refuse(constant):
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_early_stopping_without_a_finite_validation_loss_prints_one_line(loss, monkeypatch, capsys):
    monkeypatch.setattr(Trainer, "validation_loss", lambda self, params: loss)
    path = runs.run(f"never-{loss}", patience=2, eval_every=2, save_every=0)
    out = capsys.readouterr().out
    assert "stopped early at step 4: 2 evaluations without a finite validation loss\n" in out
    assert message_pattern("no finite validation loss, with `--patience 5`").search(out)
    assert [row.get("val_loss", "-") for row in read_metrics(path / "metrics.jsonl")] == ["-", None, "-", None]
    assert Checkpoints(path).steps() == [4] and Checkpoints(path).best() is None
    for file in [*path.glob("checkpoints/*/manifest.json")]:
        strict_json(file.read_text("utf-8"))
    runs.run(f"never-{loss}", resume=True, patience=3, eval_every=2, save_every=0)
    assert [row["step"] for row in read_metrics(path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_metrics_without_a_finite_number_are_valid_json_and_readable(tmp_path):
    nan, inf = float("nan"), float("inf")
    log = MetricsLog(tmp_path, tokens_per_step=4)
    for step in (1, 2):
        log.write({"step": step, "loss": nan, "val_loss": inf, "grad_norm": None, "tokens_per_s": 3.0})
    log.close()
    lines = (tmp_path / "metrics.jsonl").read_text("utf-8").splitlines()
    row = {"loss": None, "val_loss": None, "grad_norm": None, "tokens_per_s": 3.0}
    assert [strict_json(line) for line in lines] == read_metrics(tmp_path / "metrics.jsonl")
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1} | row, {"step": 2} | row]
    MetricsLog(tmp_path, resume_at=1).close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1} | row]
    assert PLOT_LOSS(tmp_path, "title").read_bytes().startswith(b"\x89PNG")
    assert metrics_log.tensorboard_scalars(row)["val/loss"] != 0
