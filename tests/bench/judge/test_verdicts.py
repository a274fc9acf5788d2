"""From the outcomes of cases to a verdict on each feature: what is to blame, and what no case judges."""

from typing import NamedTuple

import pytest

from bench.judge import verdicts
from bench.judge.outcomes import FAILED, NO_GRADIENT, OK, REFUSED, WRONG, Outcome

FEATURES = ("base", "window", "gate", "cap")


class FakeCase(NamedTuple):
    names: tuple[str, ...]

    @property
    def id(self) -> str:
        return ", ".join(self.names)

    def features(self) -> frozenset[str]:
        return frozenset(("base", *self.names))


def outcome(*features: str, o: str = OK, dq: str = OK) -> Outcome:
    return Outcome(FakeCase(features), "CPU", {"o": o, "dq": dq}, {})  # type: ignore[arg-type]


def judged(*outcomes: Outcome) -> dict[str, dict[str, str]]:
    found = verdicts.verdicts(outcomes, "CPU", FEATURES, ("o", "dq"))
    return {" + ".join(sorted(names)): verdict.states for names, verdict in found.items()}


def test_only_the_feature_to_blame_is_wrong():
    found = judged(
        outcome(), outcome("window", o=WRONG), outcome("gate"), outcome("window", "gate", o=WRONG), outcome("cap")
    )
    assert found["window"] == {"o": WRONG, "dq": OK}
    assert all(found[name] == {"o": OK, "dq": OK} for name in ("base", "gate", "cap"))


def test_a_failure_that_no_feature_explains_blames_the_pair():
    found = judged(outcome(), outcome("window"), outcome("gate"), outcome("cap"), outcome("window", "gate", dq=WRONG))
    assert found["gate + window"] == {"o": OK, "dq": WRONG}
    assert all(found[name]["dq"] == OK for name in FEATURES)


def test_a_kernel_that_is_always_wrong_is_wrong_everywhere():
    found = judged(outcome(o=WRONG), outcome("window", o=WRONG), outcome("gate", o=FAILED))
    assert {found[name]["o"] for name in ("base", "window", "gate")} == {WRONG, FAILED}


def test_what_no_case_judges_is_not_ok():
    found = judged(outcome(), outcome("window", o=REFUSED, dq=REFUSED), outcome("gate", dq=NO_GRADIENT))
    assert found["window"] == {"o": REFUSED, "dq": REFUSED}
    assert found["gate"] == {"o": OK, "dq": NO_GRADIENT}
    assert set(found["cap"].values()) == {verdicts.NOT_JUDGED}


def test_a_wrong_feature_shows_its_simplest_case():
    found = verdicts.verdicts(
        [outcome(), outcome("window", "gate", o=WRONG), outcome("window", o=WRONG)], "CPU", FEATURES, ("o", "dq")
    )
    verdict = found[frozenset(("window",))]
    assert verdict.is_wrong and verdict.case.case.id == "window"


@pytest.mark.parametrize("state", [REFUSED, NO_GRADIENT])
def test_neither_refusals_nor_missing_gradients_are_wrong(state):
    found = verdicts.verdicts([outcome(o=OK, dq=state)], "CPU", ("base",), ("o", "dq"))
    assert not found[frozenset(("base",))].is_wrong


def test_a_feature_that_fails_at_one_size_only_is_wrong():
    found = judged(
        outcome("one tile"),
        outcome("several tiles"),
        outcome("window", "one tile"),
        outcome("window", "several tiles", o=WRONG),
    )
    assert found["window"] == {"o": WRONG, "dq": OK} and found["base"]["o"] == OK
    assert not any("several tiles" in name for name in found)
