"""The benchmark runner: every implementation of a workload is run, checked and timed, alternately, on random inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import accuracy, baselines
from bench import runner as harness
from bench.roofline import Ceilings
from bench.timer import WallClock
from dantinox.kernels import workloads

KIND = {"suites": ("bench",), "devices": ("small",)}
ROWS = {
    "attention": workloads.Attention(name="a", T=128, S=128, H=4, K=2, D=8, B=2, window=20, gate="head", **KIND),
    "grouped_matmul": workloads.GroupedMatmul(name="g", N=200, M=16, F=24, E=5, skew="empty", **KIND),
    "moe_mlp": workloads.MoE(name="m", N=100, M=8, F=12, E=4, k=2, skew="zipf", **KIND),
    "decode_attention": workloads.Decode(name="d", lengths=(3, 30), C=16, H=4, K=2, D=8, window=5, **KIND),
}


class CountingClock(WallClock):
    """Notes the order in which programs are timed."""

    def __init__(self) -> None:
        self.order = []

    def sample(self, call, calls):
        self.order.append(getattr(call, "args", ("ceiling",))[0])
        jax.block_until_ready([call(i) for i in range(calls)])
        return [1.0] * calls


@pytest.fixture
def small_ceilings(monkeypatch):
    """Ceilings without their large arrays."""
    ceilings = Ceilings(WallClock())
    monkeypatch.setattr(ceilings, "sample", lambda dtype: (1e11, 1e10))
    return ceilings


@pytest.mark.parametrize("op", ROWS)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_run_case_times_candidates_and_reports_unsupported_ones(op, backward, small_ceilings):
    if op == "decode_attention" and backward:
        pytest.skip("decoding has no gradient")
    only = ("reference", "xla", "triton", "lax.ragged_dot", "jax.nn xla")
    held = harness.hold(harness.Contest(ROWS[op], backward), small_ceilings, budget=0.01, only=only)
    assert set(held.results) <= set(only) and {"reference", "xla", "triton"} <= set(held.results)
    ran = {name: result for name, result in held.results.items() if result.refused is None}
    assert {"reference", "xla"} <= set(ran)
    for name, result in ran.items():
        assert len(result.seconds) >= harness.TURNS[0] and min(result.seconds) > 0, name
        assert result.error < 1e-5, name
    assert "Triton kernel" in held.results["triton"].refused


def test_implementations_are_timed_alternately(monkeypatch, small_ceilings):
    timer = CountingClock()
    monkeypatch.setattr(harness, "clock", lambda: timer)
    only = ("reference", "xla", "jax.nn xla")
    held = harness.hold(harness.Contest(ROWS["attention"]), small_ceilings, budget=1e-9, only=only)
    turns = harness.TURNS[0] + 2  # they are quick
    rounds = [timer.order[i : i + 3] for i in range(0, len(timer.order), 3)]
    assert len(rounds) == turns and len(set(map(id, rounds[0]))) == 3
    assert all(each == rounds[0] for each in rounds)
    assert all(len(result.seconds) == turns for result in held.results.values())


def test_failed_candidate_does_not_affect_the_others(monkeypatch, small_ceilings):
    def broken(inputs, state, aux):
        raise TypeError("no such tile")

    monkeypatch.setattr(baselines, "peers", lambda spec: {"broken": broken})
    held = harness.hold(harness.Contest(ROWS["grouped_matmul"]), small_ceilings, budget=0.01, only=("xla", "broken"))
    assert held.results["broken"].refused == "TypeError: no such tile"
    assert held.results["xla"].seconds


def test_wrong_result_has_a_large_error(monkeypatch, small_ceilings):
    wrong = lambda inputs, state, aux: (inputs["x"] @ inputs["w"][0], state)
    monkeypatch.setattr(baselines, "peers", lambda spec: {"wrong": wrong})
    held = harness.hold(harness.Contest(ROWS["grouped_matmul"]), small_ceilings, budget=0.01, only=("wrong",))
    assert held.results["wrong"].error > 0.1


@pytest.mark.parametrize("op", ["attention", "grouped_matmul", "moe_mlp"])
def test_checked_subset_equals_the_full_result(op, monkeypatch):
    """The gradients of the part equal those of the whole call, so judging the part is judging the implementation."""
    monkeypatch.setattr(accuracy, "SCORES", 0)
    spec = ROWS[op]
    inputs, state, dout = harness.arguments(spec)
    part = accuracy.Part(spec, inputs, spec.integer_inputs())
    masked = dout * part.mask
    assert 0 < np.count_nonzero(part.mask) < part.mask.size
    program = harness.program(harness.ours(spec, "reference"), backward=True)
    whole, _ = jax.jit(program)(inputs, state, spec.integer_inputs(), masked)
    truth = accuracy.truth(part, program, state, masked)
    assert truth["o"].size < whole["o"].size
    assert part.error(whole, truth) < 1e-6
    whole["o"] = whole["o"].at[(0,) * whole["o"].ndim].set(jnp.nan) if op == "attention" else whole["o"] * jnp.nan
    assert np.isnan(part.error(whole, truth))


@pytest.mark.parametrize("op", ["grouped_matmul", "moe_mlp"])
def test_per_row_computation_matches_reference(op):
    spec = ROWS[op]
    inputs, state, dout = harness.arguments(spec)
    one, two = (
        harness.program(forward, backward=True)(inputs, state, spec.integer_inputs(), dout)[0]
        for forward in (harness.ours(spec, "reference"), accuracy.by_row(spec))
    )
    for name in one:
        np.testing.assert_allclose(one[name], two[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_decode_step_can_be_repeated_on_a_donated_cache():
    spec = ROWS["decode_attention"]
    runner = harness.Runner(harness.Contest(spec), harness.ours(spec, "xla"), [harness.arguments(spec)])
    first, again = (np.asarray(runner(i)["o"]) for i in range(2))
    np.testing.assert_array_equal(first, again)  # the same slot is written each time


def test_small_rows_get_several_nonzero_argument_sets():
    assert harness.sets_needed(ROWS["attention"]) == 8
    big = workloads.get("grouped_matmul", "128 groups")
    assert harness.sets_needed(big) == 1
    one, two = (harness.arguments(ROWS["moe_mlp"], seed)[0] for seed in (0, 1))
    for name in one:
        assert np.count_nonzero(one[name]) > 0.99 * one[name].size
        assert not np.array_equal(one[name], two[name])


def test_every_bench_row_of_this_device_has_candidates():
    for op in ROWS:
        for contest in harness.contests(op, "cpu"):
            assert list(harness.contestants(contest.spec))[:4] == ["reference", "xla", "pallas", "triton"]


def test_slow_reference_is_skipped():
    spec = workloads.get("attention", "16k d128 full")
    assert "GB" in harness.contestants(spec)["reference"]
