"""The bench programs on the command line."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import __main__ as bench_program
from bench import ablations
from bench.__main__ import main as bench_command
from bench.report import plots, results
from dantinox import kernels
from dantinox.kernels import registry
from tests.bench.test_report import raw

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
@pytest.mark.sampled(6)
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


@pytest.mark.slow
def test_run_out_of_time_reports_it_and_writes_partial_results(tmp_path):
    chosen = ("--op", "grouped_matmul", "--spec", "E=1", "E=8", "--direction", "forward", "--implementation", "xla")
    out = ("--budget", "0.05", "--seconds", "0.001", "--out", str(tmp_path), "--html", str(tmp_path / "page.html"))
    done = run("bench", *chosen, *out)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "cpu").glob("*-grouped_matmul.json")
    document = json.loads(path.read_text())
    assert [row["spec"] for row in document["rows"]] == ["E=1"]
    assert [(row["spec"], row["why"]) for row in document["refused"]] == [("E=8", "no time was left")]


@pytest.fixture
def custom_attention(monkeypatch):
    """An implementation of attention of the name mine."""
    monkeypatch.setattr(registry, "_registered", {})
    kernels.register("attention", "mine", lambda q, k, v, **options: q)


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        (["--implementation", "mine", "xla"], "runs/bench"),
        ([], "runs/bench"),
        (["--implementation", "xla", "splash"], "profiles"),
        (["--implementation", "mine", "--out", "chosen"], "chosen"),
    ],
)
@pytest.mark.sampled(2)
def test_custom_implementation_is_not_measured_into_the_profiles(
    arguments, folder, custom_attention, monkeypatch, tmp_path, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench_program, "time_operations", lambda arguments: results.from_pytest(raw()))
    assert bench_command(["--op", "attention", *arguments]) == 0
    (path,) = tmp_path.glob("**/cpu/*-attention.json")
    assert path.parent == tmp_path / folder / "cpu"
    said = capsys.readouterr().out
    assert str(path.relative_to(tmp_path)) in said
    assert ("not built in: mine; the results are in runs/bench/" in said) == (folder == "runs/bench")


@pytest.mark.parametrize(("variant", "folder"), [("attn mine", "runs/bench"), ("attn xla", "profiles")])
def test_ablation_with_a_custom_implementation_is_not_in_the_profiles(
    variant, folder, custom_attention, monkeypatch, tmp_path
):
    row = dict.fromkeys(("parameters", "active", "flops_per_token", "peak_bytes", "tokens_per_second", "spread"), 1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ablations, "measure", lambda base, changes, rounds: dict.fromkeys(changes, row))
    assert ablations.main(["--only", variant]) == 0
    (path,) = tmp_path.glob("**/*-ablations.json")
    assert path.parent == tmp_path / folder / "cpu" and variant in json.loads(path.read_text())["rows"]


def test_custom_implementation_with_the_name_of_a_public_kernel_is_refused(custom_attention, capsys):
    kernels.register("attention", "splash", lambda q, k, v, **options: q)
    with pytest.raises(SystemExit, match="2"):
        bench_command(["--op", "attention"])
    assert "'splash' names an implementation of attention and a public kernel" in capsys.readouterr().err


def test_rows_of_another_run_keep_their_ceilings(tmp_path):
    def write(spec, ceilings):
        measured = raw()
        measured["bench"] |= {"ceilings": ceilings}
        (document,) = results.from_pytest(measured).values()
        document["rows"] = [row for row in document["rows"] if row["spec"] in spec]
        (path,) = results.write({"attention": document}, tmp_path)
        return json.loads(path.read_text())

    def ceilings(document):
        return {row["spec"]: row.get("ceilings", document["ceilings"])["copy GB/s"] for row in document["rows"]}

    slow, medium, fast = ({"matmul float32 TFLOP/s": i / 10, "copy GB/s": i} for i in (1, 2, 3))
    write(("S=256", "S=512", "S=1024"), slow)
    assert ceilings(write(("S=512", "S=1024"), medium)) == {"S=256": 1, "S=512": 2, "S=1024": 2}
    document = write(("S=1024",), fast)
    assert ceilings(document) == {"S=256": 1, "S=512": 2, "S=1024": 3}
    assert document["ceilings"] == fast
    drawn = plots.roofline(document["rows"], document["ceilings"], "forward")
    assert "S=1024" in drawn and "S=256" not in drawn and "3 GB/s" in drawn
    again = write(("S=256", "S=512"), fast)
    assert ceilings(again) == dict.fromkeys(("S=256", "S=512", "S=1024"), 3)
    assert not any("ceilings" in row for row in again["rows"])


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
