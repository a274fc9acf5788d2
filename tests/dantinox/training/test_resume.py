"""Runs that are interrupted, killed, damaged or not finite: resumed runs equal uninterrupted ones."""

import copy
import hashlib
import json
import os
import shutil
import signal
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest

from dantinox import ConfigError
from dantinox.checkpoint import manager
from dantinox.checkpoint.manager import Checkpoints
from dantinox.cli import train
from dantinox.config import Config
from dantinox.metrics import logger as metrics_log
from dantinox.metrics.logger import read_metrics
from dantinox.training import resume as training_resume
from dantinox.training import train_step
from dantinox.training.loop import NonFiniteError
from dantinox.training.signals import Interrupted
from dantinox.training.trainer import Trainer
from tests.helpers.documented_messages import message_pattern

TIMES = ("tokens_per_s", "mfu")
# All that carries state from step to step: dropout, accumulation, an average, experts, a schedule.
SETTINGS = """n_layers=1 dim=16 n_heads=2 n_kv_heads=1 window=8 max_context=32 n_experts=4 mlp_ratio=1.0 dropout=0.2
seq_len=16 batch_size=4 grad_accum=2 ema_decay=0.9 steps=12 lr=0.01 log_every=1 eval_every=4 eval_batches=2 save_every=5
max_checkpoints=2 sample_tokens=0""".split()
SETTINGS = {name: json.loads(value) for name, value in (word.split("=") for word in SETTINGS)}


@pytest.fixture(scope="module", autouse=True)
def here(tmp_path_factory):
    """A folder with a text, where runs go to runs/."""
    folder, before = tmp_path_factory.mktemp("resume"), Path.cwd()
    line = "Nel mezzo del cammin di nostra vita mi ritrovai\n"
    (folder / "text.txt").write_text("".join(f"{i} {line}" for i in range(300)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DANTINOX_CACHE", str(folder / "cache"))
        patch.setattr(metrics_log, "matmul_rate", lambda dtype: 1e9)
        patch.setattr(metrics_log, "plot_loss", lambda *_: None)
        os.chdir(folder)
        yield folder
        os.chdir(before)


@pytest.fixture(scope="module", autouse=True)
def one_compilation(here):
    """Runs whose programs are the same share them, or each would compile its own."""
    made = {}

    def trainer(config: Config) -> Trainer:
        names = (*vars(config.model), *vars(config.optim), "steps", "batch_size", "grad_accum", "seed")
        key = (train_step.mean_over_targets, *(config.flat()[name] for name in names if name != "vocab_size"))
        if key not in made:
            made[key] = Trainer(config)
        shared = copy.copy(made[key])
        shared.config = config.replace(vocab_size=shared.config.model.vocab_size)
        return shared

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "Trainer", trainer)
        yield


def run(name: str, resume: bool = False, **changes) -> Path:
    return train.train(Config().replace(run=name, data="text.txt", **(SETTINGS | changes)), resume)


def rows(path: Path) -> list[dict]:
    """The metrics, but for times."""
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_metrics(path / "metrics.jsonl")]


def weights(path: Path, at: int | None = None) -> str:
    """A hash of every number of a run's state."""
    settings = Config.from_yaml(path / "config.yaml")
    checkpoints = Checkpoints(path)
    state = checkpoints.restore(at or checkpoints.latest_valid()[0], train.Trainer(settings).abstract_state())
    return hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state))).hexdigest()


@pytest.fixture(scope="module")
def whole(one_compilation):
    return run("whole")


def at_step(monkeypatch, number: int, what) -> None:
    """Call `what` when the batch of step `number` is made: while the step before is at work."""
    make = Trainer.batch
    monkeypatch.setattr(Trainer, "batch", lambda self, i: (what() if i == number - 1 else None, make(self, i))[1])


@pytest.mark.slow
def test_two_runs_with_one_seed_are_bit_equal(whole):
    again = run("again")
    assert rows(again) == rows(whole) and weights(again) == weights(whole)
    assert [row["step"] for row in rows(whole) if "val_loss" in row] == [4, 8, 12]


def test_short_run_saves_trained_weights(whole):
    """Fault 1: checkpoints only every N steps, none at the end: a short run keeps untrained weights."""
    path = run("short", save_every=500, eval_every=0)
    assert Checkpoints(path).steps() == [12] and weights(path) == weights(whole)
    kept = Checkpoints(path).restore(12, train.Trainer(Config.from_yaml(path / "config.yaml")).abstract_state())
    start = train.Trainer(Config.from_yaml(path / "config.yaml")).init_state()
    assert all((kept.params[name] != start.params[name]).any() for name in start.params)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.sampled(2)
def test_run_resumed_after_a_signal_equals_uninterrupted_run(number, whole, monkeypatch, capsys):
    """Fault 7: a resumed run is another one where there is dropout, and Ctrl-C loses the place."""
    name, before = f"stopped-{number.name}", signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch, pytest.raises(Interrupted) as stop:
        at_step(patch, 7, lambda: signal.raise_signal(number))
        run(name)
    assert stop.value.code == 128 + number
    told = f"interrupted; step 6 is saved. Resume with: python -m dantinox.train --run {name} --resume"
    assert f"{told}\n" in capsys.readouterr().out and message_pattern("Ctrl-C or SIGTERM").fullmatch(told)
    assert signal.getsignal(signal.SIGINT) is before
    path = run(name, resume=True)
    assert rows(path) == rows(whole) and weights(path) == weights(whole)


def test_evaluation_interrupted_by_a_signal_is_repeated_on_resume(whole, monkeypatch):
    evaluate, times = Trainer.validation_loss, []

    def interrupted(self, params):
        times.append(0)
        if len(times) == 2:
            signal.raise_signal(signal.SIGTERM)
        return evaluate(self, params)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Trainer, "validation_loss", interrupted)
        run("evaluating")
    path = Path("runs/evaluating")
    assert [row["step"] for row in rows(path)] == list(range(1, 8))  # step 8 is saved, and its row is owed
    assert Checkpoints(path).steps()[-1] == 8
    run("evaluating", resume=True)
    assert rows(path) == rows(whole) and weights(path) == weights(whole)


def killed(name: str, monkeypatch, at: int) -> Path:
    """Kill a run silently in step `at`, after half a line of metrics."""

    class Killed(BaseException):
        pass

    def kill():
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_step(patch, at + 1, kill)
        run(name)
    with (Path("runs") / name / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "lo')
    return Path("runs") / name


def test_killed_run_resumes_from_its_checkpoint(whole, monkeypatch):
    """Fault 18: rows of the log are overwritten on resume."""
    path = killed("killed", monkeypatch, at=9)
    run("killed", resume=True)
    assert rows(path) == rows(whole) and weights(path) == weights(whole)


def test_only_runs_without_checkpoints_restart_from_scratch(whole, monkeypatch, capsys):
    """Nothing keeps step 0: the start of a run follows from its settings."""
    path = killed("young", monkeypatch, at=3)
    assert Checkpoints(path).steps() == [] and len(rows(path)) == 2
    run("young", resume=True)
    assert message_pattern("killed before its first checkpoint").search(capsys.readouterr().out)
    assert rows(path) == rows(whole) and weights(path) == weights(whole)
    shutil.rmtree(path / "checkpoints")
    before = (path / "metrics.jsonl").read_bytes()
    with pytest.raises(FileNotFoundError, match="run runs/young has no checkpoint, although it reached step 12"):
        run("young", resume=True)
    assert (path / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_run_with_earlier_setting_names_resumes(here, monkeypatch):
    fixture = Path(__file__).parents[1] / "config" / "earlier_names.yaml"
    settings = Config.from_yaml(fixture)
    expected = train.train(settings.replace(run="today"))
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        at_step(patch, 4, lambda: signal.raise_signal(signal.SIGINT))
        train.train(settings)
    path = Path("runs") / settings.train.run
    shutil.copy(fixture, path / "config.yaml")
    assert train.main(["--run", settings.train.run, "--resume"]) == 0
    assert rows(path) == rows(expected) and weights(path) == weights(expected)
    assert "n_kv_heads: 1" in (path / "config.yaml").read_text()


def test_corrupt_checkpoint_is_reported_and_previous_one_is_used(whole, monkeypatch, capsys):
    path = killed("damaged", monkeypatch, at=12)
    assert Checkpoints(path).steps()[-2:] == [8, 10]
    file = max((path / "checkpoints" / "10").rglob("*"), key=lambda file: file.is_file() and file.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1])
    capsys.readouterr()
    run("damaged", resume=True)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "is damaged" in line]
    assert line.endswith("; resuming from step 8") and file.name in line and "bytes of" in line
    assert message_pattern("a checkpoint is damaged").fullmatch(line)
    assert (path / "damaged" / "10" / "manifest.json").is_file()  # nothing is thrown away
    assert rows(path) == rows(whole) and weights(path) == weights(whole)


def test_run_without_valid_checkpoint_exits_with_a_message(monkeypatch, capsys):
    path = killed("ruined", monkeypatch, at=6)
    for manifest in path.glob("checkpoints/*/manifest.json"):
        manifest.unlink()
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main(["--run", "ruined", "--resume"])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "manifest.json is missing; there is no other checkpoint" in err
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before


def test_full_disk_ends_the_run_with_one_line(whole, monkeypatch, capsys):
    room = manager._max_bytes
    monkeypatch.setattr(manager, "_max_bytes", lambda state: room(state) if train_steps(state) < 10 else 1 << 60)
    Path("full.yaml").write_text(Config().replace(run="full", data="text.txt", **SETTINGS).to_yaml())
    with pytest.raises(SystemExit) as stop:
        train.main(["--config", "full.yaml"])
    assert stop.value.code == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "step 10 could not be saved" in err and "No space left on device" in err
    assert err.endswith("the checkpoint of step 8 is intact\n")
    assert message_pattern("the disk is full").search(err)
    monkeypatch.undo()
    path = run("full", resume=True)
    assert rows(path) == rows(whole) and weights(path) == weights(whole)


def train_steps(state) -> int:
    """Steps that the optimizer has counted."""
    return int(max(leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.dtype == np.int32))


def test_resume_with_different_data_raises(whole):
    """Fault 2: a second corpus is silently replaced by the first."""
    text = Path("text.txt").read_text()
    try:
        Path("text.txt").write_text(text.replace("cammin", "camino"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "Trainer", Trainer)
            with pytest.raises(ValueError, match=r"'text.txt' is not the text that run runs/whole was trained on"):
                run("whole", resume=True)
    finally:
        Path("text.txt").write_text(text)


def test_resume_lists_changed_settings():
    old = Config().replace(**SETTINGS)
    new = old.replace(n_layers=2, n_kv_heads=2, optimizer="lion", ema_decay=0.0, data="other", lr=1.0)
    with pytest.raises(ConfigError) as error:
        training_resume.diff_settings(new, old)
    assert str(error.value) == (
        "--resume cannot change n_layers 1 -> 2; n_kv_heads 1 -> 2; optimizer 'adamw' -> 'lion'; ema_decay 0.9 -> 0.0"
    )
    with pytest.raises(ConfigError) as error:
        training_resume.diff_settings(old.replace(n_layers=6, n_heads=4, n_kv_heads=2), old.replace(n_heads=4))
    assert message_pattern("another model or text with `--resume`").fullmatch(str(error.value))
    assert (
        training_resume.diff_settings(old.replace(lr=1.0, batch_size=8, max_checkpoints=9), old)
        == "lr 0.01 -> 1.0; batch_size 4 -> 8"
    )
    assert training_resume.diff_settings(old, old) == ""


DENSE = {"n_experts": 0, "grad_accum": 1, "dropout": 0.0}  # compiles faster
MARK = 5  # the id of a byte that is not in the text


@pytest.fixture
def planted(monkeypatch):
    """From the batch of step 6, the gradient is NaN and the loss is not."""
    honest, make = train_step.mean_over_targets, Trainer.batch

    def mean_over_targets(losses, targets, count=None):
        one = 1 - (targets == MARK).any() + 0 * jax.numpy.sum(losses)  # or zero, where sqrt has no derivative
        return honest(losses, targets, count) + 0 * jax.numpy.sqrt(one)

    def batch(self, number):
        inputs, targets = make(self, number)
        if number == 5:
            targets = targets.copy()
            targets[0, 0, 3] = MARK
        return inputs, targets

    monkeypatch.setattr(train_step, "mean_over_targets", mean_over_targets)
    monkeypatch.setattr(Trainer, "batch", batch)
    return batch


def test_non_finite_gradient_skips_the_update_and_saves_the_batch(planted, capsys):
    with pytest.raises(NonFiniteError) as stop:
        run("nan", save_every=4, **DENSE)
    path = Path("runs/nan")
    message = str(stop.value)
    assert message_pattern("a loss or gradient is not finite").fullmatch(message)
    assert message.startswith("step 6 is not finite (loss ") and "grad_norm nan" in message
    assert message.endswith("step 5 is saved. Skip the batch with: " + resume("nan") + " --on-nan skip")
    assert [row["step"] for row in rows(path)] == [1, 2, 3, 4, 5]
    dump = np.load(path / "nan-6.npz", allow_pickle=False)
    inputs, targets = planted(train.Trainer(Config.from_yaml(path / "config.yaml")), 5)
    assert (dump["inputs"] == inputs).all() and (dump["targets"] == targets).all() and dump["step"] == 6
    assert np.isfinite(dump["loss"]) and np.isnan(dump["grad_norm"])
    before = weights(path, 5)
    run("nan", resume=True, save_every=1, on_nan="skip", max_checkpoints=99, **DENSE)
    assert weights(path, 6) == before != weights(path, 7)
    assert [(row["step"], row["grad_norm"], row["skipped"]) for row in rows(path) if "skipped" in row] == [(6, None, 1)]
    assert np.isfinite(rows(path)[-1]["val_loss"]) and "; skipped the batch" in capsys.readouterr().out


@pytest.mark.slow
def test_five_hundred_steps_compile_each_program_once(caplog):
    changes = {"eval_every": 50, "save_every": 100, "sample_every": 200, "sample_tokens": 4, "log_every": 10}
    with caplog.at_level("WARNING"), jax.log_compiles():
        path = run("long", steps=500, **changes, **DENSE)
    said = [record.getMessage() for record in caplog.records]
    programs = Counter(text for text in said if text.startswith("Compiling "))
    assert programs and {text: n for text, n in programs.items() if n > 1} == {}
    for name in ("step", "evaluate"):
        assert sum(text.startswith(f"Compiling jit({name}) ") for text in programs) == 1, list(programs)
    assert len(rows(path)) == 51 and rows(path)[-1]["loss"] < 1


def resume(name: str) -> str:
    return f"python -m dantinox.train --run {name} --resume"


def test_early_stopping_keeps_the_best_checkpoint(monkeypatch, capsys):
    losses = iter([3.0, 2.0, 2.5, float("nan"), 1.0, 1.5])
    monkeypatch.setattr(Trainer, "validation_loss", lambda self, params: next(losses))
    path = run("early", patience=2, eval_every=2, save_every=0, max_checkpoints=1)
    assert [row["step"] for row in rows(path)] == list(range(1, 9))
    assert Checkpoints(path).steps() == [4, 8] and Checkpoints(path).best() == 4
    out = capsys.readouterr().out
    assert "stopped early at step 8: 2 evaluations without improvement over validation loss 2.0000 of step 4" in out
    assert message_pattern("no better validation loss, with `--patience 5`").search(out)
    run("early", resume=True, patience=3, eval_every=2, save_every=0, max_checkpoints=1)
    assert [row["step"] for row in rows(path)] == list(range(1, 13)) and Checkpoints(path).best() == 10
