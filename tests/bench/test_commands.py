"""The bench programs as a user calls them."""

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

import kernels
from bench import gpu, peers, results
from bench.__main__ import main as bench_command
from kernels import specs

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


def test_without_what_it_needs_it_says_so_in_a_line(monkeypatch, capsys):
    """As where only training was set up."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        bench_command(["--op", "moe_mlp"])
    assert capsys.readouterr().err.splitlines() == [
        "bench: error: pytest-benchmark is not installed here; allowed: `make bench`, which installs it"
    ]


def test_a_run_measures_prints_and_writes(tmp_path):
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
    assert "cut short after" in results["stuck"] and results["late"] == "no time left"
    assert gpu.verdict(done, tiny=True)[:-1] == [
        "1 of 4 parts done",
        "failed: broken",
        "cut short: stuck",
        "no time left for: late",
    ]
    assert "rehearsal" in gpu.verdict(done, tiny=True)[-1] and "rehearsal" not in str(gpu.verdict(done, tiny=False))
    assert json.loads((tmp_path / "summary.json").read_text()) == done
    assert "fine" in (tmp_path / "good.log").read_text()


def test_every_part_is_a_command_that_exists():
    for tiny in (True, False):
        parts = gpu.parts(Path("/tmp/out"), tiny, 540)
        names = [part.name for part in parts]
        assert names[:2] == ["environment", "tensor_cores"]
        assert names[2:5] == ["tensor_core_groups", "tensor_core_experts", "attention-d128-causal"]
        assert len(set(names)) == len(names) and "tiles" in names
        first = {"attention-d128-causal", "grouped-mixtral"}
        assert set(names) >= (first if tiny else set(gpu.JUDGED) | set(gpu.GROUPED))
        for part in parts:
            assert part.command[0] == sys.executable and 0 < part.share <= 1


def test_what_the_kernel_is_judged_by_are_rows_that_differ_in_the_gate_alone():
    rows = {name: specs.find("attention", spec) for name, spec in gpu.JUDGED.items()}
    assert all("h100" in row.machines and row.T == 16384 and row.dtypes == ("bfloat16",) for row in rows.values())
    for plain in ("attention-window", "attention-d128-causal"):
        gated = rows[f"{plain}-gate"]
        assert gated.gate == "elementwise" and rows[plain].gate == "none"
        assert rows[plain].shapes().items() <= gated.shapes().items() and rows[plain].window == gated.window


def test_what_grouped_kernels_are_judged_by_are_rows_with_all_that_is_beside_them():
    machine, names = "h100", {part.name: part.command for part in gpu.parts(Path("/tmp/out"), False, 540)}
    for name, (op, spec) in gpu.GROUPED.items():
        row = specs.find(op, spec)
        assert row in specs.rows(op, "bench", machine)
        command = names[name]
        taken = command[command.index("--implementation") + 1 :]
        assert taken[0] == "pallas" and ("lax.ragged_dot" in taken) == (row.E <= 8)
        known = {*kernels.names(op), *peers.peers(row)}
        assert {each for each in taken if not each.startswith("-")} & known >= {"pallas"}


@pytest.mark.parametrize(
    ("log", "counts"),
    [
        ("collecting ... ", {"of": 0}),
        (
            "collecting ... collected 30 items / 27 deselected / 3 selected\n\n"
            "tests/a.py::test_x[7 a, b-float32] PASSED  [ 33%]\ntests/a.py::test_y FAILED [ 66%]\ntests/a.py::test_z ",
            {"of": 3, "passed": 1, "failed": 1},
        ),
        (
            "created: 4/4 workers\n4 workers [28 items]\n\n"
            "[gw1] [  3%] PASSED tests/a.py::test_x[1] \n[gw0] [  7%] SKIPPED tests/a.py::test_x[2] \n"
            "[gw0] [ 10%] PASSED tests/a.py::test_x[3] ",
            {"of": 28, "passed": 2, "skipped": 1},
        ),
    ],
)
def test_a_log_cut_short_still_tells_how_many_tests_ended(log, counts):
    assert gpu.outcomes(log) == counts
    line = gpu.said({"result": "cut short after 9 s", "tests": counts, "seconds": 9})
    assert (f"of {counts['of']}" if counts["of"] else "no test ended of an unknown number") in line


def test_rows_measured_before_stay_in_the_file_of_the_day(tmp_path):
    head = {"date": "2026-01-01", "device": "cpu", "platform": "cpu", "timer": "t", "versions": {"jax": "1"}}
    row = lambda spec, seconds: {"spec": spec, "direction": "forward", "implementation": "xla", "seconds": seconds}
    write = lambda head, *rows: results.write({"attention": head | {"rows": [*rows], "refused": []}}, tmp_path)
    write(head, row("a", 1), row("b", 1))
    (path,) = write(head, row("b", 2))
    assert [(each["spec"], each["seconds"]) for each in json.loads(path.read_text())["rows"]] == [("a", 1), ("b", 2)]
    write(head | {"versions": {"jax": "2"}}, row("c", 3))
    assert [each["spec"] for each in json.loads(path.read_text())["rows"]] == ["c"]
