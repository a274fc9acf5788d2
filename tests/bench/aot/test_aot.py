"""The compile report: what is compiled, for which hardware, and error messages."""

import importlib.util
import json
import subprocess
from pathlib import Path

import pytest

from bench.aot import __main__ as program
from bench.aot import baselines, hardware, profile, worker_pool
from bench.aot import cases as aot_cases
from bench.aot.cases import Case
from bench.aot.gpu import compiler as gpu_compiler
from dantinox import kernels
from dantinox.kernels import registry, workloads

ROOT = Path(__file__).parents[3]


def test_every_row_is_planned_for_every_implementation():
    for target in hardware.TARGETS.values():
        cases = aot_cases.cases(target)
        assert len({case.key for case in cases}) == len(cases)
        for op in aot_cases.OPERATIONS:
            planned = {case.spec for case in cases if case.op == op and case.implementation == "xla"}
            assert planned == {workload.name for workload in workloads.select(op, "aot", target.machine)}
        assert all(case.roofline_seconds(target) > 0 for case in cases[:20])


def test_rows_that_differ_only_in_values_share_a_program():
    uniform, zipf, down = (
        Case("grouped_matmul", f"Mixtral-8x7B {name}", "xla", "bfloat16", "forward")
        for name in ("uniform", "zipf", "down")
    )
    assert uniform.program() == zipf.program() != down.program()


def test_baselines_report_what_they_lack():
    gated = workloads.get("attention", "aot d128 window, gate")
    with pytest.raises(NotImplementedError, match="no gate and no window"):
        baselines.BASELINES["jax_mgpu"].build["attention"](gated)
    with pytest.raises(NotImplementedError, match="no sinks"):
        baselines.BASELINES["splash"].build["attention"](workloads.get("attention", "aot d128 window, sinks"))
    with pytest.raises(NotImplementedError, match="N is 1000"):
        baselines.BASELINES["megablox"].build["grouped_matmul"](workloads.get("grouped_matmul", "aot odd sizes"))


def test_target_hardware_figures():
    assert hardware.get("h100").arch == "sm_90a"
    assert hardware.get("b200").arch == "sm_100a"
    assert hardware.get("a100").arch == "sm_80"
    assert hardware.get("v5e").seconds(197e12, 0, "bfloat16") == 1
    assert hardware.get("v5e").seconds(0, 819e9, "bfloat16") == 1
    config = gpu_compiler.target_config(hardware.get("h100"))
    assert config.count("{") == config.count("}")
    assert "core_count: 132" in config
    assert "/" not in config.replace("//", "")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--target", "h200"], "target is 'h200'; allowed: h100, b200, a100, rtx4090, rtx5090, v5e, v6e, tpu7x"),
        (["--op", "conv"], "op is 'conv'"),
        (["--spec", "none"], "spec is 'none'"),
        (["--implementation", "cutlass"], "implementation is 'cutlass'"),
        (["--target", "h100", "--implementation", "splash"], "nothing to compile"),
        (["--jobs", "many"], "jobs"),
    ],
)
def test_invalid_argument_prints_one_line(capsys, arguments, says):
    with pytest.raises(SystemExit) as stop:
        program.main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1
    assert says in error


@pytest.mark.parametrize("target", ["h100", "v6e"])
def test_missing_extra_prints_one_line_with_the_install_command(capsys, monkeypatch, target):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        program.main(["--target", target])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1
    assert f"{target} needs " in error
    assert "make aot" in error


def test_custom_implementation_with_the_name_of_a_public_kernel_is_refused(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})
    kernels.register("attention", "splash", lambda q, k, v, **options: q)
    with pytest.raises(ValueError, match="'splash' names an implementation of attention and a public kernel"):
        aot_cases.cases(hardware.get("v6e"))


class RefusingWorker(worker_pool.Worker):
    """A worker without a process, which compiles nothing."""

    def ask(self, case):
        self.versions = {"jax": "1"}
        return {"status": "refused", "reason": "nothing compiles here"}


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        (["--implementation", "mine", "xla"], "runs/aot"),
        (["--implementation", "xla"], "profiles/aot"),
        (["--implementation", "mine", "--out", "chosen"], "chosen"),
        (["--implementation", "mine", "xla", "--check"], None),
    ],
)
def test_custom_implementation_is_not_written_into_the_profiles(arguments, folder, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_registered", {})
    monkeypatch.setattr(program, "check_compiler_installed", lambda target: None)
    monkeypatch.setattr(worker_pool, "Worker", RefusingWorker)
    kernels.register("attention", "mine", lambda q, k, v, **options: q)
    profile.save(tmp_path / "profiles/aot/v6e.json", {"target": "v6e", "versions": {"jax": "1"}, "rows": {}})
    before = (tmp_path / "profiles/aot/v6e.json").read_text()
    assert program.main(["--target", "v6e", "--op", "attention", "--spec", "aot d64 window, gate", *arguments]) == 0
    assert (folder == "profiles/aot") == ((tmp_path / "profiles/aot/v6e.json").read_text() != before)
    if folder:
        rows = json.loads((tmp_path / folder / "v6e.json").read_text())["rows"]
        assert any(" / mine / " in key for key in rows) == ("mine" in arguments)
    said = capsys.readouterr().out
    assert ("not built in: mine; the profiles are in runs/aot/" in said) == (folder == "runs/aot")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["h100", "v6e"])
def test_row_compiles_for_absent_hardware(tmp_path, target):
    python = ROOT / ".venv-aot/bin/python"
    if not python.exists():
        pytest.skip("needs the aot extra: make aot")
    command = [python, "-m", "bench.aot", "--target", target, "--spec", "aot E=8 uniform", "--implementation", "xla"]
    command += ["--out", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / f"{target}.json").read_text())["rows"]
    assert {row["status"] for row in rows.values()} == {"compiled"}
    assert all(row["totals"]["kernels"] > 0 for row in rows.values())
    again = subprocess.run([*command, "--check"], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert again.returncode == 0, again.stderr


def test_failure_of_a_further_check_shows_why(capfd):
    assert program.fails("bench.aot.gpu.triton_cases", "v6e")
    assert "bench.aot.gpu.triton_cases v6e failed with exit code 2:" in (error := capfd.readouterr().err)
    assert "invalid choice: 'v6e'" in error
