"""The attention tutorial: accuracy of outputs and gradients, documentation, and error messages."""

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
from dantinox.kernels.tutorial import attention
from dantinox.kernels.tutorial.attention import common, step4_tile_skipping, step7_backward
from tests.helpers import cases, tolerance

FOLDER = Path(common.__file__).parent
TILES = {"q_tile": 32, "k_tile": 48}  # several tiles, partial ones too, at sizes that a test can afford
SMALL_TILES = {
    "tiled": {"q_tile": 32},
    "online_softmax": TILES,
    "tile_skipping": TILES,
    "packed_gqa_gate": {"rows": 64, "k_tile": 48},
    "log_sum_exp": {"rows": 64, "k_tile": 48},
    "backward": {"rows": 64, "k_tile": 48},
    "phases": {"rows": 64, "k_tile": 48},
}
WITH_GATE = ("packed_gqa_gate", "log_sum_exp", "backward", "phases")
WITH_GRADIENTS = ("log_sum_exp", "backward", "phases")
# Step 7 has the forward pass of step 6, which has the kernel of step 5; the tests of gradients check its output.
FORWARD_STEPS = [
    pytest.param(step, marks=pytest.mark.slow if step == "log_sum_exp" else ())
    for step in attention.STEPS
    if step != "backward"
]


row = cases.attention


CASES = {
    "1": row(1, 1),
    "7, two sequences": row(7, 7, B=2, D=5),
    "127, grouped, window": row(127, 127, H=4, K=2, window=16),
    "129, multi-query": row(129, 129, H=4, K=1, D=64, scale=0.5),
    "7 of 129": row(7, 129, H=4),
    "7 of 129, full": row(7, 129, causal=False),
    "129 on 7, window": row(129, 7, window=3),
    "window of one": row(127, 127, H=1, K=1, window=1),
    "window past S": row(33, 33, H=1, K=1, window=1000),
}
GATED = {"one per head": row(65, 65, H=4, K=2, gate="head"), "elementwise": row(65, 65, H=3, K=1, gate="elementwise")}
FEW = ("127, grouped, window", "7 of 129")  # also in bfloat16
LONG = ("7 of 129", "window past S", "7, two sequences", "window of one")  # slow in float32
RULE_CASES = [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in CASES]


@functools.cache
def forward(step: str, case: workloads.Attention, tiles: bool = True) -> Any:
    run, options = attention.load_step(step), {"causal": case.causal, "window": case.window, "scale": case.scale}
    options |= SMALL_TILES.get(step, {}) if tiles else {}
    return jit_fast_compile(lambda inputs: {"o": run(**inputs, **options)})


@functools.cache
def exact(case: workloads.Attention, dtype: str, wide: bool) -> dict[str, np.ndarray]:
    """The reference in the dtype or, with `wide`, in float64 on the same rounded arguments."""
    inputs = {name: jnp.asarray(x, dtype) for name, x in cases.draw(case)[0].items()}
    with jax.enable_x64(wide):
        inputs = {name: jnp.asarray(tolerance.to_float64(x)) for name, x in inputs.items()} if wide else inputs
        return {"o": np.asarray(jax.jit(lambda x: reference.attention(**x, **case.options()))(inputs))}


def assert_within_tolerance(step: str, case: workloads.Attention, dtype: str, tiles: bool = True) -> jax.Array:
    inputs = {name: jnp.asarray(x, dtype) for name, x in cases.draw(case)[0].items()}
    result = forward(step, case, tiles)(inputs)
    assert result["o"].dtype == dtype and result["o"].shape == case.out_shape()
    tolerance.assert_within_bound(result, exact(case, dtype, False), exact(case, dtype, True), dtype)
    return result["o"]


@pytest.mark.parametrize("step", FORWARD_STEPS)
@pytest.mark.parametrize("name", RULE_CASES)
@pytest.mark.sampled(96)
def test_each_step_matches_reference(step, name):
    case = CASES[name]
    o = assert_within_tolerance(step, case, "float32")
    if case.T > case.S:
        assert not np.any(o[:, : case.T - case.S]), "a query that sees no key"


@pytest.mark.parametrize("step", FORWARD_STEPS)
@pytest.mark.parametrize("name", [FEW[0], pytest.param(FEW[1], marks=pytest.mark.slow)])
@pytest.mark.sampled(6)
def test_each_step_matches_reference_in_bfloat16(step, name):
    assert_within_tolerance(step, CASES[name], "bfloat16")


@pytest.mark.parametrize(("name", "dtype"), [("one per head", "float32"), ("elementwise", "bfloat16")])
@pytest.mark.parametrize("step", ["packed_gqa_gate", "phases"])
@pytest.mark.sampled(4)
def test_gated_step_matches_reference(step, name, dtype):
    assert_within_tolerance(step, GATED[name], dtype)


GRADIENT_CASES = {
    "1": row(1, 1),
    "7 of 129, full": row(7, 129, causal=False),
    "127, grouped, window": CASES["127, grouped, window"],
    "129 on 7, window": CASES["129 on 7, window"],
    "one gate per head": GATED["one per head"],
    "elementwise gate": GATED["elementwise"],
    "129, multi-query": CASES["129, multi-query"],
    "window of one": CASES["window of one"],
}
FAST_GRADIENTS = ("129 on 7, window", "one gate per head")


def gradients(run: Any, inputs: dict[str, Any], do: Any) -> dict[str, Any]:
    o, vjp = jax.vjp(run, inputs)
    return {"o": o} | {f"d{name}": x for name, x in vjp(jnp.asarray(do, o.dtype))[0].items()}


@functools.cache
def step_gradients(step: str, case: workloads.Attention) -> Any:
    run, options = attention.load_step(step), {"causal": case.causal, "window": case.window, "scale": case.scale}
    options |= SMALL_TILES[step]
    return jit_fast_compile(lambda inputs, do: gradients(lambda x: run(**x, **options), inputs, do))


@functools.cache
def exact_gradients(case: workloads.Attention, dtype: str, wide: bool) -> dict[str, np.ndarray]:
    inputs, do = drawn(case, dtype)
    with jax.enable_x64(wide):
        if wide:
            inputs, do = jax.tree.map(lambda x: jnp.asarray(tolerance.to_float64(x)), (inputs, do))
        run = lambda x: reference.attention(**x, **case.options())
        return jax.tree.map(np.asarray, jax.jit(lambda x, do: gradients(run, x, do))(inputs, do))


def drawn(case: workloads.Attention, dtype: str) -> tuple[dict[str, jax.Array], jax.Array]:
    inputs, _, do = cases.draw(case)
    return {name: jnp.asarray(x, dtype) for name, x in inputs.items()}, jnp.asarray(do, dtype)


@pytest.mark.parametrize("step", WITH_GRADIENTS)
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FAST_GRADIENTS else pytest.mark.slow) for n in GRADIENT_CASES]
)
@pytest.mark.sampled(12)
def test_gradients_match_reference(step, dtype, name):
    case = GRADIENT_CASES[name]
    result = step_gradients(step, case)(*drawn(case, dtype))
    for key, x in drawn(case, dtype)[0].items():
        assert result[f"d{key}"].shape == x.shape and result[f"d{key}"].dtype == dtype
    plain, exact = exact_gradients(case, dtype, False), exact_gradients(case, dtype, True)
    if dtype == "float32":
        # Gradients may have twice the error that the rule allows: lse is rounded once per row and sums once per small
        # tile, and step 6 recomputes s by another matmul. The worst case here has 1.43 times the rule's error.
        halved = {name: (np.float64(result[name]) + exact[name]) / 2 for name in result if name != "o"}
        result = result | halved
    tolerance.assert_within_bound(result, plain, exact, dtype)


@pytest.mark.parametrize("step", WITH_GRADIENTS)
@pytest.mark.sampled(4)
def test_masked_keys_do_not_affect_gradients(step):
    """No query sees the first 64 keys, and the last tile reaches past the last key; dk and dv are zeros there."""
    case = row(7, 100, window=30)
    inputs, do = drawn(case, "float32")
    run, clean = step_gradients(step, case), None
    for fill in (0, np.nan, np.inf, 0):
        result = run(inputs | {name: inputs[name].at[:, :64].set(fill) for name in "kv"}, do)
        clean = clean or result
        tolerance.assert_bit_equal(clean, result)
        assert not np.any(result["dk"][:, :64]) and not np.any(result["dv"][:, :64])


@pytest.mark.parametrize(("T", "S", "window"), [(1, 1, None), (50, 70, 5), (70, 20, 17), (20, 70, 3)])
def test_tiles_by_key_are_the_visible_tiles(T, S, window):
    mask = common.Mask(T, S, True, window)
    tiles = step7_backward.tiles_by_key(common.Problem(mask, 1.0, 16, 32)).T.tolist()
    visible = np.asarray(reference.visible(T, S, causal=True, window=window))
    k_tiles = [j for _, j, _ in tiles]
    assert k_tiles == sorted(k_tiles) and {*k_tiles} == {*range(-(-S // 32))}
    for j in {*k_tiles}:
        flags = [flag for _, b, flag in tiles if b == j]
        starts = [bool(flag & step4_tile_skipping.FIRST) for flag in flags]
        ends = [bool(flag & step4_tile_skipping.LAST) for flag in flags]
        assert starts == [True] + [False] * (len(flags) - 1) and ends == starts[::-1]
    listed = {(i, j) for i, j, _ in tiles}
    tile = lambda i, j: visible[16 * i : 16 * i + 16, 32 * j : 32 * j + 32]
    seen = {(i, j) for i in range(-(-T // 16)) for j in k_tiles if tile(i, j).any()}
    assert len(listed) == len(tiles) and seen <= listed


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("step", attention.STEPS)
def test_default_block_sizes_match_reference(step, dtype):
    assert_within_tolerance(step, row(600, 700, H=4, K=2, D=32, window=256), dtype, tiles=False)


@pytest.mark.parametrize("step", attention.STEPS)
@pytest.mark.sampled(16)
def test_masked_keys_do_not_affect_output(step):
    case = row(7, 100, window=30)  # no query sees the first 64 keys, and the last tile reaches past the last key
    inputs = {name: np.float32(x) for name, x in cases.draw(case)[0].items()}
    run, clean = forward(step, case), None
    for fill in (0, np.nan, np.inf, 0):
        for name in "kv":
            inputs[name][:, :64] = fill
        clean = clean or run(inputs)
        tolerance.assert_bit_equal(clean, run(inputs))


@pytest.mark.parametrize("window", [None, 1, 5, 16, 17, 40, 1000], ids="window={}".format)
@pytest.mark.parametrize(
    ("T", "S"),
    [pytest.param(T, S, id=f"T={T} S={S}") for T, S in ((1, 1), (50, 50), (20, 70), (70, 20), (33, 64))],
)
def test_visible_tiles_have_a_visible_pair(T, S, window):
    for causal in (True, False) if window is None else (True,):
        visible = np.asarray(reference.visible(T, S, causal=causal, window=window))
        tiles = step4_tile_skipping.visible_tiles(common.Mask(T, S, causal, window), 16, 32)
        listed = {(i, j): flag for i, j, flag in tiles.T.tolist()}
        assert len(listed) == tiles.shape[1]
        for i in range(-(-T // 16)):
            k_tiles = [j for a, j in listed if a == i]
            assert k_tiles == sorted(k_tiles) and k_tiles
            assert [j for j in k_tiles if listed[i, j] & step4_tile_skipping.FIRST] == k_tiles[:1]
            assert [j for j in k_tiles if listed[i, j] & step4_tile_skipping.LAST] == k_tiles[-1:]
            for j in range(-(-S // 32)):
                pairs = visible[i * 16 : (i + 1) * 16, j * 32 : (j + 1) * 32]
                assert ((i, j) in listed) == pairs.any() or not visible[i * 16 : (i + 1) * 16].any()
                if (i, j) in listed:
                    fully_visible = pairs.all() and pairs.shape[1] == 32
                    assert bool(listed[i, j] & step4_tile_skipping.MASKED) != fully_visible


Q, KV = jnp.ones((1, 4, 4, 8)), jnp.ones((1, 4, 2, 8))
WRONG = {
    "k has shape (1, 4, 2, 7)": {"k": KV[..., :7]},
    "v has dtype bfloat16": {"v": KV.astype(jnp.bfloat16)},
    "q has 4 heads and k has 3": {"k": jnp.ones((1, 4, 3, 8)), "v": jnp.ones((1, 4, 3, 8))},
    "window is 0": {"window": 0},
    "window is 2 with causal=False": {"window": 2, "causal": False},
    "scale is inf": {"scale": float("inf")},
}


@pytest.mark.parametrize("step", attention.STEPS)
def test_invalid_argument_raises_with_its_name(step):
    run = attention.load_step(step)
    for message, bad in WRONG.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            run(**({"q": Q, "k": KV, "v": KV} | bad))
    unsupported = {"softcap": 2.0, "segment_ids": jnp.zeros((1, 4), jnp.int32)}
    for name, value in (unsupported if step in WITH_GATE else unsupported | {"gate": Q}).items():
        with pytest.raises(NotImplementedError, match=f"no {name}"):
            run(Q, KV, KV, **{name: value})
    for name in SMALL_TILES.get(step, {}):
        with pytest.raises(ValueError, match=f"{name} is 7; allowed: a multiple of 16"):
            run(Q, KV, KV, **{name: 7})
    with target_device("cuda", "NVIDIA H100"), pytest.raises(NotImplementedError, match="this device is a gpu"):
        run(Q, KV, KV)
    nothing = KV[:, :0]
    np.testing.assert_array_equal(run(Q, nothing, nothing), jnp.zeros_like(Q))


@pytest.mark.parametrize("step", WITH_GATE)
def test_invalid_gate_raises_with_its_name(step):
    for bad in (Q[:, :, :1], Q[..., :2], Q.astype(jnp.float16)):
        with pytest.raises(ValueError, match="gate has"):
            attention.load_step(step)(Q, KV, KV, gate=bad)


@pytest.mark.parametrize("step", attention.STEPS)
def test_steps_are_short_and_docstrings_have_six_parts(step):
    text = next(FOLDER.glob(f"step?_{step}.py")).read_text()
    assert len(text.splitlines()) < 120
    parts = re.findall(r"^(Math|Tiling|State|Traffic|Limits|Source) {2,}\S", text, re.M)
    assert parts == ["Math", "Tiling", "State", "Traffic", "Limits", "Source"]
    skipping = ("tile_skipping", "packed_gqa_gate", "log_sum_exp", "backward")
    assert "keys ->" in text and ("░" in text) == (step in skipping)


def test_readme_covers_every_step_in_order():
    guide = (FOLDER / "README.md").read_text()
    positions = [
        guide.index(f"## {number}. `step{number}_{step}.py`") for number, step in enumerate(attention.STEPS, 1)
    ]
    assert positions == sorted(positions)
