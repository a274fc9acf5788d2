"""The mutants fit the kernels and name tests that exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import mutation
from tests.mutation import __main__ as program

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("mutant", mutation.MUTANTS, ids=lambda mutant: mutant.title)
def test_mutant_applies_to_its_file(mutant):
    text = (ROOT / mutant.file).read_text()
    assert mutant.apply(text) != text


@pytest.mark.slow
def test_every_named_test_exists():
    """Collects the first file of every suite once."""
    files = sorted({mutant.files[0] for mutant in mutation.MUTANTS})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    cases = {line for line in done.stdout.splitlines() if "::" in line}
    functions = {case.partition("[")[0] for case in cases}
    missing = {node_id for mutant in mutation.MUTANTS for node_id in mutant.node_ids} - cases - functions
    assert not missing, "\n".join(sorted(missing))
    assert all(mutant.tests for mutant in mutation.MUTANTS)


def test_suites_name_existing_files():
    assert {mutant.suite for mutant in mutation.MUTANTS} == set(mutation.SUITES)
    for mutant in mutation.MUTANTS:
        assert all((ROOT / file).exists() for file in mutant.files), mutant.suite


def test_slow_cases_run_only_if_named_by_id():
    case, function = (mutation.Mutant("", "workloads", "", "", "", (test,)) for test in ("test_x[a]", "test_x"))
    file = "tests/kernels/test_workloads.py"
    assert program.selections(case) == [[f"{file}::test_x[a]", "-m", ""], [file]]
    assert program.selections(function) == [[f"{file}::test_x"], [file]]


def test_mutants_of_triton_kernels_need_triton(monkeypatch, tmp_path):
    triton, other = (mutation.Mutant("", suite, "", "", "", ()) for suite in ("attention_triton", "workloads"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(program, "AOT_ENVIRONMENT", tmp_path / ".venv-aot")
    assert (program.can_run(triton), program.can_run(other)) == (False, True)
    (tmp_path / ".venv-aot" / "bin").mkdir(parents=True)
    (tmp_path / ".venv-aot" / "bin" / "python").touch()
    assert program.can_run(triton)


def test_mutants_are_unique():
    assert len(mutation.MUTANTS) >= 40
    assert len({mutant.title for mutant in mutation.MUTANTS}) == len(mutation.MUTANTS)
    assert len({(mutant.file, mutant.old, mutant.new) for mutant in mutation.MUTANTS}) == len(mutation.MUTANTS)


@pytest.mark.parametrize(("text", "times"), [("", 0), ("a = 1; a = 1", 2)])
def test_mutant_without_unique_anchor_raises(text, times):
    mutant = mutation.Mutant("kernels/x.py", "workloads", "one is two", "a = 1", "a = 2", ())
    with pytest.raises(ValueError, match=re.escape(f"x: one is two: found {times} times in kernels/x.py")):
        mutant.apply(text)


def test_mutant_with_syntax_error_raises():
    with pytest.raises(ValueError, match="does not parse"):
        mutation.Mutant("kernels/x.py", "workloads", "nonsense", "a = 1", "a =", ()).apply("a = 1")


def test_failed_test_is_parsed_from_pytest_summary():
    output = "F\nFAILED tests/kernels/test_x.py::test_y[127 a, b-float32] - AssertionError: o - p\n1 failed"
    assert program.failed_tests(output) == ["tests/kernels/test_x.py::test_y[127 a, b-float32]"]


@pytest.mark.parametrize(
    "text",
    ["f(a, b)  # so", "f(\n    a,  # first\n    b,\n)", "f( a,b )"],
    ids=["one line", "a line per argument", "other spaces"],
)
def test_anchor_ignores_code_layout(text):
    mutant = mutation.Mutant("kernels/x.py", "workloads", "other order", "f(a, b)", "f(b, a)", ())
    assert "f(b, a)" in mutant.apply(text)
    with pytest.raises(ValueError, match="found 0 times"):
        mutant.apply(text.replace("b", "'b'"))
