"""`make tune`: which block sizes it tries, what it keeps, and what a crash costs."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest

from bench.operations import runner
from bench.operations.runner import BenchmarkCase, benchmark_cases
from bench.tune import __main__ as tune
from bench.tune import measurement, results
from bench.tune.measurement import Order
from bench.tune.neighbors import neighbors
from dantinox.kernels import tuning
from dantinox.system.console import Console
from tests.conftest import clear_traces

KEY = "attention.pallas_cpu.heuristic_block_sizes(...)"
HEURISTIC = {"block_q": 64, "stages": 2}


def test_neighbors_change_one_size():
    assert list(neighbors(1)) == [2]
    assert list(neighbors(64)) == [128, 32]
    assert list(neighbors([512, 128])) == [[1024, 128], [256, 128], [512, 256], [512, 64]]
    assert list(neighbors({"block_q": 8, "stages": 3, "vmem_bytes": 5, "block_k_sub": None})) == [
        {"block_q": 16, "stages": 3, "vmem_bytes": 5, "block_k_sub": None},
        {"block_q": 4, "stages": 3, "vmem_bytes": 5, "block_k_sub": None},
        {"block_q": 8, "stages": 6, "vmem_bytes": 5, "block_k_sub": None},
        {"block_q": 8, "stages": 1, "vmem_bytes": 5, "block_k_sub": None},
        {"block_q": 8, "stages": 2, "vmem_bytes": 5, "block_k_sub": None},
        {"block_q": 8, "stages": 4, "vmem_bytes": 5, "block_k_sub": None},
    ]
    merged = list(neighbors({"block_q": 8, "kv_blocks_per_step": 3}))
    assert {"block_q": 16, "kv_blocks_per_step": 1} in merged and {"block_q": 8, "kv_blocks_per_step": 4} in merged


def choice(ratio, spread=None, workload="nano"):
    return results.Choice({"block_q": 8}, HEURISTIC, ratio, spread or (ratio, ratio), workload)


def test_choice_must_win_most_turns():
    assert choice(0.9).is_faster() and not choice(0.98).is_faster()
    assert not choice(0.9, (0.7, 1.0)).is_faster()


def test_implementations_within_the_noise_have_no_winner():
    result = {"calls": ["op(a)"], "ratios": {"xla": 1.0, "pallas": 1.3}}
    result |= {"spread": {"xla": [1, 1], "pallas": [1.2, 1.4]}}
    assert results.fastest(result, "nano")["op(a)"]["fastest"] == "xla"
    result["spread"]["pallas"] = [0.9, 1.4]
    assert results.fastest(result, "nano") == {}
    assert results.fastest({"calls": ["op(a)"], "ratios": {"xla": 1.0}, "spread": {"xla": [1, 1]}}, "nano") == {}


def test_results_of_a_workload_replace_its_earlier_ones(tmp_path):
    path = tmp_path / "cpu.json"
    document = results.read(path, "cpu")
    document = results.merge(document, {"a": choice(0.5), "b": choice(0.6, workload="other")}, {}, "nano")
    document = results.merge(document, {"c": choice(0.7)}, {"op(a)": {"fastest": "xla", "workload": "nano"}}, "nano")
    results.write(path, document)
    assert list(results.read(path, "cpu")["block_sizes"]) == ["b", "c"]
    assert "2 choices of block sizes beat the heuristics, 0.65 of the time in the mean" in results.summary(document)
    with pytest.raises(ValueError, match=r"is of 'cpu' and this device is 'NVIDIA H100'; --out names another file"):
        results.read(path, "NVIDIA H100")
    path.write_text("{}", "utf-8")
    with pytest.raises(ValueError, match="is damaged; move it away"):
        results.read(path, "cpu")


def tuner_with(monkeypatch, answer, minutes=1.0):
    made = tune.Tuner(tune.Arguments(), tune.time.monotonic() + 60 * minutes, Console(file=io.StringIO()))
    orders = []

    def run(order):
        orders.append(order)
        return answer(order)

    monkeypatch.setattr(made, "run", run)
    return made, orders


def test_search_goes_on_while_it_helps_and_a_crash_costs_one_choice(monkeypatch):
    best = {32: 0.9, 16: 0.8, 8: 0.85, 128: 1.2}

    def answer(order):
        if not order.trial:
            return {"choices": {KEY: HEURISTIC}}
        (sizes,) = order.trial.values()
        if sizes["stages"] != 2:
            return "exit code -11"
        ratio = best.get(sizes["block_q"], 2.0)
        return {"ratio": ratio, "spread": [ratio, ratio]}

    tuner, orders = tuner_with(monkeypatch, answer)
    found = tuner.tune_block_sizes(benchmark_cases("attention")[0], "pallas")
    assert found[KEY].choice == {"block_q": 16, "stages": 2} and found[KEY].ratio == 0.8
    tried = [tuple(order.trial[KEY].values()) for order in orders[1:]]
    assert len(tried) == len(set(tried))


def test_search_ends_with_its_time(monkeypatch):
    tuner, orders = tuner_with(monkeypatch, lambda order: {"choices": {KEY: HEURISTIC}}, minutes=0)
    assert tuner.tune_block_sizes(benchmark_cases("attention")[0], "pallas") == {}
    assert len(orders) == 1


def test_process_that_fails_gives_its_last_line(monkeypatch):
    tuner = tune.Tuner(tune.Arguments(), 0.0, Console(file=io.StringIO()))
    monkeypatch.setattr(tune.sys, "executable", "/bin/false")
    assert tuner.run(Order("attention", "nano", False)) == "exit code 1"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--op", "attend"], "--op is 'attend'; allowed: attention, grouped_matmul"),
        (["--spec", "huge"], "--spec is 'huge'; allowed: "),
        (["--implementation", "cudnn"], "--implementation is 'cudnn'; allowed: pallas, triton, xla"),
        (["--minutes", "0"], "--minutes is 0.0; allowed: more than 0"),
    ],
)
def test_bad_input_is_named_in_one_line(words, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        tune.main([*words, "--out", str(tmp_path / "out.json")])
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_one_order_is_measured_in_a_process_of_its_own():
    workload = benchmark_cases("decode_attention")[0].workload.name
    order = Order("decode_attention", workload, False, "pallas", rounds=2)
    run = lambda order: json.loads(
        subprocess.run(
            [sys.executable, "-m", "bench.tune.measurement"], input=order.to_json(), capture_output=True, text=True,
            check=True,
        ).stdout
    )  # fmt: skip
    ((key, size),) = run(order)["choices"].items()
    result = run(Order("decode_attention", workload, False, "pallas", {}, {key: size // 2 if size > 1 else 2}, 2))
    assert result["ratio"] > 0 and result["difference"] < 1e-4
    winners = run(Order("decode_attention", workload, False, rounds=2))
    assert winners["calls"] and winners["ratios"].keys() >= {"xla", "pallas"}


def test_wrong_results_are_not_measured(monkeypatch):
    monkeypatch.setattr(measurement, "_difference", lambda *_: float("nan"))
    monkeypatch.setattr(measurement, "CompiledCandidate", lambda *_: lambda i: {})
    monkeypatch.setattr(measurement, "random_arguments", lambda *_: None)
    case = BenchmarkCase(benchmark_cases("attention")[0].workload)
    with pytest.raises(ValueError, match="the results differ by nan of the largest value"):
        measurement.measure(Order("attention", case.workload.name, False, "pallas", {}, {KEY: 8}, 1))


def test_bench_shows_untuned_beside_tuned(monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    tuning.table.cache_clear()
    workload = benchmark_cases("attention")[0].workload
    assert "pallas, untuned" not in runner.candidates(workload)
    runner.uses_measurements.cache_clear()
    inputs, state, _ = runner.random_arguments(workload)
    with tuning.recording() as seen:
        expected, _ = runner.implementation_function(workload, "pallas")(inputs, state, workload.integer_inputs())
    ((key, own),) = seen.choices.items()
    measured = own | {"block_q": own["block_q"] // 2, "kv_blocks_per_step": 1}
    content = {"block_sizes": {key: {"choice": measured}}, "implementations": {}}
    (tmp_path / "cpu.json").write_text(json.dumps(content), "utf-8")
    tuning.table.cache_clear()
    clear_traces()
    found = runner.candidates(workload)
    assert [name for name in found if "untuned" in name] == ["pallas, untuned"]
    assert "pallas, untuned" in runner.candidates(workload)
    clear_traces()
    for name, choice in (("pallas, untuned", own), ("pallas", measured)):
        with tuning.recording() as seen:
            o, _ = found[name].function(inputs, state, workload.integer_inputs())
        assert seen.choices == {key: choice}
        np.testing.assert_allclose(o, expected, atol=1e-5)
    for function in (tuning.table, runner.uses_measurements):
        function.cache_clear()
