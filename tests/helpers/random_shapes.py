"""Random sizes for the tests that draw them, and how many of them a run draws; the rest needs no Hypothesis."""

import itertools

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from tests.helpers import tolerance

_examples = itertools.count(1)


def times(n: int) -> int:
    """n in an ordinary run; with another profile as many times more as it makes of all random examples."""
    return -(-n * settings().max_examples // settings.get_profile("repeat").max_examples)


def examples(n: int) -> settings:
    """n random examples in an ordinary run."""
    return settings(max_examples=times(n))


def shapes(n: int) -> st.SearchStrategy[np.random.Generator]:
    """A source of random sizes, one of n: a shape is traced once and serves several examples."""
    return st.integers(1, times(n)).map(np.random.default_rng)


def forget(every: int = 250) -> None:
    """Called for each example: drops all programs now and then."""
    if next(_examples) % every == 0:
        tolerance.forget()
