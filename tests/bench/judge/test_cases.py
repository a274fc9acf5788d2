"""The cases of `python -m bench.judge`: every feature has one of its own, and what is unseen has no effect."""

import numpy as np
import pytest

from bench.judge import cases, forms, presence
from dantinox.kernels import workloads

OPS = tuple(cases.FEATURES)


@pytest.mark.parametrize("op", OPS)
def test_each_feature_has_a_case_of_its_own(op):
    found = cases.cases(op)
    with_feature = {name: [c for c in found if name in c.features()] for name in (*cases.FEATURES[op], *cases.DTYPES)}
    assert all(with_feature.values()), [name for name, each in with_feature.items() if not each]
    ids = [case.id for case in (*found, *presence.simulated_cases(op))]
    assert len(set(ids)) == len(ids)
    unnamed = {"top 3"}
    assert not {f for case in found for f in case.features()} - {*cases.FEATURES[op], *cases.DTYPES} - unnamed


@pytest.mark.parametrize("op", OPS)
def test_features_come_alone_and_in_pairs_over_three_tiles_of_512(op):
    rows = workloads.select(op, "features")
    assert any("," in row.name for row in rows)
    for row in rows:
        lengths = {
            "attention": lambda r: max(r.T, r.S),
            "decode_attention": lambda r: r.C,
            "linear_cross_entropy": lambda r: max(r.N, r.V),
        }
        length = lengths.get(op, lambda r: r.N * getattr(r, "k", 1))(row)
        assert -(-length // 512) >= (3 if "top 1" not in row.name else 2), row.name


@pytest.mark.parametrize("op", OPS)
@pytest.mark.sampled(2)
def test_poisoned_cases_hold_nan_that_the_reference_does_not_see(op):
    poisoned = [case for case in cases.cases(op) if case.poisoned]
    assert poisoned
    for case in poisoned[:2]:
        problem = cases.draw(case)
        given = forms.arguments(case, problem)
        assert any(np.isnan(x).any() for x in _floats(given)) and not any(
            np.isnan(x).any() for x in _floats(forms.arguments(case, problem, clean=True))
        )
        exact = forms.expected(op, case, problem)[1]
        assert all(np.isfinite(x).all() for name, x in exact.items() if "cache" not in name)


def _floats(tree):
    import jax

    return [x for x in map(np.asarray, jax.tree.leaves(tree)) if x.dtype.kind == "f"]
