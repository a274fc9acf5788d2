"""`python -m bench.judge` as a person uses it, and its judgement of this project's own kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.judge import cases, outcomes, presence, subject
from bench.judge.__main__ import main as judge_main
from dantinox import kernels

ROOT = Path(__file__).parents[3]
OK = {outcomes.OK}
FORWARD_ONLY = """
import jax, jax.numpy as jnp
from dantinox import kernels
from dantinox.kernels.ops.attention import xla

def attention(q, k, v, **options):
    if options["softcap"] is not None:
        raise NotImplementedError("no soft cap")
    o = xla.attention(q, k, v, **options)
    o = jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct(o.shape, o.dtype), o)  # it has no derivative
    return o{fault}
"""


def judge(*words: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "bench.judge", *words, "--no-bench", "--no-compile"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=600,
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("attention", "nothing"), "attention has no implementation 'nothing'; allowed: xla, pallas"),
        (("attention", "nothing.py"), "no file 'nothing.py'"),
        (("convolution", "pallas"), "op is 'convolution'; allowed: attention, grouped_matmul"),
        (("attention",), "the kernel is missing"),
        (("attention", "pallas", "--seconds", "0"), "--seconds is 0; allowed"),
        (("attention", "pallas", "--case", "nothing"), "--case is 'nothing'; allowed: features: several tiles"),
    ],
    ids=["name", "file", "operation", "no kernel", "no time", "case"],
)
def test_bad_arguments_give_one_line(words, message, capsys):
    assert message in one_line(words, capsys)


def one_line(words, capsys) -> str:
    """The line on standard error of a program that ends with exit code 2."""
    with pytest.raises(SystemExit) as end:
        judge_main(words)
    assert end.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def test_file_that_cannot_be_imported_gives_one_line(tmp_path, capsys):
    (tmp_path / "mine.py").write_text("def attention(:\n")
    line = one_line(("attention", str(tmp_path / "mine.py")), capsys)
    assert "cannot be imported: SyntaxError" in line and "line 1" in line
    (tmp_path / "mine.py").write_text("x = 1\n")
    assert "nor defines a function attention" in one_line(("attention", str(tmp_path / "mine.py")), capsys)


@pytest.mark.parametrize(("fault", "code"), [pytest.param("", 0, id="right"), pytest.param(" * 1.01", 1, id="wrong")])
@pytest.mark.slow
def test_forward_only_kernel_is_judged_forward(tmp_path, fault, code):
    (tmp_path / "mine.py").write_text(FORWARD_ONLY.replace("{fault}", fault))
    chosen = ("--case", "7, float32", "features: soft cap, float32")
    done = judge("attention", str(tmp_path / "mine.py"), *chosen, folder=tmp_path)
    assert done.returncode == code, done.stdout + done.stderr
    assert "no gradient dq dk dv" in done.stdout and "no soft cap" in done.stdout
    assert ("nothing wrong found" in done.stdout) == (code == 0) and ("o: error" in done.stdout) == (code == 1)
    assert "NOT JUDGED" in done.stdout and "only JAX operations" in done.stdout


CASES = [(op, case) for op in cases.FEATURES for case in cases.cases(op)]


@pytest.mark.parametrize(("op", "case"), CASES, ids=[f"{op}-{case.id}" for op, case in CASES])
@pytest.mark.sampled(160)
def test_own_kernels_are_right_in_every_case(op, case):
    for outcome in outcomes.judge(op, "pallas", ("CPU", "TPU"), case):
        refused = outcome.form == "TPU" and outcome.states["o"] == outcomes.REFUSED
        assert refused or set(outcome.states.values()) == OK, (outcome.form, outcome.lines)


@pytest.mark.slow
@pytest.mark.parametrize("op", cases.FEATURES)
def test_own_hopper_kernels_are_right_in_the_simulator(op):
    for case in presence.simulated_cases(op):
        (outcome,) = outcomes.judge(op, "pallas", ("Hopper",), case)
        assert set(outcome.states.values()) == OK, outcome.lines


def test_registered_file_is_judged_by_its_own_name(tmp_path):
    (tmp_path / "kernels_of_mine.py").write_text(
        "from dantinox import kernels\nfrom dantinox.kernels.ops.grouped_matmul import xla\n"
        "kernels.register('grouped_matmul', 'renamed', xla.grouped_matmul)\n"
    )
    assert subject.load("grouped_matmul", str(tmp_path / "kernels_of_mine.py")) == "renamed"
    assert "renamed" in kernels.implementation_names("grouped_matmul")
