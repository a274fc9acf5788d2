"""Random sizes, and how many examples a run draws: all that the tests need of Hypothesis's settings."""

import itertools
import os

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from tests.helpers import tolerance

_examples = itertools.count(1)


def scale_examples(n: int) -> int:
    """n in an ordinary run, more with another profile: by the ratio of its examples to those of an ordinary run.

    EXAMPLES in the environment is a number for every test instead.
    """
    if "EXAMPLES" in os.environ:
        return int(os.environ["EXAMPLES"])
    return -(-n * settings().max_examples // settings.get_profile("repeat").max_examples)


def examples(n: int) -> settings:
    """n random examples in an ordinary run."""
    return settings(max_examples=scale_examples(n))


def shapes(n: int) -> st.SearchStrategy[np.random.Generator]:
    """One of n sources of random sizes, so that several examples share a shape, which is traced once.

    With EXAMPLES in the environment, hardly any two share one.
    """
    return st.integers(1, 10**9 if "EXAMPLES" in os.environ else scale_examples(n)).map(np.random.default_rng)


def clear_programs(every: int = 250) -> None:
    """Count an example and, each time after `every` of them, drop all programs."""
    if next(_examples) % every == 0:
        tolerance.clear_programs()
