"""The bench programs as a user calls them."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from bench import gpu

ROOT = Path(__file__).parents[2]


def run(*arguments: str, timeout: float = 300) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=timeout)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("bench", "--spec", "nope"), "allowed:"),
        (("bench", "--budget", "0"), "--budget is 0.0; allowed: seconds above 0"),
        (("bench", "--op", "softmax"), "softmax"),
        (("bench.toggles", "--rounds", "0"), "--rounds is 0; allowed: 1 or more"),
        (("bench.toggles", "--only", "nope"), "allowed: 'base'"),
        (("bench.toggles", "--preset", "nope"), "nano"),
        (("bench.compare", "--device", "abacus"), "'abacus'"),
        (("bench.ladder", "--budget", "0"), "--budget is 0.0; allowed: seconds above 0"),
        (("bench.ladder", "--compiler", "no/such/python"), "no/such/python is not there; `make ladder` builds it"),
        (("bench.gpu", "--out", "/tmp", "--minutes", "0"), "--minutes is 0.0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_input_is_one_line(arguments, words):
    done = run(*arguments)
    assert done.returncode == 2 and words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not done.stdout


def test_a_run_measures_prints_and_writes(tmp_path):
    chosen = ("--op", "attention", "--spec", "nano", "--direction", "forward", "--implementation", "xla")
    out = ("--budget", "0.05", "--out", str(tmp_path), "--html", str(tmp_path / "page.html"))
    done = run("bench", *chosen, *out)
    assert done.returncode == 0, done.stderr
    assert "wall clock" in done.stdout and "roofline" in done.stdout
    (path,) = (tmp_path / "cpu").glob("*-attention.json")
    (row,) = json.loads(path.read_text())["rows"]
    assert row["implementation"] == "xla" and row["error"] < 1e-5 and 0 < row["roofline"] < 3
    assert "nano" in (tmp_path / "page.html").read_text()


def test_a_run_that_has_no_time_left_says_so_and_writes_what_it_has(tmp_path):
    chosen = ("--op", "grouped_matmul", "--spec", "E=1", "E=8", "--direction", "forward", "--implementation", "xla")
    out = ("--budget", "0.05", "--seconds", "0.001", "--out", str(tmp_path), "--html", str(tmp_path / "page.html"))
    done = run("bench", *chosen, *out)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "cpu").glob("*-grouped_matmul.json")
    document = json.loads(path.read_text())
    assert [row["spec"] for row in document["rows"]] == ["E=1"]
    assert [(row["spec"], row["why"]) for row in document["refused"]] == [("E=8", "no time was left")]


def sleeper(name: str, code: str, share: float = 1.0) -> gpu.Part:
    return gpu.Part(name, [sys.executable, "-c", code], share)


def test_the_bounded_command_never_runs_over_and_writes_what_it_has(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "MARGIN", 0.5)
    chosen = [
        sleeper("good", "print('fine')"),
        sleeper("broken", "import sys; print('no such kernel'); sys.exit(3)"),
        # It starts a child that ignores the polite signal.
        sleeper("stuck", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"),
        sleeper("late", "print('never')"),
    ]
    start = time.monotonic()
    done = gpu.perform(chosen, tmp_path, start + 6, Console(quiet=True))
    assert time.monotonic() - start < 12
    results = {part["part"]: part["result"] for part in done}
    assert results["good"] == "done" and "no such kernel" in results["broken"]
    assert "stopped after" in results["stuck"] and results["late"] == "no time left"
    assert json.loads((tmp_path / "summary.json").read_text()) == done
    assert "fine" in (tmp_path / "good.log").read_text()


def test_every_part_is_a_command_that_exists():
    for tiny in (True, False):
        parts = gpu.parts(Path("/tmp/out"), tiny, 540)
        assert [part.name for part in parts][:4] == ["environment", "tensor_cores", "parity", "attention"]
        for part in parts:
            assert part.command[0] == sys.executable and 0 < part.share <= 1
