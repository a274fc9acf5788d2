"""Decode attention on Hopper, interpreted on the CPU: values, races, invisible slots, splits, traffic, limits."""

import functools
import heapq
import itertools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import mosaic_gpu as plgpu

from dantinox import kernels
from dantinox.kernels import dispatch, first_use, workloads
from dantinox.kernels.ops.decode_attention.num_splits import SPLIT_OVERHEAD, choose_num_splits
from dantinox.kernels.ops.decode_attention.pallas_sm90 import kernel, splits
from tests.conftest import clear_traces
from tests.helpers import cases, tolerance
from tests.helpers.decode_steps import Step, draw

slow = pytest.mark.slow
H100 = ("cuda", "NVIDIA H100 80GB HBM3")
PROFILE = Path(__file__).parents[3] / "profiles/aot/h100.json"


def kv_cache(C: int, *lengths: int, **sizes: Any) -> workloads.Decode:
    """Lengths 0, 1, one less than C, C and more than three times C, unless given."""
    lengths = lengths or (0, 1, C - 1, C, 3 * C + 7)
    return cases.make_workload(workloads.Decode, C=C, lengths=lengths, **({"H": 2, "K": 1, "D": 64} | sizes))


@functools.cache
def program(case: workloads.Decode, num_splits: int, memory: str = "nan") -> Any:
    """Jitted (inputs, cache) -> (o, cache); shared memory holds NaN or zeros before it is written."""
    options = case.options() | {"scale": case.D**-0.5 if case.scale is None else case.scale}
    interpret = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory=memory)
    call = functools.partial(kernel.decode_attention, **options, num_splits=num_splits, interpret=interpret)
    return jax.jit(lambda inputs, cache: call(**({"gate": None} | inputs), cache=cache))


def run(
    case: workloads.Decode, num_splits: int, step: Step, dtype: str = "bfloat16", memory: str = "nan"
) -> tuple[jax.Array, kernels.KVCache]:
    """One step without a race."""
    inputs = {name: jnp.asarray(x, dtype) for name, x in step.inputs.items()}
    cache = kernels.KVCache(jnp.asarray(step.cache_k, dtype), jnp.asarray(step.cache_v, dtype), **case.integer_inputs())
    result = jax.block_until_ready(program(case, num_splits, memory)(inputs, cache))
    races = interpreter.get_races().races_found
    interpreter.reset_gpu_interpret_mode_state()
    assert not races
    return result


CASES = [
    # The ring buffer ends inside its third block; the four heads, with sinks, do not fill a tile; one split.
    (kv_cache(136, H=4, gate="head", sinks=True), 1),
    # A window of three blocks across the end of the ring buffer, two in a split; two KV heads; empty splits.
    (kv_cache(200, K=2, D=128, window=70, gate="elementwise", softcap=2.0), 2),
    # Five tokens: of one block, across two blocks, across the end of the ring buffer; a split without a row's window.
    (kv_cache(136, 0, 61, 134, 1000, new_tokens=5, window=66, gate="head", sinks=True, softcap=2.0), 2),
    *(
        pytest.param(*case, marks=slow)
        for case in (
            (kv_cache(256, H=8), 1),
            (kv_cache(256, H=8, K=8, window=64, sinks=True), 3),
            (kv_cache(256, H=24, K=2, window=1, gate="head"), 2),  # 12 heads: two tiles of 8 rows
            (kv_cache(136, D=256, gate="head", scale=-0.05), 2),
            (kv_cache(136, 200, D=80, gate="elementwise", window=70), 2),
            (kv_cache(136, 64, D=32, softcap=2.0), 1),
            (kv_cache(136, 200, D=192, gate="head"), 2),
            (kv_cache(520, 519, 520, 583, 2000, D=128, window=300), 3),
            (kv_cache(1024, 1023, 1100, 5000), 1),  # more blocks than stages: each stage is loaded several times
            (kv_cache(1024, 40, 1023, 1087, D=128, K=1, H=4, softcap=5.0), 2),
            (kv_cache(64, H=64, gate="elementwise"), 1),
            (kv_cache(8, window=1000), 2),
            (kv_cache(72), 2),
            (kv_cache(72, scale=0.0), 1),
            (kv_cache(136, 0, 63, 131, 134, new_tokens=2, H=4), 1),
            (kv_cache(136, 7, 128, 400, new_tokens=8, window=129, K=2, D=128, gate="elementwise", sinks=True), 2),
            (kv_cache(136, 60, 131, 5000, new_tokens=8, window=1, H=8, D=80, gate="head", softcap=2.0), 3),
            (kv_cache(72, 0, 2, 8, new_tokens=64, H=1), 1),  # a tile of tokens; both blocks receive some
            (kv_cache(72, 60, 71, 500, new_tokens=64, window=9, H=1, sinks=True), 2),  # the first block twice
            (kv_cache(520, 519, 583, 2000, new_tokens=5, window=300, D=256, H=6), 3),
            (kv_cache(16, 0, 3, 8, new_tokens=8, scale=0.0), 1),
        )
    ),
]
NAMED = pytest.mark.parametrize(
    ("case", "num_splits"),
    CASES,
    ids=lambda x: (
        f"splits={x}" if isinstance(x, int) else f"C={x.C} D={x.D}" + f" T={x.new_tokens}" * (x.new_tokens > 1)
    ),
)


@NAMED
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=slow)])
def test_output_matches_python_loops_and_tokens_are_stored(case, num_splits, dtype):
    """Unused slots hold NaN."""
    step = draw(case, dtype, fill=np.nan)
    o, new_cache = run(case, num_splits, step, dtype)
    inputs = {name: jnp.asarray(x, dtype) for name, x in step.inputs.items()}
    cache = kernels.KVCache(jnp.asarray(step.cache_k, dtype), jnp.asarray(step.cache_v, dtype), **case.integer_inputs())
    reference, _ = kernels.decode_attention(**inputs, cache=cache, **case.options(), implementation="reference")
    assert o.dtype == jnp.dtype(dtype)
    tolerance.assert_within_bound({"o": o}, {"o": reference}, {"o": step.o}, dtype)
    np.testing.assert_array_equal(new_cache.length, np.array(case.lengths) + case.new_tokens)
    for ring_buffer, old, new in ((new_cache.k, step.cache_k, "k"), (new_cache.v, step.cache_v, "v")):
        expected = old.copy()
        for b, length in enumerate(case.lengths):
            for t, token in enumerate(step.inputs[new][b].reshape(case.new_tokens, case.K, case.D)):
                expected[b, :, (length + t) % case.C] = token
        np.testing.assert_array_equal(tolerance.to_float64(ring_buffer), expected)


def test_invisible_slots_do_not_affect_output():
    """Fills unused slots, tokens outside the window and uninitialised memory with zeros and with NaN."""
    case, num_splits = CASES[1]
    outputs = []
    for fill, memory in ((0, "zero"), (np.nan, "nan"), (np.nan, "nan")):
        step = draw(case, "bfloat16", fill=fill)
        for b, length in enumerate(case.lengths):
            for p in range(max(0, length - case.C), length - case.window + 1):
                step.cache_k[b, :, p % case.C] = step.cache_v[b, :, p % case.C] = fill
        outputs.append({"o": run(case, num_splits, step, memory=memory)[0]})
    tolerance.assert_bit_equal(outputs[0], outputs[1])
    tolerance.assert_bit_equal(outputs[1], outputs[2])


@slow
def test_number_of_splits_changes_only_rounding():
    case = kv_cache(520, 100, 519, 2000, D=128, window=400)
    step = draw(case)
    outputs = [tolerance.to_float64(run(case, num_splits, step, "float16")[0]) for num_splits in (1, 2, 5)]
    for output in outputs[1:]:
        np.testing.assert_allclose(output, outputs[0], rtol=2e-3, atol=1e-4)


def visible_blocks(length: int, C: int, max_visible: int) -> list[int]:
    """The blocks that hold the last `max_visible` tokens, from the oldest on."""
    return list(dict.fromkeys(p % C // splits.BLOCK_KV for p in range(max(0, length + 1 - max_visible), length + 1)))


@pytest.mark.parametrize("C", [8, 64, 72, 200, 256], ids="C={}".format)
@pytest.mark.sampled(4)
def test_splits_divide_visible_blocks_evenly(C):
    lengths, num_blocks = np.arange(2 * C + 2, dtype=np.int32), -(-C // splits.BLOCK_KV)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None, None, None))
    @functools.partial(jax.vmap, in_axes=(None, 0, None, None))
    def split_ranges(length: Any, split: Any, max_visible: Any, num_splits: Any) -> splits.SplitRange:
        return splits.split_range(length, split, splits.SplitConfig(C, max_visible, num_splits, 1.0, None, None))

    for max_visible in {min(n, C) for n in (1, 63, 64, 65, 130, C)}:
        expected = [visible_blocks(length, C, max_visible) for length in lengths.tolist()]
        assert max(map(len, expected)) <= splits.max_visible_blocks(C, max_visible)
        for num_splits in (1, 2, 3, 7):
            split = np.arange(num_splits, dtype=np.int32)
            ranges = split_ranges(lengths, split, np.int32(max_visible), np.int32(num_splits))
            ranges = jax.tree.map(lambda x: np.asarray(x).tolist(), ranges)
            for b, (first, starts, stops) in enumerate(zip(ranges.first, ranges.start, ranges.stop, strict=True)):
                steps = [n for start, stop in zip(starts, stops, strict=True) for n in range(start, stop)]
                assert [(first[0] + n) % num_blocks for n in steps] == expected[b], (max_visible, num_splits, b)
                sizes = [stop - start for start, stop in zip(starts, stops, strict=True)]
                assert max(sizes) - min(sizes) <= 1
            assert [slot[0] for slot in ranges.slot] == (lengths % C).tolist()
            assert [n[0] for n in ranges.num_visible] == np.minimum(lengths + 1, max_visible).tolist()


def simulated_time(row: workloads.Decode, num_splits: int) -> int:
    """The time in block loads until the last thread block ends; each that ends makes room for the next."""
    max_visible, end_times = min(row.C, row.window or row.C), [0] * splits.RESIDENT_BLOCKS[row.D]
    for length in row.lengths:
        count = len(visible_blocks(length, row.C, max_visible))
        for _, split in itertools.product(range(row.K), range(num_splits)):
            loads = count * (split + 1) // num_splits - count * split // num_splits
            heapq.heapreplace(end_times, end_times[0] + loads + SPLIT_OVERHEAD)
    return max(end_times)


def chosen_num_splits(row: workloads.Decode) -> int:
    num_blocks = splits.max_visible_blocks(row.C, min(row.C, row.window or row.C))
    return choose_num_splits(row.B, row.K, num_blocks, splits.RESIDENT_BLOCKS[row.D])


def test_chosen_splits_fill_the_sms():
    for B, K, num_blocks in itertools.product((1, 2, 20, 150), (1, 2, 8), (1, 2, 9, 128, 512)):
        assert 1 <= choose_num_splits(B, K, num_blocks, 264) <= max(1, num_blocks // 2)
    for row in workloads.select("decode_attention", "bench", "h100"):
        if row.name != "nearly empty, B=8":  # the lengths are not known when the splits are chosen
            best = min(simulated_time(row, num_splits) for num_splits in (1, 2, 4, 8, 11, 16, 32))
            assert simulated_time(row, chosen_num_splits(row)) <= 1.12 * best, row.name


def test_split_without_visible_tokens_has_no_weight():
    o = jnp.stack([jnp.full((2, 3), 4.0), jnp.full((2, 3), jnp.nan), jnp.full((2, 3), 1.0)])
    lse = jnp.stack([jnp.full(2, 5.0), jnp.full(2, -jnp.inf), jnp.full(2, 6.0)])
    np.testing.assert_allclose(splits.combine_splits(o, lse), np.full((2, 3), 2.0), rtol=1e-6)
    sinks = jnp.array([-jnp.inf, 5.0])  # as a split without an output
    np.testing.assert_allclose(splits.combine_splits(o, lse, sinks), [[2.0] * 3, [1.5] * 3], rtol=1e-6)


def traffic_ratio(row: workloads.Decode) -> float:
    """Bytes that a step moves to and from memory, computed from its visited blocks, over the minimum."""
    max_visible = min(row.C, row.window or row.C)
    num_splits = chosen_num_splits(row)
    visited = [len(visible_blocks(length, row.C, max_visible)) for length in row.lengths]
    G = -(-row.H // row.K // 8) * 8
    kv_bytes = sum(visited) * splits.BLOCK_KV * row.D * 2 * 2
    # Each split with visible blocks reads the queries and writes its output; the combination reads all outputs.
    output, lse = 4 * G * row.D, 4 * kernel.BLOCK_H
    split_bytes = sum(min(num_splits, count) for count in visited) * (2 * G * row.D + output)
    other_bytes = row.B * (2 * row.D * 2 + num_splits * (output + 2 * lse) + 2 * G * row.D)
    return row.K * (kv_bytes + split_bytes + other_bytes) / row.cost().bytes


def test_step_traffic_is_close_to_the_minimum():
    ratios = {row.name: traffic_ratio(row) for row in workloads.select("decode_attention", "bench", "h100")}
    short = ratios.pop("nearly empty, B=8")  # has the splits of a full cache; their outputs stay in L2
    assert short < 1.6 and ratios and all(1 <= ratio < 1.03 for ratio in ratios.values()), (short, ratios)


def test_unsupported_inputs_raise_with_the_reason():
    supported = {"B": 1, "H": 4, "K": 2, "C": 16, "D": 64, "q": "bfloat16", "cache": "bfloat16"}
    for change, reason in (
        ({"q": "float32", "cache": "float32"}, "dtype float32"),
        ({"cache": "float16"}, "cache.k has dtype float16"),
        ({"cache": "int8"}, "cache.k has dtype int8"),
        ({"D": 72}, "head dim 72"),
        ({"H": 130}, "65 heads"),
        ({"C": 17}, "17 slots"),
    ):
        size = supported | change
        B, H, K, C, D = (size[name] for name in "BHKCD")
        q, k = (jnp.ones((B, heads, D), size["q"]) for heads in (H, K))
        cache = kernels.KVCache.zeros(B, K, C, D, size["cache"])
        options = {"gate": None, "window": None, "softcap": None}
        with pytest.raises(NotImplementedError, match=reason):
            kernel.decode_attention(q, k, k, cache, **options, scale=1.0)
        with dispatch.target_device(*H100), pytest.raises(NotImplementedError, match=f"'pallas' cannot run.*{reason}"):
            kernels.decode_attention(q, k, k, cache, **options, implementation="pallas")
    with dispatch.target_device(*H100):
        jax.eval_shape(lambda: kernels.decode_attention(q, k, k, cache, **options))  # auto takes another one


def test_more_tokens_than_a_tile_has_rows_are_refused_and_auto_takes_xla():
    q, cache = jnp.ones((1, 33, 4, 64), jnp.bfloat16), kernels.KVCache.zeros(1, 2, 40, 64, jnp.bfloat16)
    k = q[:, :, :2]
    reason = "'pallas' cannot run here: q has 33 tokens of 2 heads for each of k's and a tile has 64 rows"
    with dispatch.target_device(*H100):
        with pytest.raises(NotImplementedError, match=reason):
            kernels.decode_attention(q, k, k, cache, implementation="pallas")
        assert jax.eval_shape(kernels.decode_attention, q, k, k, cache)[0].shape == q.shape


def test_pallas_gpu_requires_hopper(monkeypatch):
    cache = kernels.KVCache.zeros(1, 1, 16, 64, jnp.bfloat16)
    x = jnp.ones((1, 1, 64), jnp.bfloat16)
    calls = []
    monkeypatch.setattr(kernel, "decode_attention", lambda *args, **options: calls.append(options) or args[::3])
    with dispatch.target_device(*H100):
        assert kernels.implementations("decode_attention")["pallas"] is None
        for implementation in ("pallas", "auto"):
            kernels.decode_attention(x, x, x, cache, implementation=implementation)
            clear_traces()
        assert calls == [{"gate": None, "window": None, "scale": 0.125, "softcap": None}] * 2
        monkeypatch.setattr(first_use, "disagreement", lambda *_: "it failed its check")
        jax.eval_shape(kernels.decode_attention, x, x, x, cache)
        assert len(calls) == 2
    with dispatch.target_device("cuda", "NVIDIA A100-SXM4-80GB"):
        assert "requires Hopper" in kernels.implementations("decode_attention")["pallas"]


def test_empty_batch_returns_empty_output():
    q, cache = jnp.ones((0, 2, 64), jnp.bfloat16), kernels.KVCache.zeros(0, 2, 16, 64, jnp.bfloat16)
    o, new_cache = kernel.decode_attention(q, q, q, cache, gate=None, window=None, scale=1.0, softcap=None)
    assert o.shape == q.shape and new_cache.k.shape == cache.k.shape


def test_compiled_kernel_uses_wgmma_without_spills_or_cache_copy():
    """Reads the committed profile of ptxas for sm_90a."""
    rows = json.loads(PROFILE.read_text())["rows"]
    decode_rows = {
        key: row for key, row in rows.items() if key.startswith("decode_attention / ") and " / pallas / " in key
    }
    assert len(decode_rows) == sum(len(row.dtypes) for row in workloads.select("decode_attention", "aot", "h100"))
    for key, row in decode_rows.items():
        assert row["status"] == "compiled", key
        (compiled,) = row["kernels"]
        case = workloads.get("decode_attention", key.split(" / ")[1])
        allowed_spill = 256 if case.D == 256 and case.new_tokens > 1 else 0
        assert compiled["spill_bytes"] <= allowed_spill and compiled["mma"] == 0 and compiled["wgmma"] > 0, key
        assert compiled["local"] <= allowed_spill, key
        assert case.new_tokens > 1 or compiled["blocks"] == splits.RESIDENT_BLOCKS[case.D] // 132, key
        assert row["temp_bytes"] < np.prod(case.cache_shape()) * 2 / 2, f"{key}: a ring buffer is copied"
