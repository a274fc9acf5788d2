"""The planted faults still fit the kernels: a list that has gone stale would prove nothing."""

import re
from pathlib import Path

import pytest

from tests import mutation
from tests.mutation import __main__ as program

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("mutant", mutation.MUTANTS, ids=lambda mutant: mutant.title)
def test_mutant_applies_to_its_file(mutant):
    assert mutant.applied((ROOT / mutant.file).read_text()) != (ROOT / mutant.file).read_text()
    for name in mutation.FILES[mutant.tests]:
        assert (ROOT / f"tests/{name}.py").exists()


def test_mutants_are_unique():
    assert len(mutation.MUTANTS) >= 40
    assert len({mutant.title for mutant in mutation.MUTANTS}) == len(mutation.MUTANTS)
    assert len({(mutant.file, mutant.old, mutant.new) for mutant in mutation.MUTANTS}) == len(mutation.MUTANTS)


@pytest.mark.parametrize(("text", "times"), [("", 0), ("a = 1; a = 1", 2)])
def test_mutant_without_unique_anchor_raises(text, times):
    mutant = mutation.Mutant("kernels/x.py", "specs", "one is two", "a = 1", "a = 2", "")
    with pytest.raises(ValueError, match=re.escape(f"x: one is two: found {times} times in kernels/x.py")):
        mutant.applied(text)


def test_mutant_with_syntax_error_raises():
    with pytest.raises(ValueError, match="does not parse"):
        mutation.Mutant("kernels/x.py", "specs", "nonsense", "a = 1", "a =", "").applied("a = 1")


def test_failed_test_is_parsed_from_pytest_summary():
    output = "F\nFAILED tests/kernels/test_x.py::test_y[127 a, b-float32] - AssertionError: o - p\n1 failed"
    assert program.failures(output) == ["tests/kernels/test_x.py::test_y[127 a, b-float32]"]


@pytest.mark.parametrize(
    "text",
    ["f(a, b)  # so", "f(\n    a,  # first\n    b,\n)", "f( a,b )"],
    ids=["one line", "a line per argument", "other spaces"],
)
def test_anchor_ignores_code_layout(text):
    mutant = mutation.Mutant("kernels/x.py", "specs", "other order", "f(a, b)", "f(b, a)", "")
    assert "f(b, a)" in mutant.applied(text)
    with pytest.raises(ValueError, match="found 0 times"):
        mutant.applied(text.replace("b", "'b'"))
