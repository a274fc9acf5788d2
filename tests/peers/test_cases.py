"""The table of what does not map, and the masks of the adapters."""

import unittest

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.peers import masks
from tests.peers.cases import Mapped, unmatched_patterns
from tests.peers.masks import NotMapped


class Suite(unittest.TestCase):
    __test__ = False

    def test_maps(self):
        pass

    def test_has_bias(self):
        raise NotMapped("no bias")


def outcome(name: str, table: dict[str, str]) -> str:
    """What unittest says of one test of the suite, with a table of reasons."""
    case = type("Case", (Mapped, Suite), {"NOT_MAPPED": table})(name)
    result = unittest.TestResult()
    case.run(result)
    kinds = {"skipped": result.skipped, "failed": result.failures, "error": result.errors}
    return " ".join(f"{kind}: {found[0][1].splitlines()[-1]}" for kind, found in kinds.items() if found) or "passed"


@pytest.mark.parametrize(
    ("name", "table", "expected"),
    [
        ("test_maps", {}, "passed"),
        ("test_has_bias", {"test_has_*": "no bias"}, "skipped: not mapped: no bias"),
        ("test_has_bias", {}, "error: tests.peers.masks.NotMapped: no bias"),
        ("test_has_bias", {"test_has_*": "no mask"}, "error: tests.peers.masks.NotMapped: no bias"),
        ("test_maps", {"test_maps": "no bias"}, "failed: AssertionError: the table says that this does not map (no"),
    ],
)
def test_a_test_passes_or_is_in_the_table(name, table, expected):
    assert outcome(name, table).startswith(expected)


def test_a_pattern_that_is_no_tests_reason_is_found():
    table = {"test_bias?": "a", "test_bias1": "b", "test_gone": "c"}
    assert unmatched_patterns(table, ["test_bias0", "test_bias1"]) == ["test_bias1", "test_gone"]


RNG = np.random.default_rng(0)
BAND = np.arange(9)[:, None] - np.arange(7)
MASKS = {
    "top-left causal": BAND >= 0,
    "bottom-right causal": BAND >= 2,
    "window to both sides": abs(BAND) <= 2,
    "future keys": BAND <= 1,
    "shuffled": (BAND >= 0)[RNG.permutation(9)][:, RNG.permutation(7)],
    "keys and queries hidden": (BAND >= -1) & (np.arange(7) != 3) & (np.arange(9) > 1)[:, None],
    "per head": (np.arange(7) < np.array([3, 7])[:, None, None]) & np.ones((9, 1), bool),
    "nothing": np.zeros((9, 7), bool),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.sampled(2)
def test_masked_attention_is_a_softmax_over_the_mask(name):
    mask = MASKS[name].reshape(1, -1, 9, 7)
    q, k, v = (RNG.standard_normal(shape) for shape in ((2, 9, 2, 4), (2, 7, 1, 4), (2, 7, 1, 3)))
    scores = np.where(mask, np.einsum("bthd,bsd->bhts", q, k[:, :, 0]) / 2, -np.inf)
    with np.errstate(divide="ignore"):
        lse = np.log(np.exp(scores).sum(-1))
    weights = np.exp(scores - np.where(np.isfinite(lse), lse, 0)[..., None])
    with jax.numpy_rank_promotion("raise"):
        o, got_lse = masks.attention(*map(jnp.float32, (q, k, v)), mask, implementation="reference")
    np.testing.assert_allclose(o, np.einsum("bhts,bsd->bthd", weights, v[:, :, 0]), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got_lse, lse.swapaxes(1, 2), rtol=1e-5, atol=1e-6)


def test_a_mask_of_single_pairs_does_not_map():
    with pytest.raises(NotMapped, match="no causal, window and segment_ids"):
        masks.find_form((BAND % 2 == 0)[None, None])
