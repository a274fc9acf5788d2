"""Classic faults, planted one by one in the kernels of the guides: the judge finds each and names its feature."""

import functools
import importlib
from pathlib import Path

import pytest

from bench.judge import cases, outcomes, verdicts
from dantinox import kernels

MAX_CASES, PLAIN_CASES = 8, 2
OPS = ("attention", "grouped_matmul", "moe_mlp", "decode_attention", "linear_cross_entropy")
GUIDES = Path(__file__).parents[3] / "docs" / "guides"


def faults_of(op: str) -> dict[str, tuple[str, str, tuple[str, ...]]]:
    """Name -> (text that occurs once, what replaces it, features of which one must be named as wrong)."""
    return importlib.import_module(f"tests.bench.judge.faults.{op}").FAULTS


def register(op: str, source: str) -> str:
    """Register the kernel that a source text defines; returns its name."""
    module = {"__name__": "mine"}
    exec(compile(source, f"my_{op}.py", "exec"), module)
    kernels.register(op, "faulty", module[op])
    return "faulty"


FAULTS = [(op, name) for op in OPS for name in faults_of(op)]


@pytest.fixture(autouse=True)
def prepare_once(monkeypatch):
    """The faults of an operation share the reference's results."""
    monkeypatch.setattr(outcomes, "prepare", _prepare)


_prepare = functools.cache(outcomes.prepare)


def wrong_features(op: str, implementation: str, form: str, chosen: list[cases.Case]) -> set[str]:
    """The features that the judge calls wrong in a form, from these cases."""
    found = [each for case in chosen for each in outcomes.judge(op, implementation, (form,), case)]
    results = list(dict.fromkeys(result for each in found for result in each.states))
    verdict = verdicts.verdicts(found, form, (*cases.FEATURES[op], *cases.DTYPES), results)
    return {name for blamed, each in verdict.items() for name in blamed if each.is_wrong}


def simplest_cases(op: str, features: tuple[str, ...]) -> list[cases.Case]:
    """Plain cases and the simplest ones with these features: mostly, they suffice to tell."""
    alone = sorted((case for case in cases.cases(op) if not case.is_pair), key=lambda case: len(case.features()))
    chosen = [case for case in alone if case.features() & set(features)][:MAX_CASES]
    return chosen + [case for case in alone if case not in chosen][:PLAIN_CASES]


@pytest.mark.parametrize("op", OPS)
def test_each_operation_has_twenty_faults_that_occur_once(op):
    source = (GUIDES / f"my_{op}.py").read_text("utf-8")
    faults = faults_of(op)
    assert len(faults) >= 20
    assert [name for name, (old, new, _) in faults.items() if source.count(old) != 1 or old == new] == []
    known = {*cases.FEATURES[op], *cases.DTYPES}
    assert {feature for *_, features in faults.values() for feature in features} <= known


@pytest.mark.parametrize(("op", "name"), FAULTS, ids=[f"{op}-{name}" for op, name in FAULTS])
@pytest.mark.sampled(146)
def test_judge_names_the_feature_of_a_planted_fault(op, name):
    old, new, features = faults_of(op)[name]
    implementation = register(op, (GUIDES / f"my_{op}.py").read_text("utf-8").replace(old, new))
    simplest = simplest_cases(op, features)
    # In the form for a TPU, scratch memory and the padding of partial tiles hold NaN.
    for form, chosen in (("CPU", simplest), ("TPU", simplest), ("CPU", cases.cases(op))):
        wrong = wrong_features(op, implementation, form, chosen)
        if wrong & set(features):
            return
    raise AssertionError(wrong)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.slow
def test_kernel_of_the_guide_is_right_in_every_case(op):
    implementation = register(op, (GUIDES / f"my_{op}.py").read_text("utf-8"))
    for case in cases.cases(op):
        for outcome in outcomes.judge(op, implementation, ("CPU", "TPU"), case):
            allowed = {outcomes.OK, *({outcomes.REFUSED} if {"int8", "float8_e4m3fn"} & case.features() else {})}
            assert set(outcome.states.values()) <= allowed, (case.id, outcome.form, outcome.lines)
