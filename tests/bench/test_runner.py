"""The benchmark runner: every implementation of a workload is run, checked and timed, alternately, on random inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench.operations import accuracy, baselines, runner
from bench.operations.baselines import Candidate
from bench.operations.roofline import Ceilings
from bench.operations.timer import WallClock
from dantinox.kernels import workloads

KIND = {"suites": ("bench",), "devices": ("small",)}
ROWS = {
    "attention": workloads.Attention(name="a", T=128, S=128, H=4, K=2, D=8, B=2, window=20, gate="head", **KIND),
    "grouped_matmul": workloads.GroupedMatmul(name="g", N=200, M=16, F=24, E=5, skew="empty", **KIND),
    "moe_mlp": workloads.MoE(name="m", N=100, M=8, F=12, E=4, k=2, skew="zipf", **KIND),
    "linear_cross_entropy": workloads.LinearCrossEntropy(
        name="l", N=100, M=8, V=37, softcap=2.0, z_loss=0.1, absent="some", **KIND
    ),
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
@pytest.mark.sampled(4)
def test_run_case_times_candidates_and_reports_unsupported_ones(op, backward, small_ceilings):
    if op == "decode_attention" and backward:
        pytest.skip("decoding has no gradient")
    only = ("reference", "xla", "triton", "lax.ragged_dot", "jax.nn xla", "all logits")
    outcome = runner.run_case(runner.BenchmarkCase(ROWS[op], backward), small_ceilings, budget=0.01, only=only)
    assert set(outcome.results) <= set(only) and {"reference", "xla", "triton"} <= set(outcome.results)
    ran = {name: result for name, result in outcome.results.items() if result.skip_reason is None}
    assert {"reference", "xla"} <= set(ran)
    for name, result in ran.items():
        assert len(result.seconds) >= runner.MIN_TURNS and min(result.seconds) > 0, name
        assert result.error < 1e-5, name
    assert "Triton kernel" in outcome.results["triton"].skip_reason


def test_implementations_are_timed_alternately(monkeypatch, small_ceilings):
    timer = CountingClock()
    monkeypatch.setattr(runner, "clock", lambda: timer)
    only = ("reference", "xla", "jax.nn xla")
    outcome = runner.run_case(runner.BenchmarkCase(ROWS["attention"]), small_ceilings, budget=1e-9, only=only)
    turns = runner.MIN_TURNS + 2  # they are quick
    rounds = [timer.order[i : i + 3] for i in range(0, len(timer.order), 3)]
    assert len(rounds) == turns and len(set(map(id, rounds[0]))) == 3
    assert all(order == rounds[0] for order in rounds)
    assert all(len(result.seconds) == turns for result in outcome.results.values())


def test_failed_candidate_does_not_affect_the_others(monkeypatch, small_ceilings):
    def broken(inputs, state, aux):
        raise TypeError("no such tile")

    monkeypatch.setattr(baselines, "for_workload", lambda workload: [Candidate("broken", broken)])
    case = runner.BenchmarkCase(ROWS["grouped_matmul"])
    outcome = runner.run_case(case, small_ceilings, budget=0.01, only=("xla", "broken"))
    assert outcome.results["broken"].skip_reason == "TypeError: no such tile"
    assert outcome.results["xla"].seconds


def test_wrong_result_has_a_large_error(monkeypatch, small_ceilings):
    wrong = lambda inputs, state, aux: (inputs["x"] @ inputs["w"][0], state)
    monkeypatch.setattr(baselines, "for_workload", lambda workload: [Candidate("wrong", wrong)])
    case = runner.BenchmarkCase(ROWS["grouped_matmul"])
    outcome = runner.run_case(case, small_ceilings, budget=0.01, only=("wrong",))
    assert outcome.results["wrong"].error > 0.1


@pytest.mark.parametrize("op", ["attention", "grouped_matmul", "moe_mlp", "linear_cross_entropy"])
@pytest.mark.sampled(2)
def test_checked_subset_equals_the_full_result(op, monkeypatch):
    """The gradients of the part equal those of the whole call, so judging the part is judging the implementation."""
    monkeypatch.setattr(accuracy, "MAX_SCORES", 0)
    workload = ROWS[op]
    inputs, state, dout = runner.random_arguments(workload)
    sample = accuracy.CheckedSample(workload, inputs, workload.integer_inputs())
    masked = dout * sample.mask
    assert 0 < np.count_nonzero(sample.mask) < sample.mask.size
    program = runner.build_program(runner.implementation_function(workload, "reference"), backward=True)
    full, _ = jax.jit(program)(inputs, state, workload.integer_inputs(), masked)
    expected = accuracy.float32_reference(sample, program, state, masked)
    assert expected["o"].size < full["o"].size
    assert sample.error(full, expected) < 1e-6
    full["o"] = full["o"].at[(0,) * full["o"].ndim].set(jnp.nan) if op == "attention" else full["o"] * jnp.nan
    assert np.isnan(sample.error(full, expected))


@pytest.mark.parametrize("op", ["grouped_matmul", "moe_mlp"])
@pytest.mark.sampled(2)
def test_per_row_computation_matches_reference(op):
    workload = ROWS[op]
    inputs, state, dout = runner.random_arguments(workload)
    first, second = (
        runner.build_program(forward, backward=True)(inputs, state, workload.integer_inputs(), dout)[0]
        for forward in (runner.implementation_function(workload, "reference"), accuracy.gathered_reference(workload))
    )
    for name in first:
        np.testing.assert_allclose(first[name], second[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_decode_step_can_be_repeated_on_a_donated_cache():
    workload = ROWS["decode_attention"]
    function = runner.implementation_function(workload, "xla")
    compiled = runner.CompiledCandidate(runner.BenchmarkCase(workload), function, [runner.random_arguments(workload)])
    first, again = (np.asarray(compiled(i)["o"]) for i in range(2))
    np.testing.assert_array_equal(first, again)  # the same slot is written each time


def test_small_rows_get_several_nonzero_argument_sets():
    assert runner.num_argument_sets(ROWS["attention"]) == 8
    big = workloads.get("grouped_matmul", "128 groups")
    assert runner.num_argument_sets(big) == 1
    first, second = (runner.random_arguments(ROWS["moe_mlp"], seed)[0] for seed in (0, 1))
    for name in first:
        assert np.count_nonzero(first[name]) > 0.99 * first[name].size
        assert not np.array_equal(first[name], second[name])


def test_every_bench_row_of_this_device_has_candidates():
    for op in ROWS:
        for case in runner.benchmark_cases(op, "cpu"):
            assert list(runner.candidates(case.workload))[:4] == ["reference", "xla", "pallas", "triton"]


def test_slow_reference_is_skipped():
    workload = workloads.get("attention", "16k d128 full")
    assert "GB" in runner.candidates(workload)["reference"].unsupported_reason
