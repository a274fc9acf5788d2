"""The description of a wrong result: how much of it is wrong, and where."""

import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from bench.verification.wrong_places import describe, different_bits
from tests.helpers import absent_packages, tolerance

RIGHT = np.random.default_rng(0).standard_normal((2, 256, 4, 128))


def second_warpgroup() -> np.ndarray:
    """Every second 64 rows are wrong, as where one of two warpgroups computes nonsense."""
    actual = RIGHT.copy()
    actual[:, np.arange(256) % 128 >= 64] += 1
    actual[0, 77, 1, 5] += 2
    return actual


def test_rows_of_a_wrong_warpgroup_are_reported():
    text = describe(second_warpgroup(), RIGHT, 0.03, row_axis=1)
    assert text.startswith("error 3 (allowed 0.03), 131072 of 262144 wrong, 0 NaN, worst at (0, 77, 1, 5): ")
    assert text.endswith("; rows 64-127 of each 128: 100%, others 0; columns: 50% everywhere")


def test_wrong_columns_of_one_head_are_reported():
    actual = RIGHT.copy()
    actual[:, :, 2, 64:96] = 9
    text = describe(actual, RIGHT, 0.03)
    assert text.endswith("; rows: 6% everywhere; columns 64-127: 12%, others 0; axis 2: only at 2 (of 0-3)")


def test_nan_is_the_largest_error():
    actual = RIGHT.copy()
    actual[1, 200, 3, 7], actual[0, 0, 0, 0] = np.nan, 50
    text = describe(actual, RIGHT, 0.03, row_axis=1)
    assert text.startswith("error nan (allowed 0.03), 2 of 262144 wrong, 1 NaN, worst at (1, 200, 3, 7): nan, not ")
    assert text.endswith(
        "; rows: only at 0, 200 (of 0-255); columns: only at 0, 7 (of 0-127); axis 2: only at 0, 3 (of 0-3)"
    )


def test_nan_bound_allows_nothing():
    assert ", 4 of 4 wrong, 0 NaN," in describe(np.zeros(4), np.zeros(4), np.nan)


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (np.repeat([1.0, 0.5, 0.0, 0.0], 64), "rows 0-63: 100%, 64-127: 50%, others 0"),
        (np.repeat([0.0, 0.97, 0.85, 1.0], 64), "rows 64-255: 85% to 100%, others 0"),
        (np.repeat([0.0, 1.0, 0.0], 64)[:130], "rows 64-127: 100%, others 0"),
        (np.repeat([0.0, 0.0, 1.0], 64)[:135], "rows 128-134: 100%, others 0"),
        (np.repeat([1, 0, 1, 1, 0, 1, 0, 1, 0, 1, 1.0], 64), "rows 0-63, 128-255, 320-383, 448-511 and 1 more: 100%"),
        (np.linspace(1, 0, 640), "rows 0-127: 85% to 95%, 128-255: 65% to 75%, 256-383: 45% to 55%, others 5% to 35%"),
    ],
    ids=["two blocks", "range", "partial block", "last block", "many blocks", "gradual"],
)
def test_equal_row_blocks_are_reported_together(share, text):
    actual = np.zeros((len(share), 100))
    actual[np.arange(100) < np.round(100 * share)[:, None]] = 1
    assert f"; {text}" in describe(actual, np.zeros_like(actual), 0.1)


def test_arrays_of_any_rank_are_described():
    assert describe(np.float32(2), np.float32(1), 0.1).endswith("1 of 1 wrong, 0 NaN, worst at (): 2, not 1")
    assert describe(np.ones(3), np.zeros(3), 0.1).endswith("; columns: 100% everywhere")
    assert describe(np.arange(9), 0 * np.arange(9), 4.5).endswith("; columns: only at 5, 6, 7, 8 (of 0-8)")
    assert describe(np.arange(9), 0 * np.arange(9), 3.5).endswith("; columns: 56% everywhere")
    assert describe(np.ones((0, 3)), np.ones((0, 3)), 0.1) == "error 0 (allowed 0.1), 0 of 0 wrong, 0 NaN"
    assert describe(np.ones((1, 3)), np.ones((2, 3)), 0.1) == "shape (1, 3), not (2, 3)"


def test_different_bits_of_equal_values_are_reported():
    """Zeros of either sign, and NaN of another payload."""
    right = np.array([[0.0, np.nan, 1.0]] * 70, np.float16)
    assert different_bits(right, right.copy()) == ""
    other = right.copy()
    other[65, 0] = -0.0
    other.view(np.uint16)[66, 1] += 1
    text = different_bits(other, right)
    assert text.startswith("2 of 210 places differ, first at (65, 0): -0.0, not 0.0; rows: only at 65, 66 (of 0-69);")
    assert different_bits(right.astype(np.float32), right) == "float32[70, 3], not float16[70, 3]"


def test_module_imports_only_numpy(tmp_path):
    code = "import bench.verification.wrong_places, sys; print('numpy' in sys.modules, 'jax' in sys.modules)"
    environment, root = (
        absent_packages.environment_without(tmp_path, *absent_packages.OPTIONAL_PACKAGES, "jax", "rich"),
        Path(__file__).parents[3],
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "True False", done.stderr


def test_only_wrong_arrays_are_reported():
    truth = {"o": RIGHT, "dq": RIGHT, "dk": RIGHT, "dv": RIGHT}
    rounded = {name: jnp.asarray(x, jnp.bfloat16) for name, x in truth.items()}
    tolerance.assert_within_bound(rounded, rounded, truth, jnp.bfloat16)
    bad = rounded | {"dv": rounded["dv"].at[0, 130:140].set(jnp.nan), "dq": jnp.asarray(second_warpgroup())}
    with pytest.raises(AssertionError) as raised:
        tolerance.assert_within_bound(bad, rounded, truth, jnp.bfloat16)
    dq, dv = str(raised.value).splitlines()
    assert dq.startswith("dq: error 3 (allowed 0.0") and "; rows 64-127 of each 128: 100%, others 0;" in dq
    assert dv.startswith("dv: error nan (allowed 0.0") and ", 5120 NaN, worst at (0, 130, 0, 0): nan, not " in dv
    assert all("; plain jnp 0.0" in line and ", ulp 0.03" in line for line in (dq, dv))


@pytest.mark.parametrize("beyond", [False, True], ids=["at the bound", "beyond the bound"])
def test_error_at_the_bound_passes_and_beyond_it_fails(beyond):
    """Twice that of plain jnp and an ulp, of 1 where no number is larger."""
    truth, plain = {"o": np.zeros((3, 2))}, {"o": np.full((3, 2), 2.0**-10)}
    actual = {"o": np.full((3, 2), 2.0**-9 + 2.0**-23 + beyond * 2.0**-30)}
    if not beyond:
        tolerance.assert_within_bound(actual, plain, truth, jnp.float32)
        return
    with pytest.raises(AssertionError, match="6 of 6 wrong"):
        tolerance.assert_within_bound(actual, plain, truth, jnp.float32)


def test_missing_array_and_non_finite_reference_are_reported():
    truth = {"o": np.full((2, 2), np.inf), "dq": np.zeros((2, 2)), "dk": np.zeros((2, 2))}
    actual = {"o": np.zeros((2, 2)), "dk": np.ones((2, 2))}
    with pytest.raises(AssertionError) as raised:
        tolerance.assert_within_bound(actual, truth | {"o": np.zeros((2, 2))}, truth, jnp.float32)
    o, dq, dk = str(raised.value).splitlines()
    assert (o, dq) == ("o: the oracle itself is not finite", "dq: missing") and dk.startswith("dk: error 1 ")


def test_arrays_with_different_bits_are_reported():
    a = {"o": np.zeros(3, np.float32), "dq": np.ones(3, np.float32), "dk": np.ones(3, np.float32)}
    tolerance.assert_bit_equal(a, {name: x.copy() for name, x in a.items()})
    with pytest.raises(AssertionError) as raised:
        tolerance.assert_bit_equal(
            a, a | {"o": np.array([0, -0.0, 0], np.float32), "dk": np.full(3, np.nan, np.float32)}
        )
    o, dk = str(raised.value).splitlines()
    assert o.startswith("o: 1 of 3 places differ, first at (1,): 0.0, not -0.0") and dk == "dk: not finite"
