"""The training program: the files it writes, resuming, invalid input, Ctrl-C."""

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import quote

import jax
import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dantinox
from dantinox.checkpoint.manager import Checkpoints
from dantinox.cli import evaluate, export, generate, train
from dantinox.config import Config
from dantinox.metrics.logger import read_metrics
from dantinox.model.params import split_params
from tests.helpers.documented_messages import message_pattern
from tests.helpers.tensorboard_server import tensorboard

TINY = """--n-layers 1 --dim 32 --n-heads 2 --n-kv-heads 1 --window 8 --seq-len 16 --max-context 64 --batch-size 4
--eval-batches 2 --sample-tokens 8 --log-every 1""".split()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "inferno.txt"
    line = "Nel mezzo del cammin di nostra vita mi ritrovai per una selva oscura, che la diritta via era smarrita.\n"
    path.write_text("".join(f"{i} {line}" for i in range(200)))
    return path


def run(*words, cwd, check=None):
    command = [sys.executable, "-m", "dantinox.train", *map(str, words)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=600)
    assert check is None or done.returncode == check, done.stderr
    return done


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    """A run of 6 steps in its folder."""
    folder = tmp_path_factory.mktemp("runs")
    flags = ["--data", text, "--eval-every", 3, "--save-every", 4, "--profile-steps", "2:3", "--n-experts", 2]
    done = run(*TINY, "--run", "whole", "--steps", 6, *flags, cwd=folder, check=0)
    return folder, done.stdout


def test_run_writes_every_documented_file(finished):
    folder, out = finished
    path = folder / "runs" / "whole"
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 7))
    assert all(row["loss"] > 0 for row in rows)
    assert [row["step"] for row in rows if "val_loss" in row] == [3, 6]
    assert sorted(int(p.name) for p in (path / "checkpoints").iterdir()) == [4, 6]  # the last step is always saved
    assert (path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "active per token" in (path / "summary.txt").read_text()
    settings = yaml.safe_load((path / "config.yaml").read_text())
    assert settings["dim"] == 32 and settings["vocab_size"] > 200
    assert Config.from_yaml(path / "config.yaml").flat() == settings
    assert "sample at step 6" in out and "validation loss" in out


def test_tensorboard_shows_scalars_samples_and_trace(finished):
    folder = finished[0] / "runs" / "whole" / "tensorboard"
    events = EventAccumulator(str(folder)).Reload()
    rows = read_metrics(folder.parent / "metrics.jsonl")
    assert {tag.split("/")[0] for tag in events.Tags()["scalars"]} == {"train", "val", "rate", "norm", "router"}
    for name, tag in (("loss", "train/loss"), ("grad_norm", "norm/gradient"), ("lr", "rate/learning_rate")):
        assert [event.step for event in events.Scalars(tag)] == list(range(1, 7)), tag
        assert [event.value for event in events.Scalars(tag)] == pytest.approx([row[name] for row in rows]), tag
    for name in ("router/load_max.0", "router/entropy.0", "router/dropped.0", "router/balance", "router/z"):
        assert len(events.Scalars(name)) == 6, name
    rates = zip(events.Scalars("rate/tokens_per_second"), events.Scalars("rate/step_milliseconds"), strict=True)
    assert all(speed.value * took.value / 1e3 == pytest.approx(4 * 16, rel=1e-4) for speed, took in rates)
    assert [event.step for event in events.Scalars("val/loss")] == [3, 6]
    assert "sample" in events.Tags()["tensors"]
    assert list(folder.glob("plugins/profile/*/*.xplane.pb"))
    if platform.machine() == "aarch64":
        return  # TensorBoard's profile plugin has no build for ARM Linux
    with tensorboard(finished[0] / "runs") as board:
        (run,) = board.profile("runs")
        assert "trace_viewer@" in board.profile(f"run_tools?run={quote(run, safe='')}")
        traced = board.trace(run)
        assert "whole/tensorboard" in board.get("data/plugin/scalars/tags")  # beside the trace
    planes = {event["pid"]: event["args"]["name"] for event in traced if event.get("name") == "process_name"}
    (ours,) = (pid for pid, name in planes.items() if name.endswith("named scopes"))
    drawn = {event["name"] for event in traced if event["pid"] == ours and event["ph"] == "X"}
    assert drawn >= {"block0/attention/attend", "block0/moe/experts (backward)", "loss", "optimizer"}
    lanes = {e["tid"]: e["args"]["name"] for e in traced if e["pid"] == ours and e.get("name") == "thread_name"}
    for event in (e for e in traced if e["pid"] == ours and e["ph"] == "X"):
        part = event["name"].removesuffix(" (backward)").replace("block0", "block")
        assert re.fullmatch(re.escape(part) + r"( \(\d+\))?", lanes[event["tid"]]), event  # a lane per part
    steps = {event["name"]: event for event in traced if re.fullmatch(r"train \d+", event.get("name", ""))}
    assert set(steps) == {"train 2", "train 3"}
    inside = [e for e in traced if e["pid"] == ours and e.get("name") == "optimizer"]
    assert inside and all(any(s["ts"] <= e["ts"] <= s["ts"] + s["dur"] for s in steps.values()) for e in inside)


def test_metrics_file_keeps_its_names(finished):
    """Runs of earlier versions resume, and sweeps read these."""
    rows = read_metrics(finished[0] / "runs" / "whole" / "metrics.jsonl")
    names = {"step", "loss", "grad_norm", "lr", "tokens_per_s", "mfu", "val_loss", "balance", "router_z"}
    assert {name for row in rows for name in row if not name.startswith("router/")} == names


def test_profile_steps_end_with_the_table_of_parts_and_the_path(finished):
    folder, out = finished
    table = out[out.index("parts, all blocks together; ms per step") : out.index("traced steps 2 to 3: ")]
    for part in ("block/attention/attend", "block/moe/experts", "loss", "optimizer"):
        (line,) = (line for line in table.splitlines() if f" {part} " in line)
        ms, backward, share = re.findall(r"[\d.]+", line.split(part)[1])
        assert 0 <= float(backward) <= float(ms) and float(share) > 0
    path, logdir = re.search(r"traced steps 2 to 3: (.+)\nlook at it: tensorboard --logdir (.+)", out).groups()
    assert (folder / path).is_file() and path.endswith(".xplane.pb") and logdir == "runs"


def test_load_returns_the_trained_model(finished):
    model, tokenizer = dantinox.load(finished[0] / "runs" / "whole")
    ids = dantinox.generate(model, [tokenizer.encode("Nel ")], max_new_tokens=5, temperature=0.0)
    assert len(ids[0]) == 5
    assert tokenizer.decode(tokenizer.encode("perché no? 学")) == "perché no? 学"


@pytest.fixture(scope="module")
def best_first(finished, tmp_path_factory):
    """The run of 6 steps, of whose checkpoints 4 and 6 the first has the lowest validation loss."""
    run = Path(shutil.copytree(finished[0] / "runs" / "whole", tmp_path_factory.mktemp("best") / "runs" / "nano"))
    Checkpoints(run).update_metadata(4, {"val_loss": 0.5})
    return run


STEPS = {"last": 6, "best": 4, "4": 4, "6": 6, 4: 4, 6: 6}


@pytest.mark.parametrize("checkpoint", STEPS)
@pytest.mark.sampled(2)
def test_load_takes_the_checkpoint_that_is_named(checkpoint, best_first):
    model, _ = dantinox.load(best_first, checkpoint=checkpoint)
    _, weights = split_params(model)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), weights)
    stored = Checkpoints(best_first).restore_weights(STEPS[checkpoint], shapes, averaged=False)
    assert all((stored[name] == value).all() for name, value in weights.items())


def test_evaluate_takes_the_checkpoint_that_is_named(best_first, text, monkeypatch, capsys):
    monkeypatch.chdir(best_first.parents[1])
    losses = {}
    for checkpoint in (None, "last", "best", "4", "6"):
        flags = [] if checkpoint is None else ["--checkpoint", checkpoint]
        evaluate.main(["--run", "nano", "--data", str(text), "--json", *flags])
        losses[checkpoint] = json.loads(capsys.readouterr().out)["loss"]
    assert losses[None] == losses["last"] == losses["6"] != losses["4"] == losses["best"]


WRONG_CHECKPOINTS = {
    "5": "run runs/nano has no checkpoint 5; it has 4, 6",
    "bst": "checkpoint is 'bst'; allowed: last, best or a step: 4, 6",
    "": "checkpoint is ''; allowed: last, best or a step: 4, 6",
    "4.0": "checkpoint is '4.0'; allowed: last, best or a step: 4, 6",
    "../4": "checkpoint is '../4'; allowed: last, best or a step: 4, 6",
    "\u0664": "checkpoint is '\u0664'; allowed: last, best or a step: 4, 6",
}


@pytest.mark.parametrize("checkpoint", WRONG_CHECKPOINTS)
@pytest.mark.parametrize("program", ["generate", "evaluate --data {}", "export --out out"])
@pytest.mark.sampled(2)
def test_unknown_checkpoint_prints_one_line_and_exits_2(program, checkpoint, best_first, text, monkeypatch, capsys):
    monkeypatch.chdir(best_first.parents[1])
    monkeypatch.setattr(export, "to_hf", lambda *_: None)  # which refuses the gate of this model
    name, *flags = program.format(text).split()
    main = {"generate": generate, "evaluate": evaluate, "export": export}[name].main
    with pytest.raises(SystemExit) as stop:
        main(["--run", "runs/nano", *flags, f"--checkpoint={checkpoint}"])
    assert stop.value.code == 2 and not Path("out").exists()
    assert capsys.readouterr().err == f"dantinox-{name}: error: {WRONG_CHECKPOINTS[checkpoint]}\n"


def test_older_run_of_the_same_name_is_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for number in range(3):
        with train.lock_new_run(Config().replace(run="x")) as lock:
            (lock.folder / "metrics.jsonl").write_text(str(number))
    assert "renamed it to runs/x.1" in capsys.readouterr().out
    held = {path.name: (path / "metrics.jsonl").read_text() for path in Path("runs").iterdir()}
    assert held == {"x.1": "0", "x.2": "1", "x": "2"}
    assert len(os.listdir("runs")) == 3


@pytest.mark.parametrize("place", ["file", "link to nothing", "link"])
def test_folder_of_runs_that_is_none_is_refused(place, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link to nothing").symlink_to("nowhere")
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "x").symlink_to("nowhere")
    with pytest.raises((FileExistsError, NotADirectoryError)):
        train.lock_new_run(Config().replace(run="x", runs_dir=str(tmp_path / place)))
    assert sorted(os.listdir(tmp_path)) == ["file", "link", "link to nothing"] and os.listdir(tmp_path / "link") == [
        "x"
    ]


@pytest.mark.slow
def test_ctrl_c_saves_and_prints_the_resume_command(text, tmp_path, monkeypatch, capsys):
    words = [*TINY, "--data", str(text), "--run", "stopped", "--steps", "100000", "--eval-every=0", "--save-every=0"]
    words += ["--tokenizer", "char", "--sample-tokens", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "dantinox.train", *words],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "runs" / "stopped" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while len(read_metrics(metrics)) < 5 and time.monotonic() < deadline:
        time.sleep(0.1)
    folder = metrics.parent
    before = {path: path.read_bytes() for path in folder.iterdir() if path.suffix in (".yaml", ".json", ".txt")}
    monkeypatch.chdir(tmp_path)
    for flags in (["--preset", "nano", "--resume"], TINY):
        with pytest.raises(SystemExit) as stop:
            train.main([*flags, "--run", "stopped", "--data", str(text)])
        told = f"runs/stopped is in use by process {process.pid}; wait for it, stop it, or use another name"
        assert (stop.value.code, *capsys.readouterr()) == (2, "", f"dantinox-train: error: {told}\n")
        assert message_pattern("another process trains the same run").fullmatch(told)
    assert {path: path.read_bytes() for path in before} == before and process.poll() is None
    asked = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert time.monotonic() - asked < 5
    assert process.returncode == 130, err
    assert "Traceback" not in err
    step = int(re.search(r"step (\d+) is saved. Resume with: python -m dantinox.train --run stopped --resume", out)[1])
    assert [p.name for p in (tmp_path / "runs" / "stopped" / "checkpoints").iterdir()] == [str(step)]
    assert os.listdir(tmp_path / "runs") == ["stopped"] and ".run.lock" not in os.listdir(folder)
    run("--run", "stopped", "--resume", "--steps", step + 2, cwd=tmp_path, check=0)
    assert [row["step"] for row in read_metrics(metrics)] == list(range(1, step + 3))


def test_dry_run_trains_and_writes_nothing(text, tmp_path):
    done = run(*TINY, "--data", text, "--dry-run", cwd=tmp_path, check=0)
    for word in ("parameters", "active per token", "FLOPs per token", "MiB per device at the peak", "KV cache"):
        assert word in done.stdout
    assert os.listdir(tmp_path) == []


WRONG = {
    "--slidng-window 3": r"Unrecognized options: --slidng-window",
    "--windw 3": r"did you mean --window\?",
    "--n-heads 7": r"n_heads is 7 and n_kv_heads is \d; n_heads must be a multiple of n_kv_heads",
    "--n-heads 4 --n-kv-heads 3": r"n_heads is 4 and n_kv_heads is 3; n_heads must be a multiple of n_kv_heads",
    "--window -3": r"window is -3; allowed: 1 or more",
    "--window 0": r"window is 0; allowed: 1 or more",
    "--n-experts 2 --experts-per-token 3": r"experts_per_token is 3 but n_experts is 2",
    "--steps x": r"--steps.*'x'",
    "--steps 0": r"steps is 0; it must be positive",
    "--lr nan": r"lr is nan; allowed: a finite number",
    "--mlp relu": r"'relu' for argument '--mlp'. Expected one of",
    "--preset nanno": r"preset is 'nanno'; did you mean 'nano'\?",
    "--config missing.yaml": r"missing.yaml: cannot be read \(No such file or directory\)",
    "--config wrong.yaml": r"unknown setting 'slidng_window'",
    "--data no/such/file.txt": r"no/such/file.txt",
    "--run missing --resume": r"run runs/missing does not exist",
    f"--run {'a' * 300}": "run is a name of 300 bytes; allowed: up to 200",
    "--run a/b": r"run is 'a/b'; allowed: a plain folder name",
    "--mesh data=3000 --batch-size 3000": r"needs 3000 devices",
    "--mesh model=2": r"allowed: NAME=N,\.\.\. with N at least 1",
    "--mesh tensor=2": r"needs 2 devices",
    "--seq-len 9999": r"seq_len is 9999 but max_context is",
    "--grad-accum 3": r"batch_size must be a multiple of grad_accum",
    "--profile-steps 5": r"profile_steps is '5'; allowed: FIRST:LAST",
    "--attn triton --steps 1": r"attention: --attn triton cannot run here: .*; --attn \w+ runs here",
    "--moe triton --n-experts 4 --steps 1": r"moe_mlp: --moe triton cannot run here: .*; --moe \w+ runs here",
    "--decode triton --steps 1": r"decode_attention: --decode triton cannot run here: .*; --decode \w+ runs here",
    "--attn cuda": r"attn is 'cuda'; allowed: auto, reference",
}


@pytest.mark.parametrize("words", WRONG)
@pytest.mark.sampled(2)
def test_invalid_input_prints_one_line_and_exits_2(words, tmp_path, monkeypatch, capsys, text):
    """Fault 9: a typo in a settings file is ignored."""
    monkeypatch.chdir(tmp_path)
    Path("wrong.yaml").write_text("slidng_window: 64\n")
    data = [] if "--data" in words else ["--data", str(text)]
    with pytest.raises(SystemExit) as stop:
        train.main([*data, *words.split()])
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.err.count("\n") == 1 and captured.err.startswith("dantinox-train: error: ")
    assert re.search(WRONG[words], captured.err), captured.err
    assert words != "--windw 3" or message_pattern("a wrong flag").fullmatch(captured.err.strip())
    assert os.listdir() == ["wrong.yaml"]  # nothing is left behind


def test_resume_with_another_model_lists_each_difference(finished, text, monkeypatch, capsys):
    monkeypatch.chdir(finished[0])
    with pytest.raises(SystemExit) as stop:
        train.main(["--run", "whole", "--resume", "--steps", "9", "--n-layers", "2", "--n-kv-heads", "2"])
    assert stop.value.code == 2
    assert "--resume cannot change n_layers 1 -> 2; n_kv_heads 1 -> 2" in capsys.readouterr().err


def test_boolean_flags_accept_a_value():
    parsed = [
        train.parse(["--tie-embeddings=False", "--qk_norm=true", f"--window={w}", "--no-tie-embeddings"]).settings.model
        for w in (3, None)
    ]
    assert [(m.tie_embeddings, m.qk_norm, m.window) for m in parsed] == [(False, True, 3), (False, True, None)]


def test_help_lists_every_setting(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for name in [*Config().flat(), "preset", "config", "resume", "dry_run", "verbose"]:
        assert "--" + name.replace("_", "-") in out, name


@pytest.mark.parametrize("name", ["nano", "nano-moe", "dante", "dante-moe", "h100"])
def test_preset_loads_and_accepts_overrides(name):
    config = Config.from_preset(name)
    assert config.train.run == name
    assert Config.from_preset(name, n_layers=2).model.n_layers == 2
    with pytest.raises(dantinox.ConfigError, match="did you mean 'n_layers'"):
        Config.from_preset(name, n_layer=2)
