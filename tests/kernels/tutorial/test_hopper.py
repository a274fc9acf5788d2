"""The steps of kernels/tutorial/hopper on a simulated GPU: accuracy, races, planted faults, documentation, messages."""

import collections
import functools
import itertools
import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from bench.aot.gpu import sass
from bench.tutorial import common as bench_common
from bench.tutorial import hopper as tutorial
from bench.verification import race_detector
from bench.verification.fast_compile import jit_fast_compile
from bench.verification.race_detector import gpu_interpreter
from dantinox import reference
from dantinox.kernels.dispatch import target_device
from dantinox.kernels.tutorial import hopper
from dantinox.kernels.tutorial.hopper import common, step4_persistent
from tests.helpers import tolerance

FOLDER = Path(common.__file__).parent
H100 = "NVIDIA H100 80GB HBM3"
OPTIONS = {"persistent": {"num_blocks": 1}}
slow = pytest.mark.slow
MOSTLY_SLOW = [pytest.param(step, marks=slow if step != "persistent" else ()) for step in hopper.STEPS]
SIZES = [  # N, M, F
    (129, 384, 320),  # a last tile of one row, of 64 columns, and more steps than stages
    (1, 64, 64),  # fewer steps than stages
    pytest.param(7, 128, 576, marks=slow),
    pytest.param(127, 256, 256, marks=slow),  # as many steps as stages
    pytest.param(64, 320, 512, marks=slow),  # no partial tile
    pytest.param(300, 64, 832, marks=slow),  # persistent: the ring goes around once in four tiles
    pytest.param(2100, 64, 320, marks=slow),  # two panels
]


def draw(N: int, M: int, F: int, dtype: str = "bfloat16") -> tuple[jax.Array, jax.Array]:
    x_key, w_key = jax.random.split(jax.random.key(N + M + F))
    return jax.random.normal(x_key, (N, M), dtype), jax.random.normal(w_key, (M, F), dtype) / M**0.5


def run(step: str) -> Callable[..., jax.Array]:
    return functools.partial(hopper.load_step(step), **OPTIONS.get(step, {}))


def product(x: jax.Array, w: jax.Array, wide: bool) -> np.ndarray:
    """The reference in the dtype or, with `wide`, in float64 on the same rounded arguments."""
    with jax.enable_x64(wide):
        x, w = (jnp.asarray(tolerance.to_float64(a)) if wide else a for a in (x, w))
        return np.asarray(reference.grouped_matmul(x, w[None], jnp.array([x.shape[0]])))


def assert_within_tolerance(y: jax.Array, x: jax.Array, w: jax.Array) -> None:
    assert y.dtype == x.dtype
    tolerance.assert_within_bound({"y": y}, {"y": product(x, w, False)}, {"y": product(x, w, True)}, str(x.dtype))


@pytest.mark.parametrize("step", hopper.STEPS)
@pytest.mark.parametrize(("N", "M", "F"), SIZES)
@pytest.mark.sampled(6)
def test_each_step_matches_reference(step, N, M, F):
    x, w = draw(N, M, F)
    assert_within_tolerance(jax.jit(run(step))(x, w), x, w)


@slow
@pytest.mark.parametrize("step", hopper.STEPS)
def test_each_step_matches_reference_in_float16(step):
    x, w = draw(129, 384, 320, "float16")
    assert_within_tolerance(jax.jit(run(step))(x, w), x, w)


def deferred_wgmma(monkeypatch: pytest.MonkeyPatch, in_flight: float) -> None:
    """Let the simulated GPU multiply as late as a `wgmma_wait(in_flight)` after each wgmma allows, checking for races.

    The simulator multiplies at once. Late products see what is loaded too early over their operands.
    """
    pending, wgmma, deref = (
        collections.defaultdict(list),
        gpu_interpreter.wgmma,
        gpu_interpreter.wgmma_accumulator_deref,
    )

    def finish(thread: Any, left: float) -> None:
        while len(pending[thread]) > left:
            race_detector._checked_wgmma(wgmma, **pending[thread].pop(0))

    def issue(**kwargs: Any) -> Any:
        race_detector._checked_wgmma(dict, **kwargs)  # its operands must have arrived by now
        pending[kwargs["thread"]].append(kwargs)
        finish(kwargs["thread"], in_flight)
        return kwargs["token"]

    def read(**kwargs: Any) -> Any:
        finish(kwargs["thread"], 0)
        return deref(**kwargs)

    monkeypatch.setattr(gpu_interpreter, "wgmma", issue)
    monkeypatch.setattr(gpu_interpreter, "wgmma_accumulator_deref", read)


def products_in_flight(matmul: Callable[..., jax.Array], x: jax.Array, w: jax.Array) -> float:
    """How many products the kernel leaves in flight after each: as `wgmma_wait` says, or all."""
    with target_device("cuda", H100):
        waits = set(re.findall(r"wgmma_wait\[n=(\d)\]", str(jax.make_jaxpr(matmul)(x, w))))
    assert len(waits) <= 1
    return float(*waits) if waits else float("inf")


def faults_of(matmul: Callable[..., jax.Array], monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """What the simulated GPU finds wrong with a step: "races", "barrier" or "values". Fresh memory holds NaN."""
    x, w = draw(129, 384, 64)
    deferred_wgmma(monkeypatch, products_in_flight(matmul, x, w))
    memory = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")
    with race_detector.collect_detectors(gpu_interpreter, "GPURaceDetectionState") as detectors:
        try:
            with plgpu.force_gpu_interpret_mode(memory):
                y = jax.block_until_ready(jit_fast_compile(matmul)(x, w))
        except jax.errors.JaxRuntimeError as error:
            assert "arrier" in str(error)  # the simulator's own check: a phase completed and no thread waited for it
            return {"barrier"}
        finally:
            gpu_interpreter.reset_gpu_interpret_mode_state()
    found = {"races"} if any(detector.races_found for detector in detectors) else set()
    try:
        assert_within_tolerance(y, x, w)
    except AssertionError:
        found.add("values")
    return found


@pytest.mark.parametrize("step", MOSTLY_SLOW)
def test_no_step_has_a_race(step, monkeypatch):
    assert not faults_of(run(step), monkeypatch)


NO_FULL_WAIT = (("plgpu.barrier_wait(full.at[slot])", "pass"),)
NO_EMPTY_WAIT = (("plgpu.barrier_wait(empty.at[slot])", "pass"),)
LATE_WAIT = (*NO_FULL_WAIT, ("plgpu.wgmma_wait(1)", "plgpu.wgmma_wait(1), plgpu.barrier_wait(full.at[slot])"))
NO_WGMMA_WAIT = (("plgpu.wgmma_wait(1)", "pass"),)
FAULTS = {  # (step, fault) -> (text of the step, what replaces it), ...
    ("one_warpgroup", "no full wait"): (("plgpu.barrier_wait(full)", "pass"),),
    ("one_warpgroup", "multiplies before the full wait"): (
        ("plgpu.barrier_wait(full)", "pass"),
        ("plgpu.wgmma_wait(0)", "plgpu.wgmma_wait(0), plgpu.barrier_wait(full)"),
    ),
    ("one_warpgroup", "no wgmma wait"): (("plgpu.wgmma_wait(0)", "pass"),),
    ("tma_ring", "no full wait"): NO_FULL_WAIT,
    ("tma_ring", "multiplies before the full wait"): LATE_WAIT,
    ("tma_ring", "no wgmma wait"): NO_WGMMA_WAIT,
    ("tma_ring", "refills the stage of the product in flight"): (
        ("(k > 0) & (k - 1 + STAGES < k_steps)", "k + STAGES < k_steps"),
        ("load(k - 1 + STAGES)", "load(k + STAGES)"),
    ),
    ("warp_specialized", "no full wait"): NO_FULL_WAIT,
    ("warp_specialized", "multiplies before the full wait"): LATE_WAIT,
    ("warp_specialized", "no empty wait"): NO_EMPTY_WAIT,
    ("warp_specialized", "no wgmma wait"): NO_WGMMA_WAIT,
    ("warp_specialized", "releases the stage of the product in flight"): (
        ("(k > 0) & (k - 1 + STAGES < k_steps)", "k + STAGES < k_steps"),
        ("(k - 1) & (STAGES - 1)", "k & (STAGES - 1)"),
    ),
    ("persistent", "no full wait"): NO_FULL_WAIT,
    ("persistent", "multiplies before the full wait"): LATE_WAIT,
    ("persistent", "no empty wait"): NO_EMPTY_WAIT,
    ("persistent", "no wgmma wait"): NO_WGMMA_WAIT,
    ("persistent", "releases the stage of the product in flight"): (
        ("(step > 0) & (step - 1 + STAGES < steps)", "step + STAGES < steps"),
        ("(step - 1) & (STAGES - 1)", "step & (STAGES - 1)"),
    ),
    ("persistent", "waits for no empty stage at the start of a tile"): (("when(step >= STAGES)", "when(k >= STAGES)"),),
}


FAST_FAULTS = (
    ("one_warpgroup", "no wgmma wait"),
    ("tma_ring", "refills the stage of the product in flight"),
    ("persistent", "waits for no empty stage at the start of a tile"),
)


@pytest.mark.parametrize(
    ("step", "fault"),
    [pytest.param(*each, marks=() if each in FAST_FAULTS else slow) for each in FAULTS],
)
def test_planted_fault_is_found(step, fault, monkeypatch):
    path = next(FOLDER.glob(f"step?_{step}.py"))
    text = path.read_text()
    for old, new in FAULTS[step, fault]:
        assert old in text
        text = text.replace(old, new)
    module = types.ModuleType("faulty")
    exec(compile(text, str(path), "exec"), module.__dict__)
    found = faults_of(functools.partial(module.matmul, **OPTIONS.get(step, {})), monkeypatch)
    assert found


@pytest.mark.parametrize("step", MOSTLY_SLOW)
def test_two_runs_are_equal_and_a_row_of_nan_stays_in_its_row(step):
    x, w = draw(9, 128, 64)
    matmul = jax.jit(run(step))
    clean = matmul(x, w)
    dirty = matmul(x.at[8].set(jnp.nan), w)
    tolerance.assert_bit_equal({"y": clean[:8]}, {"y": dirty[:8]})
    tolerance.assert_bit_equal({"y": clean}, {"y": matmul(x, w)})
    assert np.isnan(np.asarray(dirty[8], np.float32)).all()


def test_panels_visit_each_tile_once_in_order():
    for row_tiles, column_tiles in ((1, 1), (15, 2), (40, 3)):
        tiles = tutorial.by_panels(row_tiles, column_tiles)
        assert sorted(map(tuple, tiles.tolist())) == list(itertools.product(range(row_tiles), range(column_tiles)))
        panels = tiles[:, 0] // step4_persistent.PANEL
        assert (np.diff(panels) >= 0).all()
        assert (np.diff(tiles[:, 1])[np.diff(panels) == 0] >= 0).all()


@pytest.mark.parametrize("step", MOSTLY_SLOW)
def test_predicted_bytes_are_those_that_the_kernel_copies(step, monkeypatch):
    copied, execute = [], gpu_interpreter.AsyncCopyGmemToSmemTask.__call__

    def count(task: Any, thread: int) -> Any:
        copied.append(task)
        return execute(task, thread)

    monkeypatch.setattr(gpu_interpreter.AsyncCopyGmemToSmemTask, "__call__", count)
    jax.block_until_ready(jax.jit(lambda x, w: run(step)(x, w))(*draw(129, 128, 320)))
    tiling = tutorial.TILINGS[step]
    tiles = -(-129 // tiling.rows) * 2
    assert len(copied) == tiles * 2 * 2
    assert tutorial.predict_traffic(tiling, 129, 128, 320, 3).l2_bytes == tiles * 2 * (tiling.rows + 256) * 64 * 2


def test_predicted_memory_traffic_depends_on_what_runs_together():
    one, all_ = (tutorial.predict_traffic(tutorial.TILINGS["persistent"], 4096, 4096, 4096, n) for n in (1, 32 * 16))
    assert all_.memory_bytes == 2 * 2 * 4096**2, "each operand once"
    assert one.l2_bytes == all_.l2_bytes and one.memory_bytes >= all_.memory_bytes
    cache = tutorial.Cache(2)
    for block in "abacab":  # b is evicted for c, and c for b
        cache.read(block, 1)
    assert cache.missed_bytes == 4


X, W = jnp.ones((4, 64), jnp.bfloat16), jnp.ones((64, 64), jnp.bfloat16)
WRONG = {
    "x has shape (64,); allowed: [N, M]": (X[0], W),
    "w has shape (32, 64)": (X, W[:32]),
    "w has dtype float16": (X, W.astype(jnp.float16)),
}
UNSUPPORTED = {
    "x has dtype float32": (X.astype(jnp.float32), W.astype(jnp.float32)),
    "M is 32; these kernels take multiples of 64": (X[:, :32], W[:32]),
    "F is 63; these kernels take multiples of 64": (X, W[:, :63]),
}


@pytest.mark.parametrize("step", hopper.STEPS)
def test_invalid_argument_raises_with_its_name(step):
    matmul = hopper.load_step(step)
    for message, arguments in WRONG.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            matmul(*arguments)
    for message, arguments in UNSUPPORTED.items():
        with pytest.raises(NotImplementedError, match=re.escape(message)):
            matmul(*arguments)
    with pytest.raises(NotImplementedError, match="no group_sizes"):
        matmul(X, W, group_sizes=jnp.array([4]))
    for kind in ("NVIDIA A100-SXM4-80GB", "TPU v6 lite"):
        with target_device("tpu" if "TPU" in kind else "cuda", kind), pytest.raises(NotImplementedError, match=kind):
            matmul(X, W)
    assert matmul(X[:0], W).shape == (0, 64)
    np.testing.assert_array_equal(np.float32(matmul(X[:, :0], W[:0])), np.zeros((4, 64)))


@pytest.mark.parametrize("step", hopper.STEPS)
def test_steps_are_short_and_docstrings_have_six_parts(step):
    text = next(FOLDER.glob(f"step?_{step}.py")).read_text()
    assert len(text.splitlines()) < 120
    parts = re.findall(r"^(Math|Tiling|State|Traffic|Limits|Source) {2,}\S", text, re.M)
    assert parts == ["Math", "Tiling", "State", "Traffic", "Limits", "Source"]


def test_readme_covers_every_step_in_order():
    guide = (FOLDER / "README.md").read_text()
    positions = [guide.index(f"## {number}. `step{number}_{step}.py`") for number, step in enumerate(hopper.STEPS, 1)]
    assert positions == sorted(positions)


def test_table_of_readme_is_the_committed_one():
    document = bench_common.load_committed("hopper")
    assert list(document["rows"]) == [*hopper.STEPS, *tutorial.BASELINES]
    assert not tutorial.wrong(document)
    text = (FOLDER / "README.md").read_text()
    assert bench_common.update_readme(text, tutorial, document) == text
    uncompiled = {"rows": {"persistent": {"error": 0.5, "not_compiled": "no ptxas"}}}
    assert "| no ptxas |" in tutorial.table(uncompiled) and tutorial.wrong(uncompiled) == ["persistent"]


def test_loop_is_the_shortest_that_multiplies():
    code = [
        sass.Instruction(16 * i, "", name, operands)
        for i, (name, operands) in enumerate(
            [
                ("MOV", ""),
                ("SYNCS", ""),
                ("BRA", "0x10"),
                ("HGMMA.64x256x16.F32.BF16", ""),
                ("BRA", "0x10"),
                ("BRA", "0x0"),
            ]
        )
    ]
    assert tutorial.loop_of(code) == {"loop_instructions": 4, "loop_wgmma": 1}
