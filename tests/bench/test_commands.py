"""The bench programs on the command line."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.__main__ import main as bench_command
from bench.report import results

ROOT = Path(__file__).parents[2]


def run(*arguments: str, timeout: float = 300) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=timeout)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("bench", "--spec", "nope"), "allowed:"),
        (("bench", "--budget", "0"), "--budget is 0.0; allowed: seconds above 0"),
        (("bench", "--op", "softmax"), "softmax"),
        (("bench.ablations", "--rounds", "0"), "--rounds is 0; allowed: 1 or more"),
        (("bench.ablations", "--only", "nope"), "allowed: 'base'"),
        (("bench.ablations", "--preset", "nope"), "nano"),
        (("bench.compare", "--device", "abacus"), "'abacus'"),
        (("bench.tutorial", "--budget", "0"), "--budget is 0.0; allowed: seconds above 0"),
        (("bench.tutorial", "nope"), "--tutorial is 'nope'; allowed: attention"),
        (("bench.tutorial", "--compiler", "no/such/python"), "python does not exist; `make tutorial` builds it"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
@pytest.mark.sampled(3)
def test_invalid_input_prints_one_line(arguments, words):
    done = run(*arguments)
    assert done.returncode == 2 and words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not done.stdout


def test_missing_requirement_prints_one_line(monkeypatch, capsys):
    """As where only training was set up."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        bench_command(["--op", "moe_mlp"])
    assert capsys.readouterr().err.splitlines() == [
        "bench: error: pytest-benchmark is not installed; `make bench` installs it"
    ]


def test_run_measures_prints_and_writes(tmp_path):
    chosen = ("--op", "attention", "--spec", "nano", "--direction", "forward", "--implementation", "xla")
    out = ("--budget", "0.05", "--out", str(tmp_path), "--html", str(tmp_path / "page.html"))
    done = run("bench", *chosen, *out, "--lines", str(tmp_path / "lines.jsonl"))
    assert done.returncode == 0, done.stderr
    (line,) = map(json.loads, (tmp_path / "lines.jsonl").read_text().splitlines())
    assert (line["spec"], line["direction"]) == ("nano", "forward") and line["results"]["xla"]["seconds"] > 0
    assert "wall clock" in done.stdout and "roofline" in done.stdout
    (path,) = (tmp_path / "cpu").glob("*-attention.json")
    (row,) = json.loads(path.read_text())["rows"]
    assert row["implementation"] == "xla" and row["error"] < 1e-5 and 0 < row["roofline"] < 3
    assert "nano" in (tmp_path / "page.html").read_text()


def test_run_out_of_time_reports_it_and_writes_partial_results(tmp_path):
    chosen = ("--op", "grouped_matmul", "--spec", "E=1", "E=8", "--direction", "forward", "--implementation", "xla")
    out = ("--budget", "0.05", "--seconds", "0.001", "--out", str(tmp_path), "--html", str(tmp_path / "page.html"))
    done = run("bench", *chosen, *out)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "cpu").glob("*-grouped_matmul.json")
    document = json.loads(path.read_text())
    assert [row["spec"] for row in document["rows"]] == ["E=1"]
    assert [(row["spec"], row["why"]) for row in document["refused"]] == [("E=8", "no time was left")]


def test_earlier_rows_stay_in_the_file_of_the_day(tmp_path):
    head = {"date": "2026-01-01", "device": "cpu", "platform": "cpu", "timer": "t", "versions": {"jax": "1"}}
    row = lambda workload, seconds: {
        "spec": workload,
        "direction": "forward",
        "implementation": "xla",
        "seconds": seconds,
    }
    write = lambda head, *rows: results.write({"attention": head | {"rows": [*rows], "refused": []}}, tmp_path)
    write(head, row("a", 1), row("b", 1))
    (path,) = write(head, row("b", 2))
    assert [(measured["spec"], measured["seconds"]) for measured in json.loads(path.read_text())["rows"]] == [
        ("a", 1),
        ("b", 2),
    ]
    write(head | {"versions": {"jax": "2"}}, row("c", 3))
    assert [measured["spec"] for measured in json.loads(path.read_text())["rows"]] == ["c"]
