"""From the outcomes of many cases to a verdict on each feature.

A feature is wrong if cases with it fail and none with it passes, so that the cases that combine it with others do not
blame those. A failure that no single feature explains is blamed on a pair. Sizes and dtypes are circumstances in which
a feature fails: of a feature and one of them, the feature is wrong.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from bench.judge.cases import DTYPES
from bench.judge.outcomes import FAILED, NO_GRADIENT, NO_KERNEL, OK, REFUSED, WRONG, Outcome

NOT_JUDGED = "not judged"
Features = frozenset[str]
CIRCUMSTANCES = frozenset(("one tile", "several tiles", "one block", "several blocks", *DTYPES))


class Verdict(NamedTuple):
    """What is known of one feature in one form.

    Attributes:
        states: the state of each result: ok, wrong, failed, refused, no gradient, no kernel or not judged.
        case: the outcome to show: of a wrong feature its simplest failing case, of a refused one a refusal.
    """

    states: dict[str, str]
    case: Outcome | None = None

    @property
    def is_wrong(self) -> bool:
        """Whether a result is wrong or its computation failed."""
        return any(state in (WRONG, FAILED) for state in self.states.values())


def verdicts(
    outcomes: Sequence[Outcome], form: str, features: Iterable[str], results: Sequence[str]
) -> dict[Features, Verdict]:
    """Return the verdict on each feature, and on each pair of features that is to blame for a failure.

    Args:
        outcomes: what became of the cases.
        form: the form to judge.
        features: the features, in order.
        results: names of the results.
    """
    of_form = [(each, each.case.features()) for each in outcomes if each.form == form]
    blamed = {name: _blamed(of_form, name) for name in results}
    pairs = dict.fromkeys(each for found in blamed.values() for each in found if len(each) == 2)
    verdict = {}
    for each in (*(frozenset((name,)) for name in features), *pairs):
        with_it = [(outcome, features) for outcome, features in of_form if each <= features]
        states = {name: _state([o.states[name] for o, _ in with_it if name in o.states], name, each, blamed)
                  for name in results if not with_it or any(name in o.states for o, _ in with_it)}  # fmt: skip
        shown = [
            (len(features), number, outcome)
            for number, (outcome, features) in enumerate(with_it)
            if any(outcome.states.get(name) == state and state != OK for name, state in states.items())
        ]
        verdict[each] = Verdict(states, min(shown)[2] if shown else None)
    return verdict


def _state(states: Sequence[str], name: str, features: Features, blamed: dict[str, set[Features]]) -> str:
    if features in blamed[name]:
        return FAILED if WRONG not in states and FAILED in states else WRONG
    for state in (OK, REFUSED, NO_GRADIENT, NO_KERNEL):
        if state in states:
            return state
    return NOT_JUDGED  # also where only cases fail that other features explain


def _blamed(outcomes: Sequence[tuple[Outcome, Features]], name: str) -> set[Features]:
    """Return the features and pairs of features that explain the failures of a result."""
    failing = [features for o, features in outcomes if o.states.get(name) in (WRONG, FAILED)]
    passing = [features for o, features in outcomes if o.states.get(name) == OK]
    found: set[Features] = set()
    for features in failing:
        for size in (1, 2, len(features)):
            subsets = (frozenset(each) for each in itertools.combinations(sorted(features), size))
            explaining = {each for each in subsets if not any(each <= other for other in passing)}
            if explaining:
                found |= {each - CIRCUMSTANCES if len(each - CIRCUMSTANCES) == 1 else each for each in explaining}
                break
    # A pair that another failure's single feature explains adds nothing.
    return {each for each in found if len(each) == 1 or not any(other < each for other in found)}
