"""`python3 -m bench.gpu`: its parts, and its report after wrong, hung and crashed kernels."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from bench.gpu import __main__ as program
from bench.gpu import archive, parts, process, runner, smoke
from bench.gpu.runner import Part
from bench.operations import baselines
from dantinox import kernels
from dantinox.kernels import workloads
from tests.helpers import absent_packages

ROOT = Path(__file__).parents[2]
# Runs in each Python process: faults planted in modules when they are imported.
PLANT = """
import sys

planted, find = {planted!r}, PathFinder.find_spec  # module -> (what the command line holds, code that runs in it)


class Planter:
    @classmethod
    def find_spec(cls, name, *where):
        spec = find(name, *where)
        word, code = planted.get(name, ("", ""))
        if spec is not None and word and word in " ".join(sys.orig_argv):
            load = spec.loader.exec_module
            spec.loader.exec_module = lambda module: (load(module), exec(code, module.__dict__))
        return spec


PathFinder.find_spec = Planter.find_spec
"""
WRONG = """
right = forward
def forward(*args, **options):
    out = right(*args, **options)
    row = jnp.arange(out.o.shape[1])[None, :, None, None]
    return out._replace(o=jnp.where(row % 128 >= 64, 0, out.o))
"""
HANGS = """
import time
def decode_attention(*args, **options):
    time.sleep(1000)
"""
CRASHES = """
import os
def tgmm(*args, **options):
    os.abort()
"""
PLANTED = {
    "dantinox.kernels.ops.attention.pallas_sm90.fwd": ('"attention-d128"', WRONG),
    "dantinox.kernels.ops.decode_attention.pallas_sm90.kernel": ('"decode-5-splits"', HANGS),
    "dantinox.kernels.ops.grouped_matmul.pallas_sm90.tgmm": ('"grouped-gradients"', CRASHES),
}


def environment(folder: Path, planted: dict[str, tuple[str, str]]) -> dict[str, str]:
    """An environment in which every Python starts with these faults, and without what a borrowed machine may lack."""
    folder.mkdir(exist_ok=True)
    variables = absent_packages.environment_without(folder, *absent_packages.OPTIONAL_PACKAGES)
    with (folder / "sitecustomize.py").open("a") as file:
        file.write(PLANT.format(planted=planted))
    return variables | {"JAX_PLATFORMS": "cpu"}


def run(*arguments: str, env: dict[str, str] | None = None, timeout: float = 900) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.gpu", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env, timeout=timeout)


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {name: tar.extractfile(name).read() for name in tar.getnames()}


def rehearse(tmp_path: Path, only: tuple[str, ...], minutes: float) -> tuple[dict, dict[str, bytes], str]:
    """(result by part, files of the archive, what was printed) of a rehearsal with the planted faults."""
    out, carried = tmp_path / "out", tmp_path / "carried"
    flags = ("--out", str(out), "--archive", str(carried / "results.tar.gz"), "--minutes", str(minutes))
    done = run(*flags, *(("--only", *only) if only else ()), env=environment(tmp_path / "site", PLANTED))
    assert done.returncode == 1, done.stdout + done.stderr
    results = {part["part"]: part for part in json.loads((carried / "summary.json").read_text())}
    return results, members(carried / "results.tar.gz"), done.stdout


def assert_faults_are_named(results: dict, files: dict[str, bytes], printed: str) -> None:
    wrong = results["smoke-attention-d128"]
    assert wrong["result"].startswith("failed with exit code 1")
    (line,) = wrong["failing"]
    assert line.startswith("attention-d128: o: error") and "rows 64-69: " in line and "others 0; columns" in line
    hung = results["smoke-decode-5-splits"]
    assert hung["result"].startswith("cut short after")
    assert any("hangs at" in line and "bench/gpu/smoke.py" in line for line in hung["failing"]), hung["failing"]
    assert b"cuda-gdb" in files["smoke-decode-5-splits.log"]
    crashed = results["smoke-grouped-gradients"]
    assert crashed["result"].startswith("crashed with SIGABRT")
    assert b"Fatal Python error" in files["smoke-grouped-gradients.log"]
    assert "failed: smoke-attention-d128, smoke-grouped-gradients" in printed
    assert json.loads(files["environment.json"])["versions"]["jax"]
    assert json.loads(files["summary.json"])


@pytest.mark.slow
def test_wrong_hung_and_crashed_kernels_are_reported_and_archived(tmp_path):
    only = ("environment", "smoke-attention-d128", "smoke-decode-5-splits", "smoke-grouped-gradients")
    results, files, printed = rehearse(tmp_path, only, minutes=4)
    assert_faults_are_named(results, files, printed)
    assert results["environment"]["result"] == "done"
    assert set(results) == set(only)


@pytest.mark.slow
def test_every_part_runs_without_optional_packages(tmp_path):
    results, files, printed = rehearse(tmp_path, (), minutes=14)
    assert_faults_are_named(results, files, printed)
    planted = {"smoke-attention-d128", "smoke-decode-5-splits", "smoke-grouped-gradients"}
    assert {name: part["result"] for name, part in results.items() if name not in planted} == dict.fromkeys(
        results.keys() - planted, "done"
    )
    assert set(results) == {part.name for part in parts.suite(tmp_path, True, 800, program.SMOKE_CASES)}


@pytest.mark.slow
def test_one_minute_run_writes_environment_and_finished_parts(tmp_path):
    start = time.monotonic()
    flags = ("--out", str(tmp_path / "out"), "--archive", str(tmp_path / "results.tar.gz"), "--minutes", "1")
    run(*flags, env=environment(tmp_path / "site", {}))
    assert time.monotonic() - start < 75
    results = json.loads((tmp_path / "summary.json").read_text())
    assert results[0]["part"] == "environment" and results[0]["result"] == "done"
    assert len(results) == len(parts.suite(tmp_path, True, 60, program.SMOKE_CASES))
    assert {"environment.json", "summary.json", "smoke-grouped-y.log"} <= set(members(tmp_path / "results.tar.gz"))


def test_part_modules_import_without_optional_packages(tmp_path):
    modules = {
        part.command[3]
        for tiny in (True, False)
        for part in parts.suite(tmp_path, tiny, 500, program.SMOKE_CASES)
        if part.command[2] == "bench.gpu.child"
    }
    assert {"bench.gpu.smoke", "bench.gpu.timing", "bench.profile", "bench.end_to_end"} <= modules
    code = "; ".join(f"import {name}" for name in sorted(modules))
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment(tmp_path / "site", {}), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- parts ---


def test_parts_are_ordered_by_what_only_hardware_can_show(tmp_path):
    names = [part.name for part in parts.suite(tmp_path, False, 510, program.SMOKE_CASES)]
    assert len(set(names)) == len(names)
    stages = ("environment", "smoke", "parity", "time", "block-sizes", "moe-kernel-times", "trace", "model")
    first = [next(i for i, name in enumerate(names) if name.startswith(stage)) for stage in stages]
    assert first == sorted(first)
    assert {*parts.ATTENTION, *parts.GROUPED, *parts.DECODE, *parts.LOSS} <= set(names)
    assert tuple(smoke.CASES) == program.SMOKE_CASES
    assert names[1:10] == [f"smoke-{name}" for name in smoke.CASES]


def test_every_part_is_a_command_with_a_time_share(tmp_path):
    for tiny in (True, False):
        for part in parts.suite(tmp_path, tiny, 510, program.SMOKE_CASES):
            assert part.command[0] == sys.executable and 0 < part.share <= 1
            for word in part.command:
                assert not word.startswith("tests/") or (ROOT / word).exists(), word


def test_timed_attention_rows_differ_only_in_the_gate():
    rows = {name: workloads.get("attention", spec) for name, spec in parts.ATTENTION.items()}
    assert all("h100" in row.devices and row.T == 16384 and row.dtypes == ("bfloat16",) for row in rows.values())
    for plain in ("time-attention-window", "time-attention-d128-causal"):
        gated = rows[f"{plain}-gate"]
        assert gated.gate == "elementwise" and rows[plain].gate == "none"
        assert rows[plain].shapes().items() <= gated.shapes().items() and rows[plain].window == gated.window


def test_grouped_rows_are_compared_with_existing_implementations(tmp_path):
    commands = {part.name: part.command for part in parts.suite(tmp_path, False, 510, program.SMOKE_CASES)}
    for name, (op, spec) in (parts.GROUPED | parts.DECODE).items():
        row = workloads.get(op, spec)
        assert row in workloads.select(op, "bench", "h100")
        taken = json.loads(commands[name][-1])["implementation"]
        known = {*kernels.implementation_names(op), *(baseline.name for baseline in baselines.for_workload(row))}
        assert taken[0] == "pallas" and set(taken) & known >= {"pallas"}
        assert op == "decode_attention" or ("lax.ragged_dot" in taken) == (row.E <= 8)


def test_timed_loss_compares_kernels_with_xla_and_with_all_logits(tmp_path):
    commands = {part.name: part.command for part in parts.suite(tmp_path, False, 510, program.SMOKE_CASES)}
    for name, (op, spec) in parts.LOSS.items():
        row = workloads.get(op, spec)
        assert row in workloads.select(op, "bench", "h100")
        known = {*kernels.implementation_names(op), *(baseline.name for baseline in baselines.for_workload(row))}
        assert json.loads(commands[name][-1])["implementation"] == ["pallas", "triton", "xla", "all logits"]
        assert known >= {"pallas", "triton", "xla", "all logits"}


# --- running them ---


def sleeper(name: str, code: str, share: float = 1.0, group: str = "") -> Part:
    return Part(name, [sys.executable, "-c", code], share, group)


@pytest.mark.slow
def test_hung_or_failed_part_loses_only_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "MARGIN", 0.5)
    monkeypatch.setattr(process, "DEBUGGER_SECONDS", 1.0)
    chosen = [
        sleeper("good", "print('fine')"),
        sleeper("broken", "import sys; print('no such kernel'); sys.exit(3)"),
        # It starts a child that ignores the polite signal.
        sleeper("stuck", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"),
        sleeper("late", "print('never')"),
    ]
    start = time.monotonic()
    printed: list[str] = []
    done = runner.run_parts(chosen, tmp_path, start + 6, tmp_path / "a.tar.gz", printed.append)
    assert time.monotonic() - start < 15
    results = {part["part"]: part["result"] for part in done}
    assert results["good"] == "done" and "no such kernel" in results["broken"]
    assert "cut short after" in results["stuck"] and results["late"] == "no time left"
    assert "  no such kernel" in printed
    assert runner.summarize_run(done, tiny=True)[:-1] == [
        "1 of 4 parts done",
        "failed: broken",
        "cut short: stuck",
        "no time left for: late",
    ]
    assert "rehearsal" in runner.summarize_run(done, tiny=True)[-1]
    assert "rehearsal" not in str(runner.summarize_run(done, tiny=False))
    assert json.loads((tmp_path / "summary.json").read_text()) == done
    assert members(tmp_path / "a.tar.gz")["good.log"] == b"fine\n"


def test_archive_is_rewritten_after_every_part(tmp_path):
    look = f"import tarfile; print(tarfile.open({str(tmp_path / 'a.tar.gz')!r}).getnames())"
    done = runner.run_parts(
        [sleeper("one", "print(1)"), sleeper("two", look)], tmp_path, time.monotonic() + 60, tmp_path / "a.tar.gz"
    )
    assert [part["result"] for part in done] == ["done", "done"]
    assert "one.log" in (tmp_path / "two.log").read_text()


def test_parts_of_a_group_run_in_parallel_and_report_in_order(tmp_path):
    # Each waits for the other.
    code = "import pathlib, time\npathlib.Path('{own}').touch()\n"
    code += "while not pathlib.Path('{other}').exists(): time.sleep(.01)"
    (tmp_path / "out").mkdir()
    first, second = tmp_path / "one", tmp_path / "two"
    chosen = [
        sleeper("first", code.format(own=first, other=second), group="pair"),
        sleeper("second", code.format(own=second, other=first), group="pair"),
    ]
    done = runner.run_parts(chosen, tmp_path / "out", time.monotonic() + 60, tmp_path / "a.tar.gz")
    assert [part["part"] for part in done] == ["first", "second"]
    assert [part["result"] for part in done] == ["done", "done"]


def test_large_raw_trace_is_omitted_and_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "LIMIT_BYTES", 2**16)
    (tmp_path / "trace").mkdir()
    (tmp_path / "trace" / "host.xplane.pb").write_bytes(os.urandom(2**17))
    (tmp_path / "small.json").write_text("{}")
    assert archive.write(tmp_path / "a.tar.gz", tmp_path) == ["trace/host.xplane.pb"]
    assert set(members(tmp_path / "a.tar.gz")) == {"small.json"}


def test_crash_is_reported_with_its_signal(tmp_path):
    (result,) = runner.run_parts(
        [sleeper("crash", "import os; os.abort()")], tmp_path, time.monotonic() + 60, tmp_path / "a.tar.gz"
    )
    assert result["result"].startswith("crashed with SIGABRT")


FAKE_DEBUGGER = """#!/bin/sh
echo "asked: $*"
echo "=> 0x7fff00001230 <attention_forward+560>: SYNCS.PHASECHK"
"""


@pytest.mark.slow
def test_debugger_is_attached_before_a_hung_process_is_killed(tmp_path, monkeypatch):
    program_path = tmp_path / "bin" / "cuda-gdb"
    program_path.parent.mkdir()
    program_path.write_text(FAKE_DEBUGGER)
    program_path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program_path.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(runner, "MARGIN", 0.5)
    code = "from bench.gpu import process; process.prepare_child(); import time; time.sleep(60)"
    (result,) = runner.run_parts([sleeper("hang", code)], tmp_path, time.monotonic() + 5, tmp_path / "a.tar.gz")
    log = (tmp_path / "hang.log").read_text()
    assert "most recent call first" in log, "Python's stacks"
    assert "info cuda warps" in log and "info cuda kernels" in log and "x/6i $pc" in log
    assert any("<attention_forward+560>" in line for line in result["failing"])


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_child_processes_end_with_their_parent(tmp_path):
    child = "from bench.gpu import process; process.prepare_child(); print('up', flush=True); import time; "
    child += "time.sleep(60)"
    parent = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {child!r}]); "
    parent += "print(p.pid, flush=True); p.wait()"
    started = subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    pid = int(started.stdout.readline())
    assert started.stdout.readline() == "up\n"
    started.send_signal(signal.SIGKILL)
    started.wait()
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists() or ") Z " in Path(f"/proc/{pid}/stat").read_text():
            return
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the child outlives its parent")


def test_ctrl_c_stops_the_parts_and_keeps_the_archive(tmp_path):
    flags = ["--tiny", "--out", str(tmp_path), "--minutes", "5", "--only", "environment", "smoke-experts"]
    command = [sys.executable, "-m", "bench.gpu", *flags]
    started = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert started.stdout.readline().startswith("environment: done")
    time.sleep(1)
    started.send_signal(signal.SIGINT)
    _, err = started.communicate(timeout=30)
    assert started.returncode == 130 and not err
    assert "environment.json" in members(tmp_path / "gpu-results.tar.gz")


# --- words ---


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
    ids=["collecting", "one process", "several processes"],
)
def test_truncated_log_gives_the_number_of_finished_tests(log, counts):
    assert runner.count_outcomes(log) == counts
    line = runner.describe({"result": "cut short after 9 s", "tests": counts, "seconds": 9})
    assert (f"of {counts['of']}" if counts["of"] else "no test ended of an unknown number") in line


def test_many_failure_lines_are_truncated_and_counted():
    log = "".join(f"!! case {i}: o: error 1\nother\n" for i in range(30))
    shown = runner.failing_lines(log)
    assert len(shown) == runner.SHOWN and shown[0] == "case 0: o: error 1" and "19 more lines" in shown[-1]
    assert runner.failing_lines("a\nb\nc\nd") == ["b", "c", "d"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--minutes", "0"), "--minutes is 0.0; allowed: more than 0.1"),
        (("--only", "nope"), "--only 'nope' names no part; allowed: environment"),
        (("--minutes", "soon"), "--minutes"),
        (("--out", "/dev/null/x"), "/dev/null/x"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_invalid_input_prints_one_line(flags, message, tmp_path):
    done = run(*(("--out", str(tmp_path)) if "--out" not in flags else ()), "--tiny", *flags)
    assert done.returncode == 2 and message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not done.stdout
