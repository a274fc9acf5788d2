"""The sweep program: failed runs, finished runs, Ctrl-C, invalid input."""

import csv
import dataclasses
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import yaml

import dantinox
from dantinox.cli import train
from dantinox.metrics.logger import read_metrics
from dantinox.sweep import __main__ as sweep
from dantinox.sweep import report
from dantinox.sweep.report import Outcome
from dantinox.sweep.search_space import load_sweep
from dantinox.system.run_lock import NAME, Owner, RunLock, RunLockedError
from tests.helpers.documented_messages import message_pattern

TINY = {
    "n_layers": 1, "dim": 16, "n_heads": 2, "n_kv_heads": 1, "window": 8, "seq_len": 16, "max_context": 32,
    "batch_size": 4, "eval_batches": 1, "sample_tokens": 0, "tokenizer": "char", "data": "text.txt", "grad_clip": 0.0,
    "log_every": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "text.txt").write_text("Nel mezzo del cammin di nostra vita mi ritrovai per una selva oscura\n" * 200)
    return folder


def write(folder, name, values, **changes):
    parameters = {key: {"value": value} for key, value in TINY.items() if key not in values}
    text = {"program": "dantinox/train.py", "method": "grid", "parameters": {**values, **parameters}} | changes
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(text, sort_keys=False))


def start(*words, cwd):
    command = [sys.executable, "-m", "dantinox.sweep", *map(str, words)]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(*words, cwd, code=0):
    process = start(*words, cwd=cwd)
    out, err = process.communicate(timeout=600)
    assert process.returncode == code, out + err
    assert "Traceback" not in err
    return out, err


@pytest.fixture(scope="module")
def finished(place):
    """A run that ends well, one with a NaN, and one of settings that do not go together."""
    heads = {"n_heads": {"values": [2, 4]}, "n_kv_heads": {"values": [1, 4]}}
    write(place, "heads", {**heads, "lr": {"values": [0.01, 1e30]}, "steps": {"value": 6}}, run_cap=3)
    return place / "runs" / "heads", run("heads.yaml", cwd=place)[0]


def test_failed_run_is_a_row_and_the_sweep_continues(finished):
    folder, out = finished
    with (folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    states = {(row["n_heads"], row["n_kv_heads"], row["lr"]): row["state"] for row in rows}
    assert states == {
        ("2", "1", "0.01"): "done",
        ("2", "1", "1e+30"): "failed",
        ("2", "4", "0.01"): "refused",
    }
    why = {row["state"]: row["why"] for row in rows}
    assert why["refused"] == "n_heads is 2 and n_kv_heads is 4; n_heads must be a multiple of n_kv_heads"
    assert re.match(r"step \d is not finite \(loss [\d.]+, grad_norm nan\): its update was discarded", why["failed"])
    done = [row for row in rows if row["state"] == "done"]
    assert rows[:1] == done
    for row in done:
        last = read_metrics(folder / row["run"] / "metrics.jsonl")[-1]
        assert last["step"] == 6 and float(row["val_loss"]) == last["val_loss"] and float(row["loss"]) == last["loss"]
        model, _ = dantinox.load(folder / row["run"])
        assert int(row["parameters"]) == sum(x.size for x in dantinox_leaves(model))
    table = (folder / "results.md").read_text()
    assert table in out and "1 of 3 runs are done; results are in runs/heads" in out
    head, _, *lines = table.splitlines()
    assert re.sub(r" +", " ", head).startswith(
        "| n_heads | n_kv_heads | lr | val_loss | loss | tokens/s | parameters |"
    )
    assert [f"{float(row['val_loss']):.4f}" in line for row, line in zip(done, lines)] == [True]


def dantinox_leaves(model):
    import jax
    from flax import nnx

    return jax.tree.leaves(nnx.state(model))


@pytest.mark.slow
def test_finished_runs_are_skipped_and_failed_runs_resume(finished, place):
    folder, _ = finished
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/metrics.jsonl")}
    out, _ = run("heads.yaml", cwd=place)
    begun = re.findall(r"^\d/3 (\S+): (starts|resumes)", out, re.M)
    assert len(begun) == 1 and begun[0][1] == "resumes" and "lr=1e+30" in begun[0][0]
    same = [path for path, time in before.items() if path.stat().st_mtime_ns == time]
    assert len(same) == 1 and not any("lr=1e" in str(path) for path in same)
    listed, _ = run("heads.yaml", "--dry-run", cwd=place)
    assert listed.count("(done)") == listed.count("(refused: n_heads is 2 and n_kv_heads is 4") == 1


@pytest.mark.slow
def test_sweep_interrupted_by_ctrl_c_resumes(place):
    fixed = {name: {"value": value} for name, value in (("steps", 100_000), ("eval_every", 0), ("save_every", 0))}
    write(place, "long", {"lr": {"values": [0.01, 0.02]}, **fixed})
    process, folder = start("long.yaml", cwd=place), place / "runs" / "long"
    deadline = time.monotonic() + 300
    while sum(len(read_metrics(path)) for path in folder.glob("*/metrics.jsonl")) < 5 and time.monotonic() < deadline:
        time.sleep(0.1)
    second = subprocess.run(
        [sys.executable, "-m", "dantinox.sweep", "long.yaml"], cwd=place, capture_output=True, text=True, timeout=300
    )
    line = "dantinox-sweep: error: runs/long is in use by another sweep or a run of one; wait for it, or stop it\n"
    assert (second.returncode, second.stderr) == (2, line)
    asked = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert time.monotonic() - asked < 15 and process.returncode == 130 and "Traceback" not in err
    assert out.endswith("interrupted; each run is saved. Resume with: python -m dantinox.sweep long.yaml\n")
    assert message_pattern("Ctrl-C in a sweep").fullmatch(
        out.splitlines()[-1].replace("long.yaml", "sweeps/example.yaml")
    )
    (begun,) = [path for path in folder.iterdir() if path.is_dir()]
    (step,) = [int(path.name) for path in (begun / "checkpoints").iterdir()]
    assert step >= 5 and f"interrupted; step {step} is saved" in (folder / f"{begun.name}.log").read_text()
    assert "interrupted" in (folder / "results.md").read_text() and "waiting" in (folder / "results.md").read_text()
    # The rest of a hundred thousand steps is spared: the run believes that it was to have two more.
    config = begun / "config.yaml"
    config.write_text(config.read_text().replace("steps: 100000", f"steps: {step + 2}"))
    write(place, "long", {"lr": {"values": [0.01, 0.02]}, **fixed}, run_cap=1)
    run("long.yaml", cwd=place)
    assert [row["step"] for row in read_metrics(begun / "metrics.jsonl")] == list(range(1, step + 3))


WRONG = {
    "": "file is missing; give a sweep file, such as sweeps/example.yaml",
    "no.yaml": "no.yaml: No such file or directory",
    ".": r"\.: Is a directory",
    "bytes.yaml": "bytes.yaml is not UTF-8 text",
    "typo.yaml": r"typo.yaml: unknown parameter 'windw'; did you mean 'window'\?",
    "value.yaml": "value.yaml: window: window is 0; allowed: 1 or more keys",
    "good.yaml --seed=-1": "seed is -1; allowed: 0 or more",
    "good.yaml --sede 3": r"Unrecognized options: --sede; did you mean --seed\?",
    "good.yaml --runs-dir text.txt": "text.txt/good: Not a directory",
    "good.yaml --runs-dir here": "here/good is a run; give the sweep another name",
}


@pytest.mark.parametrize("words", WRONG)
def test_invalid_input_prints_one_line_and_exits_2(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("Nel mezzo")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe")
    write(tmp_path, "typo", {"windw": {"value": 8}})
    write(tmp_path, "value", {"window": {"values": [8, 0]}})
    write(tmp_path, "good", {"window": {"values": [8, 4]}})
    (tmp_path / "here" / "good").mkdir(parents=True)
    (tmp_path / "here" / "good" / "config.yaml").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        sweep.main(words.split())
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and err.startswith("dantinox-sweep: error: ")
    assert re.search(WRONG[words], err), err
    assert sorted(tmp_path.rglob("*")) == before


def test_dry_run_lists_runs_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("Nel mezzo")
    write(tmp_path, "good", {"window": {"values": [8, None]}})
    assert sweep.main(["good.yaml", "--dry-run"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.startswith("2 runs in runs/good, each with --n-layers=1 --dim=16 ")
    assert [line.split(": ")[1] for line in lines] == ["--window=8", "--window=None"]
    assert sorted(os.listdir()) == ["good.yaml", "text.txt"]


def test_orphaned_run_locks_the_sweep_folder(tmp_path):
    with sweep.lock_folder(tmp_path / "here") as handle:
        child = subprocess.Popen(["sleep", "60"], pass_fds=(handle,))
    try:
        with (
            pytest.raises(dantinox.ConfigError, match="is in use by another sweep or a run of one"),
            sweep.lock_folder(tmp_path / "here"),
        ):
            pass
    finally:
        child.kill()
        child.wait()
    with sweep.lock_folder(tmp_path / "here") as handle:
        assert fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB) is None


def test_sweep_on_another_machine_locks_the_folder(tmp_path):
    owner = dataclasses.replace(Owner.current(), host="elsewhere")
    (tmp_path / NAME).write_bytes(owner.to_bytes())
    with pytest.raises(RunLockedError, match=r"is in use by process \d+ on elsewhere"), sweep.lock_folder(tmp_path):
        pass


@pytest.mark.parametrize("orphaned", [False, True])
def test_training_does_not_rename_the_folder_of_a_sweep(orphaned, tmp_path):
    """Neither while the sweep runs, nor while one of its runs outlives it."""
    (tmp_path / "sweep" / "run").mkdir(parents=True)
    used = tmp_path / "sweep" / ("run" if orphaned else "")
    with RunLock(used) if orphaned else sweep.lock_folder(used):
        config = dantinox.Config().replace(run="sweep", runs_dir=str(tmp_path))
        for attempt in (train.train, train.lock_new_run):
            with pytest.raises(RunLockedError, match=f"{used} is in use by process {os.getpid()}"):
                attempt(config)
    assert os.listdir(tmp_path) == ["sweep"]


def test_table_ranks_by_goal_and_ignores_stale_results(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("Nel mezzo")
    write(tmp_path, "s", {"window": {"values": [8, 4, 2]}}, metric={"name": "mfu", "goal": "maximize"})
    found = load_sweep(tmp_path / "s.yaml")
    runs = found.runs()
    figures = {"val_loss": 1.0, "loss": 1.0, "tokens_per_s": 5e3, "parameters": 1, "active": 1, "cache_bytes": 1}
    outcomes = [Outcome(r, "done", metrics=figures | {"mfu": x}) for r, x in zip(runs, (0.1, float("nan"), 0.3))]
    lines = report.results_table(found, outcomes).splitlines()[2:]
    assert [line.split()[1] for line in lines] == ["2", "8", "4"]
    report.write_results(found, outcomes, tmp_path)
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    assert report.load_outcome(runs[0], tmp_path).state == "waiting"
    (tmp_path / runs[0].name).mkdir()
    for file, text in (
        ("config.yaml", ""),
        ("result.json", json.dumps({"values": runs[0].values, "figures": figures})),
    ):
        (tmp_path / runs[0].name / file).write_text(text)
    assert report.load_outcome(runs[0], tmp_path).state == "done"
    for text in ("{", "[]", json.dumps({"values": runs[1].values, "figures": figures})):
        (tmp_path / runs[0].name / "result.json").write_text(text)
        assert report.load_outcome(runs[0], tmp_path).state == "interrupted"


@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_results_without_a_finite_metric_are_written_and_read(value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("Nel mezzo")
    write(tmp_path, "s", {"window": {"values": [8, 4]}}, metric={"name": "val_loss"})
    found = load_sweep(tmp_path / "s.yaml")
    runs = found.runs()
    for run in runs:
        folder = tmp_path / run.name
        folder.mkdir()
        (folder / "config.yaml").write_text(dantinox.Config().replace(run=run.name).to_yaml())
        row = {"step": 1, "loss": None, "val_loss": value, "tokens_per_s": 5e3}
        (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")  # NaN as earlier versions wrote it
    outcomes = [report.collect_result(run, tmp_path) for run in runs]
    assert all(re.match(r"val_loss (not finite|nan|inf), 5,000 tokens/s", o.one_line("val_loss")) for o in outcomes)
    assert outcomes[0].one_line("router/z").startswith("router/z missing")
    report.write_results(found, outcomes, tmp_path)
    assert not (tmp_path / "results.png").exists()
    refuse = lambda constant: pytest.fail(constant)
    for run in runs:
        json.loads((tmp_path / run.name / "result.json").read_text("utf-8"), parse_constant=refuse)
    again = [report.load_outcome(run, tmp_path) for run in runs]
    assert [(o.state, o.metrics["val_loss"]) for o in again] == [("done", None)] * 2
    assert report.results_table(found, again).count("done") == 0
