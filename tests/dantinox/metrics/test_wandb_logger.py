"""--wandb, offline: W&B receives what metrics.jsonl contains."""

import importlib.util
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from dantinox.cli import train
from dantinox.metrics import wandb_logger
from dantinox.metrics.logger import read_metrics
from dantinox.sweep import search_space as sweep_file

ROOT = Path(__file__).parents[3]
TINY = """--n-layers 1 --dim 16 --n-heads 2 --n-kv-heads 1 --window 8 --seq-len 16 --max-context 32 --batch-size 4
--eval-batches 2 --sample-tokens 8 --log-every 1 --steps 6 --eval-every 3 --save-every 4 --data text.txt""".split()
INSTALLED = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="the extra wandb is not installed")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in [name for name in os.environ if name.startswith("WANDB_") and name != "WANDB_MODE"]:
        monkeypatch.delenv(name)
    Path("text.txt").write_text("Nel mezzo del cammin di nostra vita mi ritrovai per una selva oscura\n" * 200)
    return tmp_path


def test_missing_wandb_prints_one_line_before_writing(here, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else find(name, *a))
    with pytest.raises(SystemExit) as stop:
        train.main([*TINY, "--wandb"])
    assert stop.value.code == 2
    line = "wandb is not installed; run pip install -c constraints.txt -e '.[wandb]', or omit --wandb"
    assert capsys.readouterr().err == f"dantinox-train: error: {line}\n"
    assert os.listdir() == ["text.txt"]


def records(run: Path):
    """What W&B keeps of a run in its own files, oldest first."""
    from wandb.proto import wandb_internal_pb2

    for path in sorted(run.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        for data in leveldb_log(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            yield record


def leveldb_log(content: bytes, block: int = 32768, head: int = 7):
    """The records of a log in LevelDB's form behind W&B's 7 bytes: (checksum 4, length 2, part 1, bytes) in blocks."""
    assert content[:4] == b":W&B"
    at, record = 7, b""
    while at + head <= len(content):
        if block - at % block < head:  # too little for another head
            at += block - at % block
            continue
        _, length, part = struct.unpack_from("<IHB", content, at)
        record += content[at + head : at + head + length]
        at += head + length
        if part in (1, 4):  # whole, or the last part
            yield record
            record = b""


def history(run: Path) -> list[dict]:
    rows = []
    for record in records(run):
        if record.WhichOneof("record_type") == "history":
            keys = lambda item: item.key or "/".join(item.nested_key)
            rows.append({keys(item): json.loads(item.value_json) for item in record.history.item})
    return rows


@INSTALLED
def test_config_metrics_samples_and_folder_are_logged_to_wandb(here):
    words = [sys.executable, "-m", "dantinox.train", *TINY, "--wandb=True", "--run", "logged"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    run = here / "runs" / "logged"
    compare(run)
    (begun,) = [record.run for record in records(run) if record.WhichOneof("record_type") == "run"]
    config = {item.key: json.loads(item.value_json) for item in begun.config.update}
    assert (config["dim"], config["window"], config["folder"]) == (16, 8, "runs/logged")
    assert begun.display_name == "logged" and begun.project == "dantinox"
    assert (run / wandb_logger.ID_FILE).read_text().strip() == begun.run_id
    html = list(run.glob("wandb/offline-run-*/files/media/html/*.html"))
    assert len(html) == 1 and "<pre>" in html[0].read_text()
    # Two more steps: the same run at W&B, and no step twice.
    words = [sys.executable, "-m", "dantinox.train", "--run", "logged", "--resume", "--steps", "8"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    compare(run)
    ids = {record.run.run_id for record in records(run) if record.WhichOneof("record_type") == "run"}
    assert ids == {begun.run_id}


@INSTALLED
def test_wandb_agent_starts_the_same_runs(monkeypatch):
    """The sweep file through W&B's own reader, and each run through what its agent makes of `command`."""
    from wandb.sdk.launch.sweeps import utils

    monkeypatch.chdir(ROOT)
    found = utils.load_sweep_config("sweeps/example.yaml")
    words = utils.create_sweep_command(found["command"])
    assert words[2:-1] == ["-m", "dantinox.train", "--wandb"] and words[-1] == "${args}"
    for run in sweep_file.load_sweep(ROOT / "sweeps" / "example.yaml").runs():
        given = {name: {"value": value} for name, value in run.values.items()}
        flags = utils.create_sweep_command_args({"args": given})["args"]
        asked = train.parse([*words[4:-1], *flags]).settings
        assert asked == sweep_file.resolve_settings(run.values).replace(wandb=True)
        assert train.parse(run.flags()).settings == sweep_file.resolve_settings(run.values)


def compare(run: Path) -> None:
    """Every metric of metrics.jsonl is at W&B, at its step, and no other is."""
    told = {}
    for row in history(run):
        metrics = {name: value for name, value in row.items() if not name.startswith(("_", "sample"))}
        if metrics:
            assert row["_step"] == metrics["step"] and row["_step"] not in told
            told[row["_step"]] = metrics
    assert told == {row["step"]: row for row in read_metrics(run / "metrics.jsonl")}
