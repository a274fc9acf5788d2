"""The linear cross-entropy tutorial: accuracy of losses and gradients, documentation, and error messages."""

import functools
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import numpy_interpreter
from bench.verification.fast_compile import jit_fast_compile
from dantinox import reference
from dantinox.kernels import workloads
from dantinox.kernels.dispatch import target_device
from dantinox.kernels.tutorial import linear_cross_entropy as tutorial
from dantinox.kernels.tutorial.linear_cross_entropy import common, step3_tile_skipping, step5_three_products
from tests.helpers import cases, tolerance

FOLDER = Path(common.__file__).parent
TILES = {"n_tile": 32, "v_tile": 48}  # several tiles, partial ones too, at sizes that a test can afford
WITH_GRADIENTS = ("backward", "three_products")
# Step 4 has the forward pass of step 3, as step 5 without gradients; the tests of gradients check it.
FORWARD_STEPS = tutorial.STEPS[:3]


def row(N: int, V: int, M: int = 24, absent: str = "none") -> workloads.LinearCrossEntropy:
    return cases.make_workload(workloads.LinearCrossEntropy, N=N, M=M, V=V, absent=absent)


CASES = {
    "1 of 1": row(1, 1),
    "7 of 33": row(7, 33, M=5),
    "127 of 48, one whole tile": row(127, 48),
    "129 of 127, some rows": row(129, 127, absent="some"),
    "64 of 96, whole tiles": row(64, 96),
    "33 of 97, one word in the last tile": row(33, 97),
    "40 of 50, no row": row(40, 50, absent="all"),
    "130 of 50, one column": row(130, 50, M=1),
}
FEW = ("129 of 127, some rows", "64 of 96, whole tiles")  # also in bfloat16


def draw(case: workloads.LinearCrossEntropy, dtype: str) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
    inputs, aux, dout = cases.draw(case)
    targets = np.where(np.arange(case.N) // 32 == 1, -1, aux["targets"]) if case.absent == "some" else aux["targets"]
    return {name: jnp.asarray(x, dtype) for name, x in inputs.items()}, jnp.asarray(targets), jnp.float32(dout)


def gradients(run: Any, inputs: dict[str, Any], dout: Any) -> dict[str, Any]:
    o, vjp = jax.vjp(run, inputs)
    return {"o": o} | {f"d{name}": x for name, x in vjp(jnp.asarray(dout, o.dtype))[0].items()}


@functools.cache
def program(step: str, with_gradients: bool, small_tiles: bool) -> Any:
    run = reference.linear_cross_entropy if step == "reference" else tutorial.load_step(step)
    options = TILES if small_tiles and step != "reference" else {}

    def call(inputs: dict[str, jax.Array], targets: jax.Array, dout: jax.Array) -> dict[str, jax.Array]:
        f = lambda inputs: run(**inputs, targets=targets, **options)
        return gradients(f, inputs, dout) if with_gradients else {"o": f(inputs)}

    # NumPy does not compile, but it has no copies from and to memory.
    is_compiled = not small_tiles or (step == "three_products" and with_gradients)
    return jit_fast_compile(call) if is_compiled else functools.partial(numpy_interpreter.run, call)


def expected(arguments: Any, with_gradients: bool, wide: bool) -> dict[str, np.ndarray]:
    """The reference in the dtype or, with `wide`, in float64 on the same rounded arguments."""
    inputs, targets, dout = arguments
    with jax.enable_x64(wide):
        if wide:
            inputs, dout = jax.tree.map(lambda x: jnp.asarray(tolerance.to_float64(x)), (inputs, dout))
        return jax.tree.map(np.asarray, program("reference", with_gradients, True)(inputs, targets, dout))


def assert_within_tolerance(step: str, arguments: Any, with_gradients: bool, small_tiles: bool = True) -> None:
    inputs, targets, _ = arguments
    dtype = inputs["h"].dtype
    result = program(step, with_gradients, small_tiles)(*arguments)
    assert result["o"].dtype == jnp.float32 and result["o"].shape == targets.shape
    absent = np.asarray(targets) < 0
    assert not np.any(np.asarray(result["o"])[absent])
    if with_gradients:
        assert all(result[f"d{name}"].dtype == dtype for name in inputs)
        assert not np.any(tolerance.to_float64(result["dh"])[absent])
    both = [expected(arguments, with_gradients, wide) for wide in (False, True)]
    tolerance.assert_within_bound(result, *both, dtype)


@pytest.mark.parametrize("step", FORWARD_STEPS)
@pytest.mark.parametrize("name", CASES)
def test_each_step_matches_reference(step, name):
    assert_within_tolerance(step, draw(CASES[name], "float32"), with_gradients=False)


@pytest.mark.parametrize("step", FORWARD_STEPS)
@pytest.mark.parametrize("name", FEW)
def test_each_step_matches_reference_in_bfloat16(step, name):
    assert_within_tolerance(step, draw(CASES[name], "bfloat16"), with_gradients=False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.sampled(2)
def test_gradients_match_reference(dtype, name):
    assert_within_tolerance("backward", draw(CASES[name], dtype), with_gradients=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.sampled(16)
def test_gradients_of_the_forward_pass_match_reference(dtype, name):
    assert_within_tolerance("three_products", draw(CASES[name], dtype), with_gradients=True)


@pytest.mark.parametrize("step", WITH_GRADIENTS)
def test_gradients_with_a_common_cotangent_match_reference(step):
    inputs, targets, dout = draw(CASES[FEW[0]], "float32")
    common_dout = jnp.where(targets >= 0, 0.25, dout)  # those of rows that take no part do not matter
    assert_within_tolerance(step, (inputs, targets, common_dout), with_gradients=True)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("step", tutorial.STEPS)
def test_default_tiles_match_reference(step, dtype):
    arguments = draw(row(600, 1100, M=64, absent="some"), dtype)
    assert_within_tolerance(step, arguments, with_gradients=step in WITH_GRADIENTS, small_tiles=False)


@pytest.mark.parametrize("step", tutorial.STEPS)
def test_rows_that_take_no_part_do_not_affect_results(step):
    """Some share a tile with rows that do; others fill a tile."""
    inputs, targets, dout = draw(CASES[FEW[0]], "float32")
    run, absent = program(step, step in WITH_GRADIENTS, True), targets < 0
    clean = run(inputs, targets, dout)
    for fill in (np.nan, np.inf):
        filled = inputs | {"h": jnp.where(absent[:, None], fill, inputs["h"])}
        tolerance.assert_bit_equal(clean, run(filled, targets, jnp.where(absent, fill, dout)))


@pytest.mark.parametrize("step", WITH_GRADIENTS)
def test_gradients_of_very_negative_logits_are_finite(step):
    """Past the vocabulary a tile holds no logit: neither 0 nor what exp(0 - m) would be."""
    _, targets, dout = draw(CASES[FEW[0]], "float32")
    h, w = np.full((129, 24), 8), -2 - np.arange(127 * 24).reshape(127, 24) % 7 / 256  # whose products are exact
    arguments = {"h": jnp.float32(h), "w": jnp.float32(w)}, targets, dout
    assert_within_tolerance(step, arguments, with_gradients=True)


def test_tiles_without_targets_are_not_active():
    targets = jnp.full((100, 1), -1).at[jnp.array([0, 31, 96])].set(0)
    np.testing.assert_array_equal(common.active_tiles(targets, 32), [1, 0, 0, 1])


def test_logsumexp_in_two_parts_keeps_the_sum_of_the_weights():
    """One number for the logsumexp would scale all weights of a row by its rounding."""
    inputs, targets, _ = draw(row(64, 96), "float32")
    # Few digits, so that the products are exact: a CPU may sum tiles of other sizes in another order.
    h, w = jnp.round(100 * inputs["h"]), jnp.round(256 * inputs["w"]) / 256
    stats = step3_tile_skipping.row_stats(h, w, targets[:, None], common.Tiles(32, 48))
    s = common.dot(h, w, common.NT)
    sums = lambda p: np.abs(np.sum(np.float64(p), axis=1) - 1).max()
    in_two_parts = sums(jnp.exp(s - stats.row_max) / stats.total)
    in_one = sums(jnp.exp(s - (stats.row_max + jnp.log(stats.total))))
    assert in_two_parts < 1e-6 < 5e-6 < in_one


def test_common_cotangent_scales_and_another_one_computes_again(monkeypatch):
    """Step 5 has the branch of step 4's kernel for dw, and takes it only for cotangents that differ."""
    inputs, targets, dout = draw(CASES["7 of 33"], "float32")
    step5, tiles = step5_three_products, common.Tiles(32, 48)
    dh, dw = 2 * inputs["h"], 3 * inputs["w"]
    targets = targets.at[2].set(-1)
    residuals = (inputs["h"], inputs["w"], targets[:, None], dout, dout), dh, dw
    monkeypatch.setattr(step5, "gradient", lambda of, tiles, residuals, dloss: jnp.full_like(residuals[1], 7))
    for dloss, expected_dw in ((jnp.full(7, 0.5), 0.5 * dw), (dout, jnp.full_like(dw, 7))):
        result = step5.backward(tiles, residuals, dloss)
        np.testing.assert_array_equal(result[0], dh * dloss.at[2].set(0)[:, None])
        np.testing.assert_array_equal(result[1], expected_dw)


H, W, TARGETS = jnp.ones((4, 8)), jnp.ones((5, 8)), jnp.int32([0, 1, -1, 4])
WRONG = {
    "h has shape (4,)": {"h": H[:, 0]},
    "w has shape (5, 7)": {"w": W[:, :7]},
    "w has dtype bfloat16": {"w": W.astype(jnp.bfloat16)},
    "h has dtype int32": {"h": H.astype(jnp.int32), "w": W.astype(jnp.int32)},
    "targets has shape (3,)": {"targets": TARGETS[:3]},
    "targets has dtype float32": {"targets": jnp.float32(TARGETS)},
    "n_tile is 7; allowed: a multiple of 16": {"n_tile": 7},
    "v_tile is 24; allowed: a multiple of 16": {"v_tile": 24},
}


@pytest.mark.parametrize("step", tutorial.STEPS)
def test_invalid_argument_raises_with_its_name(step):
    run = tutorial.load_step(step)
    for message, bad in WRONG.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            run(**({"h": H, "w": W, "targets": TARGETS} | bad))
    for name, value in {"softcap": 3.0, "z_loss": 0.1}.items():
        with pytest.raises(NotImplementedError, match=f"no {name}"):
            run(H, W, TARGETS, **{name: value})
    with target_device("cuda", "NVIDIA H100"), pytest.raises(NotImplementedError, match="this device is a gpu"):
        run(H, W, TARGETS)
    with jax.enable_x64(True), pytest.raises(NotImplementedError, match="float64 is not supported"):
        run(jnp.float64(H), jnp.float64(W), TARGETS)


@pytest.mark.parametrize("step", tutorial.STEPS)
@pytest.mark.sampled(2)
def test_empty_inputs_give_the_losses_of_the_reference(step):
    run = tutorial.load_step(step)
    assert run(H[:0], W, TARGETS[:0]).shape == (0,)
    np.testing.assert_array_equal(run(H, W[:0], TARGETS), np.zeros(4))
    np.testing.assert_allclose(run(H[:, :0], W[:, :0], TARGETS, softcap=None, z_loss=0.0), np.log(5) * (TARGETS >= 0))


@pytest.mark.parametrize("step", tutorial.STEPS)
def test_steps_are_short_and_docstrings_have_six_parts(step):
    text = next(FOLDER.glob(f"step?_{step}.py")).read_text()
    assert len(text.splitlines()) < 120
    parts = re.findall(r"^(Math|Tiling|State|Traffic|Limits|Source) {2,}\S", text, re.M)
    assert parts == ["Math", "Tiling", "State", "Traffic", "Limits", "Source"]
    assert ("▞" in text or "█" in text) and "grid (" in text and ("░" in text) == (step not in FORWARD_STEPS[:2])


def test_readme_covers_every_step_in_order():
    guide = (FOLDER / "README.md").read_text()
    positions = [guide.index(f"## {number}. `step{number}_{step}.py`") for number, step in enumerate(tutorial.STEPS, 1)]
    assert positions == sorted(positions)
