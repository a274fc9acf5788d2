"""Gradients of Hopper attention, interpreted on the CPU: values, races, and which blocks are visited."""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from bench.verification import race_detector
from bench.verification.fast_compile import FAST_COMPILE_OPTIONS, jit_fast_compile
from dantinox import kernels
from dantinox.kernels import workloads
from dantinox.kernels.ops.attention.pallas_sm90 import bwd, common
from dantinox.kernels.ops.attention.pallas_sm90.common import Sm90AttentionConfig
from tests.helpers import tolerance

PROFILE = Path(__file__).parents[3] / "profiles/aot/h100.json"
CHECKED = plgpu.InterpretGPUParams(detect_races=True)


class Case(NamedTuple):
    """Sizes and options of one comparison."""

    T: int
    S: int
    D: int = 64
    G: int = 1
    K: int = 1
    B: int = 1
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    segments: str | None = None  # "ascending", or in "any" order
    dtype: str = "bfloat16"
    spread: float = 1.0  # of the queries: large ones make scores far below zero

    def __str__(self) -> str:
        default = self._field_defaults
        return " ".join(f"{name}={value}" for name, value in self._asdict().items() if value != default.get(name))


def arrays(case: Case, seed: int = 0) -> tuple[dict[str, jax.Array], jax.Array, Any]:
    """Returns (q, k and v by name; do; segment ids), in the dtype of the case."""
    rng, (T, S, D, G, K, B, *_) = np.random.default_rng(seed), case
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), case.dtype)
    inputs = {"q": draw(B, T, G * K, D) * case.spread, "k": draw(B, S, K, D), "v": draw(B, S, K, D)}
    ids = None
    if case.segments:
        ordered = np.sort if case.segments == "ascending" else np.asarray
        ids = tuple(jnp.asarray(ordered(rng.integers(0, 4, (B, n))), jnp.int32) for n in (T, S))
    return inputs, draw(B, T, G * K, D), ids


def options(case: Case) -> dict[str, Any]:
    return {"causal": case.causal, "window": case.window, "softcap": case.softcap}


def residuals(case: Case, inputs: dict[str, jax.Array], do: jax.Array, ids: Any) -> tuple[jax.Array, jax.Array]:
    """Returns (lse to the base 2, delta) in float32, from plain jnp."""
    wide = {name: x.astype(jnp.float32) for name, x in inputs.items()}
    B, T, H, D = wide["q"].shape
    q = wide["q"].reshape(B, T, case.K, case.G, D)
    s = jnp.einsum("BTKGD,BSKD->BKGTS", q, wide["k"]).reshape(B, H, T, case.S) * D**-0.5
    if case.softcap is not None:
        s = case.softcap * jnp.tanh(s / case.softcap)
    distance = jnp.arange(T)[:, None] + case.S - T - jnp.arange(case.S)
    seen = jnp.ones((B, T, case.S), bool)
    if case.causal:
        seen &= distance >= 0
    if case.window is not None:
        seen &= distance < case.window
    if ids is not None:
        seen &= ids[0][:, :, None] == ids[1][:, None]
    lse = jax.nn.logsumexp(jnp.where(seen[:, None], s, -jnp.inf), axis=-1) / np.log(2)
    o = kernels.attention(**wide, **options(case), segment_ids=ids, implementation="reference")
    delta = jnp.einsum("BTHD,BTHD->BHT", o, do.astype(jnp.float32))
    return jnp.where(jnp.isfinite(lse), lse, jnp.inf), delta


def kernel_config(case: Case, params: Any = CHECKED) -> Sm90AttentionConfig:
    return Sm90AttentionConfig(case.T, case.S, case.G, case.causal, case.window, case.D**-0.5, case.softcap, params)


def gradients(case: Case, inputs: dict[str, jax.Array], do: jax.Array, ids: Any) -> dict[str, Any]:
    """Runs the two backward kernels; fails if they race."""
    lse, delta = jit_fast_compile(functools.partial(residuals, case))(inputs, do, ids)
    run = jax.jit(
        lambda *args: bwd.backward(*args, kernel_config(case)), compiler_options=FAST_COMPILE_OPTIONS
    )  # a function of its own, so that no program of another run is taken from a cache
    with race_detector.collect_detectors(race_detector.gpu_interpreter, "GPURaceDetectionState") as detectors:
        try:
            grads = jax.block_until_ready(run(*inputs.values(), do, lse, delta, ids))
        finally:
            race_detector.gpu_interpreter.reset_gpu_interpret_mode_state()
    assert len(detectors) == 2 and not any(detector.races_found for detector in detectors)
    return dict(zip(("dq", "dk", "dv"), grads))


def expected(case: Case, inputs: dict[str, jax.Array], do: jax.Array, ids: Any) -> dict[str, Any]:
    aux = {} if ids is None else {"segment_ids": ids}
    outputs = tolerance.program("attention", "reference", tuple(options(case).items()))(inputs, aux, do)
    return {name: outputs[name] for name in ("dq", "dk", "dv")}


def assert_gradients_match_reference(case: Case) -> dict[str, Any]:
    inputs, do, ids = arrays(case)
    grads, plain = gradients(case, inputs, do, ids), expected(case, inputs, do, ids)
    with jax.enable_x64(True):
        exact = {name: jnp.asarray(tolerance.to_float64(x)) for name, x in inputs.items()}
        oracle = expected(case, exact, jnp.asarray(tolerance.to_float64(do)), ids)
    for name, x in grads.items():
        assert x.dtype == plain[name].dtype and x.shape == plain[name].shape, name
    tolerance.assert_within_bound(grads, plain, oracle, case.dtype)
    return grads


FAST = {
    "queries without keys": Case(200, 70, G=2),  # the first 128 queries see no key
    "window": Case(129, 129, G=2, window=70),
    "window, softcap": Case(65, 200, D=128, window=64, softcap=5.0),
    "narrow swizzle": Case(65, 129, D=80, window=64),
    "segments": Case(64, 127, D=256, segments="ascending"),  # no mask in the first block, but other segments
    "full, large scores": Case(64, 129, D=256, causal=False, dtype="float16", spread=30.0),
}
LONG = [
    *(Case(T, S, D=64, window=w, dtype="float16") for T in (1, 64, 65) for S in (1, 127, 200) for w in (None, 1, 66)),
    *(Case(130, 130, D=D, G=3, K=2, B=2, window=66) for D in (64, 128, 256)),
    *(Case(129, 200, D=D, G=2, window=66) for D in (16, 32, 48, 80, 96, 112, 160, 192, 224)),
    *(Case(200, 200, D=D, G=2, window=w) for D in (64, 128, 256) for w in (None, 1, 65, 200, 999)),
    *(Case(T, S, D=D, causal=False) for D in (64, 128, 256) for T, S in ((129, 65), (65, 129), (8, 200))),
    *(Case(129, 129, D=D, softcap=c, window=w) for D in (64, 128, 256) for c, w in ((2.0, None), (30.0, 65))),
    *(Case(200, 200, D=D, B=2, segments="any") for D in (64, 128, 256)),
    *(Case(T, S, D=D, segments="ascending") for D in (64, 128, 256) for T, S in ((65, 127), (129, 64))),
    *(Case(500, 500, D=D, segments="ascending", causal=c) for D in (64, 128, 256) for c in (True, False)),
    *(Case(300, 300, D=D, segments="ascending", softcap=20.0, window=100) for D in (64, 128, 256)),
    *(Case(200, 129, D=D, spread=30.0, causal=c) for D in (64, 128, 256) for c in (True, False)),
]


@pytest.mark.parametrize(
    "case",
    [
        *(pytest.param(case, id=name) for name, case in FAST.items()),
        *(pytest.param(case, id=str(case), marks=pytest.mark.slow) for case in LONG),
    ],
)
@pytest.mark.sampled(5)
def test_gradients_match_reference_in_interpret_mode(case: Case):
    assert_gradients_match_reference(case)


@pytest.mark.slow
@pytest.mark.parametrize("D", [64, 128, 256], ids="D={}".format)
def test_unattended_keys_and_queries_without_keys_get_zero_gradients(D):
    """Keys before every window, queries before every key, and both where the other side has none of their segment."""
    inputs, do, _ = arrays(case := Case(64, 200, D=D, window=8))
    grads = gradients(case, inputs, do, None)
    for name in ("dk", "dv"):
        assert not np.any(grads[name][:, : 200 - 64 - 7]) and np.any(grads[name][:, 200 - 64 - 7])
    inputs, do, _ = arrays(case := Case(200, 64, D=D))
    assert not np.any(gradients(case, inputs, do, None)["dq"][:, : 200 - 64])
    inputs, do, _ = arrays(case := Case(300, 300, D=D, causal=False))
    ids = tuple(jnp.asarray(np.where(np.arange(300) < 130, alone, 1), jnp.int32)[None] for alone in (0, 2))
    for name, grad in gradients(case, inputs, do, ids).items():
        assert not np.any(grad[:, :130]) and np.all(np.any(grad[:, 130:], axis=(2, 3))), name


@pytest.mark.slow
@pytest.mark.parametrize("D", [64, 128, 256], ids="D={}".format)
def test_two_runs_are_bit_equal(D):
    case = Case(200, 200, D=D, G=2, window=90)
    inputs, do, _ = arrays(case)
    tolerance.assert_bit_equal(*(gradients(case, inputs, do, None) for _ in range(2)))


@pytest.mark.parametrize(
    "T, S, causal, window",
    [(300, 300, True, 66), (300, 300, True, None), (200, 500, True, 33)],
    ids=["window", "causal", "window, fewer queries"],
)
@pytest.mark.parametrize("tile", [64, 128], ids=["tile=64", "tile=128"])
def test_blocks_outside_the_visible_range_are_not_visited(T, S, causal, window, tile):
    """Compares the first block and the number of blocks with the mask itself."""
    config = Sm90AttentionConfig(T, S, 1, causal, window, 1.0, None)
    distance = np.arange(T)[:, None] + S - T - np.arange(S)
    mask = (distance >= 0) & (distance < (window or S + T))
    for first in range(0, T, common.BLOCK_ROWS):
        low, n = common.visible_kv_blocks(jnp.int32(first), config, tile)
        touched = np.unique(np.nonzero(mask[first : first + common.BLOCK_ROWS])[1] // tile)
        assert [*range(int(low), int(low + n))] == [*touched]
    for own in (64, 128):
        for first in range(0, S, own):
            low, n = common.visible_q_blocks(jnp.int32(first), own, config, tile)
            touched = np.unique(np.nonzero(mask[:, first : first + own])[0] // tile)
            assert [*range(int(low), int(low + n))] == [*touched]


@pytest.mark.slow
def test_work_is_linear_in_length_under_a_window():
    """Counts the wgmmas of the simulated device, with a window, at S and at 2 S."""
    products = []
    for S in (512, 1024):
        inputs, do, _ = arrays(case := Case(S, S, window=64))
        with mock.patch.object(gpu_callbacks, "wgmma", wraps=gpu_callbacks.wgmma) as ran:
            gradients(case, inputs, do, None)
        products.append(ran.call_count)
    assert 1.8 < products[1] / products[0] < 2.2, products


@pytest.mark.slow
@pytest.mark.parametrize("D", [64, 256], ids="D={}".format)
def test_blocks_of_other_segments_are_not_multiplied(D):
    """Counts the wgmmas of the simulated device for one document, and for four of the same length."""
    products = []
    for documents in (1, 4):
        inputs, do, _ = arrays(case := Case(256 * documents, 256 * documents, D=D, segments="ascending"))
        ids = jnp.repeat(jnp.arange(documents, dtype=jnp.int32), 256)[None]
        with mock.patch.object(gpu_callbacks, "wgmma", wraps=gpu_callbacks.wgmma) as ran:
            gradients(case, inputs, do, (ids, ids))
        products.append(ran.call_count)
    assert products[1] == 4 * products[0], products


def compiled() -> dict[workloads.Attention, dict[str, Any]]:
    """Returns the kernels of both directions in bfloat16, by name, as compiled for sm_90a in the committed profile."""
    rows = json.loads(PROFILE.read_text())["rows"]
    name = lambda kernel: kernel["name"].removeprefix("attention_").removesuffix("_mosaic_gpu_kernel")
    return {
        row: {name(kernel): kernel for kernel in rows[f"attention / {row.name} / pallas / bfloat16 / both"]["kernels"]}
        for row in workloads.select("attention", "aot", "h100")
    }


def test_compiled_kernels_use_wgmma_without_spills():
    for row, kernels_of_row in compiled().items():
        assert kernels_of_row.keys() == {"forward", "dq", "dkv"}, row.name
        for kernel in kernels_of_row.values():
            assert kernel["spill_bytes"] == kernel["local"] == kernel["mma"] == 0 < kernel["wgmma"], (row.name, kernel)


def test_compiled_interior_blocks_have_no_mask_overhead():
    """Compares the instructions of the causal loops with those of the same head dim without window or segments."""
    by_row = compiled()
    for name in ("dq", "dkv"):
        plain = {row.D: loops[name]["steady"] for row, loops in by_row.items() if row.name == f"aot d{row.D} causal"}
        assert plain.keys() == {64, 128, 256}
        for row, loops in by_row.items():
            if row.causal and row.softcap is None:
                count, best = loops[name]["steady"]["instructions"], plain[row.D]["instructions"]
                assert count <= 1.05 * best, f"{row.name}: {name} issues {count} per block, {best} without a mask"
