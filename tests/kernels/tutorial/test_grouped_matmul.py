"""The steps of kernels/tutorial/grouped_matmul: accuracy of the forward pass, documentation, and error messages."""

import functools
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench.verification.fast_compile import jit_fast_compile
from dantinox import reference
from dantinox.kernels import workloads
from dantinox.kernels.dispatch import target_device
from dantinox.kernels.tutorial import grouped_matmul as tutorial
from dantinox.kernels.tutorial.grouped_matmul import common, step3_group_metadata, step4_masked_edges
from tests.helpers import cases, tolerance

FOLDER = Path(common.__file__).parent
TILED_STEPS = tutorial.STEPS[1:]


def row(*sizes: int, N: int = 0, M: int = 24, F: int = 40) -> workloads.GroupedMatmul:
    return cases.make_workload(workloads.GroupedMatmul, N=N or sum(sizes), M=M, F=F, E=len(sizes), sizes=sizes)


CASES = {
    "1": row(0, 1),
    "7, one group": row(7, M=5, F=3),
    "127": row(60, 67),
    "129, all to the first": row(129, 0, 0, 0),
    "129, all to the last": row(0, 0, 0, 129),
    "129, empty groups": row(0, 33, 0, 96),
    "129, unassigned rows": row(31, 0, 33, 1, N=129),
    "129, all unassigned": row(0, 0, 0, 0, N=129),
    "129, edges at edges of tiles": row(32, 64, 32, 0, N=129),
    "129, four groups in a tile": row(2, 9, 1, 13, N=129),
}
FEW = ("129, empty groups", "129, unassigned rows")  # also in bfloat16, and with a second weight
LONG = row(300, 0, 257, 1, 129, 63, N=800, M=64, F=128)


@functools.cache
def forward(step: str, two_weights: bool = False, row_tile: int | None = 32) -> Any:
    run, options = tutorial.load_step(step), {}
    if step in TILED_STEPS and row_tile is not None:
        options["row_tile"] = row_tile

    def product(inputs: dict[str, jax.Array], aux: dict[str, jax.Array]) -> dict[str, jax.Array]:
        assert two_weights == ("w_up" in inputs)
        return {"o": run(**inputs, **aux, **options)}

    return jit_fast_compile(product)


@jit_fast_compile
def swiglu_reference(x: jax.Array, w: jax.Array, group_sizes: jax.Array, w_up: jax.Array | None = None) -> jax.Array:
    gate = reference.grouped_matmul(x, w, group_sizes)
    return gate if w_up is None else jax.nn.silu(gate) * reference.grouped_matmul(x, w_up, group_sizes)


@functools.cache
def exact(case: workloads.GroupedMatmul, dtype: str, two_weights: bool, wide: bool) -> dict[str, np.ndarray]:
    """The reference in the dtype or, with `wide`, in float64 on the same rounded arguments."""
    inputs, aux = draw(case, dtype, two_weights)
    with jax.enable_x64(wide):
        inputs = {name: jnp.asarray(tolerance.to_float64(x)) for name, x in inputs.items()} if wide else inputs
        return {"o": np.asarray(swiglu_reference(**inputs, **aux))}


def draw(case: workloads.GroupedMatmul, dtype: str, two_weights: bool = False) -> Any:
    inputs, aux, _ = cases.draw(case)
    if two_weights:
        inputs["w_up"] = cases.draw(case, seed=1)[0]["w"]
    return {name: jnp.asarray(x, dtype) for name, x in inputs.items()}, aux


def assert_within_tolerance(
    step: str, case: workloads.GroupedMatmul, dtype: str, two_weights: bool = False, row_tile: int | None = 32
) -> None:
    result = forward(step, two_weights, row_tile)(*draw(case, dtype, two_weights))
    assert result["o"].dtype == dtype and result["o"].shape == case.out_shape()
    expected = [exact(case, dtype, two_weights, wide) for wide in (False, True)]
    tolerance.assert_within_bound(result, *expected, dtype)
    assert not np.any(tolerance.to_float64(result["o"])[sum(case.sizes) :]), "rows past the sum of the sizes"


@pytest.mark.parametrize("step", tutorial.STEPS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.sampled(20)
def test_each_step_matches_reference(step, name):
    assert_within_tolerance(step, CASES[name], "float32")


@pytest.mark.parametrize("step", tutorial.STEPS)
@pytest.mark.parametrize("name", FEW)
@pytest.mark.sampled(4)
def test_each_step_matches_reference_in_bfloat16(step, name):
    assert_within_tolerance(step, CASES[name], "bfloat16")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FEW)
@pytest.mark.sampled(2)
def test_step_with_two_weights_matches_reference(name, dtype):
    assert_within_tolerance("swiglu", CASES[name], dtype, two_weights=True)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("step", tutorial.STEPS)
def test_default_row_tile_matches_reference(step, dtype):
    assert_within_tolerance(step, LONG, dtype, two_weights=step == "swiglu", row_tile=None)


@pytest.mark.parametrize("step", tutorial.STEPS)
@pytest.mark.sampled(2)
def test_unassigned_rows_and_weights_of_empty_groups_do_not_affect_output(step):
    case, two_weights = CASES["129, unassigned rows"], step == "swiglu"
    run, (inputs, aux) = forward(step, two_weights), draw(case, "float32", two_weights)
    clean = run(inputs, aux)
    for fill in (np.nan, np.inf):
        filled = {name: x.at[1].set(fill) for name, x in inputs.items() if name != "x"}
        filled["x"] = inputs["x"].at[65:].set(fill)
        tolerance.assert_bit_equal(clean, run(filled, aux))


@pytest.mark.parametrize("step", tutorial.STEPS)
@pytest.mark.sampled(4)
def test_rows_of_other_groups_may_be_nan(step):
    """A row that is NaN makes no other row of its tile NaN."""
    case = CASES["129, unassigned rows"]
    run, (inputs, aux) = forward(step), draw(case, "float32")
    clean = np.asarray(run(inputs, aux)["o"])
    filled = np.asarray(run(inputs | {"x": inputs["x"].at[30].set(np.nan)}, aux)["o"])
    assert np.isnan(filled[30]).all()
    np.testing.assert_array_equal(np.delete(filled, 30, axis=0), np.delete(clean, 30, axis=0))


@pytest.mark.parametrize("step", tutorial.STEPS)
@pytest.mark.sampled(2)
def test_two_runs_are_bit_equal(step):
    arguments = draw(CASES["129, unassigned rows"], "float32")
    tolerance.assert_bit_equal(forward(step)(*arguments), forward(step)(*arguments))


SIZES = [[0, 0, 0], [129, 0, 0], [0, 0, 129], [32, 32, 65], [1, 0, 2], [31, 2, 96], [16, 0, 16], [64, 64, 0]]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_tasks_cover_each_row_once(sizes):
    N, tile, E = 129, 32, len(sizes)
    count, tasks = step4_masked_edges.list_tasks(jnp.int32(sizes), N, tile)
    assert int(count) <= tasks.group.size
    group, tiles, start, end = (np.asarray(table)[: int(count)] for table in tasks)
    owner = np.full(-(-N // tile) * tile, -1)
    for g, i, first, stop in zip(group, tiles, start, end, strict=True):
        n = np.arange(i * tile, (i + 1) * tile)
        rows = n[(first <= n) & (n < stop)]
        assert rows.size and (owner[rows] == -1).all(), "a task has rows, and shares them with no other task"
        owner[rows] = g
    np.testing.assert_array_equal(owner[:N], np.repeat([*range(E), E], [*sizes, N - sum(sizes)]))
    assert (np.diff(tiles) >= 0).all() and (np.diff(group) >= 0).all(), "tiles and weights are visited once each"


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_padded_layout_has_one_group_per_tile(sizes):
    N, tile = 129, 32
    layout = step3_group_metadata.pad_groups(jnp.int32(sizes), N, tile)
    assert int(layout.count) == sum(-(-size // tile) for size in sizes) <= layout.group.size
    assigned = np.arange(sum(sizes))
    place, group = np.asarray(layout.place)[assigned], np.repeat(range(len(sizes)), sizes)
    np.testing.assert_array_equal(np.asarray(layout.source)[place], assigned)
    np.testing.assert_array_equal(np.asarray(layout.group)[place // tile], group)
    assert (place < int(layout.count) * tile).all() if place.size else True


X, W, GROUP_SIZES = jnp.ones((4, 8)), jnp.ones((2, 8, 5)), jnp.int32([1, 2])
WRONG = {
    "x has shape (4,)": {"x": X[:, 0]},
    "w has shape (2, 7, 5)": {"w": W[:, :7]},
    "w has dtype bfloat16": {"w": W.astype(jnp.bfloat16)},
    "x has dtype int32": {"x": X.astype(jnp.int32), "w": W.astype(jnp.int32)},
    "group_sizes has shape (3,)": {"group_sizes": jnp.int32([1, 1, 1])},
    "group_sizes has dtype float32": {"group_sizes": jnp.float32([1, 2])},
}


@pytest.mark.parametrize("step", tutorial.STEPS)
@pytest.mark.sampled(4)
def test_invalid_argument_raises_with_its_name(step):
    run = tutorial.load_step(step)
    for message, bad in WRONG.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            run(**({"x": X, "w": W, "group_sizes": GROUP_SIZES} | bad))
    if step == "swiglu":
        for bad in (W[:1], W.astype(jnp.bfloat16)):
            with pytest.raises(ValueError, match="w_up has"):
                run(X, W, GROUP_SIZES, w_up=bad)
    else:
        with pytest.raises(NotImplementedError, match="no w_up"):
            run(X, W, GROUP_SIZES, w_up=W)
    if step in TILED_STEPS:
        with pytest.raises(ValueError, match="row_tile is 7; allowed: a multiple of 16"):
            run(X, W, GROUP_SIZES, row_tile=7)
    with target_device("cuda", "NVIDIA H100"), pytest.raises(NotImplementedError, match="this device is a gpu"):
        run(X, W, GROUP_SIZES)
    with jax.enable_x64(True), pytest.raises(NotImplementedError, match="float64 is not supported"):
        run(jnp.float64(X), jnp.float64(W), GROUP_SIZES)


@pytest.mark.parametrize("step", tutorial.STEPS)
def test_empty_inputs_give_zeros(step):
    run = tutorial.load_step(step)
    for x, w, sizes in ((X[:0], W, [0, 0]), (X, W[:0], []), (X[:, :0], W[:, :0], [1, 2])):
        np.testing.assert_array_equal(run(x, w, jnp.int32(sizes)), jnp.zeros((x.shape[0], 5)))


@pytest.mark.parametrize("step", tutorial.STEPS)
def test_steps_are_short_and_docstrings_have_six_parts(step):
    text = next(FOLDER.glob(f"step?_{step}.py")).read_text()
    assert len(text.splitlines()) < 120
    parts = re.findall(r"^(Math|Tiling|State|Traffic|Limits|Source) {2,}\S", text, re.M)
    assert parts == ["Math", "Tiling", "State", "Traffic", "Limits", "Source"]
    assert ("▞" in text or "·" in text) and "grid (" in text


def test_readme_covers_every_step_in_order():
    guide = (FOLDER / "README.md").read_text()
    positions = [guide.index(f"## {number}. `step{number}_{step}.py`") for number, step in enumerate(tutorial.STEPS, 1)]
    assert positions == sorted(positions)
