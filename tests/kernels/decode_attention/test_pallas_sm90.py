"""Decoding on Hopper, interpreted on the CPU: values, races, what nobody sees, its splits, its traffic, its limits."""

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
from dantinox.kernels import dispatch, workloads
from dantinox.kernels.ops.decode_attention.pallas_sm90 import kernel as mosaic_gpu
from tests.helpers import cases, tolerance
from tests.kernels.decode_attention.test_decode_attention import Step, draw

slow = pytest.mark.slow
H100 = ("cuda", "NVIDIA H100 80GB HBM3")
PROFILE = Path(__file__).parents[3] / "profiles/aot/h100.json"


def ring(C: int, *lengths: int, **sizes: Any) -> workloads.Decode:
    """Empty, one token, one before the ring is full, full, wrapped thrice; or the lengths given."""
    lengths = lengths or (0, 1, C - 1, C, 3 * C + 7)
    return cases.row(workloads.Decode, C=C, lengths=lengths, **({"H": 2, "K": 1, "D": 64} | sizes))


@functools.cache
def program(case: workloads.Decode, parts: int, memory: str = "nan") -> Any:
    """Jitted (inputs, cache) -> (o, cache); shared memory holds NaN or zeros before it is written."""
    options = case.options() | {"scale": case.D**-0.5 if case.scale is None else case.scale}
    interpret = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory=memory)
    call = functools.partial(mosaic_gpu.decode_attention, **options, parts=parts, interpret=interpret)
    return jax.jit(lambda inputs, cache: call(**({"gate": None} | inputs), cache=cache))


def run(
    case: workloads.Decode, parts: int, step: Step, dtype: str = "bfloat16", memory: str = "nan"
) -> tuple[jax.Array, kernels.KVCache]:
    """One step without a race."""
    inputs = {name: jnp.asarray(x, dtype) for name, x in step.inputs.items()}
    cache = kernels.KVCache(jnp.asarray(step.cache_k, dtype), jnp.asarray(step.cache_v, dtype), **case.integer_inputs())
    found = jax.block_until_ready(program(case, parts, memory)(inputs, cache))
    races = interpreter.get_races().races_found
    interpreter.reset_gpu_interpret_mode_state()
    assert not races
    return found


CASES = [
    # The ring ends within a block, its third; its four heads are a part of a tile; nothing is split.
    (ring(136, H=4, gate="head"), 1),
    # A window over three blocks and the ring's end, two in a split; two key heads; splits that have nothing to do.
    (ring(200, K=2, D=128, window=70, gate="elementwise", softcap=2.0), 2),
    *(
        pytest.param(*case, marks=slow)
        for case in (
            (ring(256, H=8), 1),
            (ring(256, H=8, K=8, window=64), 3),
            (ring(256, H=24, K=2, window=1, gate="head"), 2),  # 12 heads: two tiles of 8 rows
            (ring(136, D=256, gate="head", scale=-0.05), 2),
            (ring(520, 519, 520, 583, 2000, D=128, window=300), 3),
            (ring(1024, 1023, 1100, 5000), 1),  # more blocks than stages: each place is loaded several times
            (ring(1024, 40, 1023, 1087, D=128, K=1, H=4, softcap=5.0), 2),
            (ring(64, H=64, gate="elementwise"), 1),
            (ring(8, window=1000), 2),
            (ring(72), 2),
            (ring(72, scale=0.0), 1),
        )
    ),
]
NAMED = pytest.mark.parametrize(("case", "parts"), CASES, ids=lambda x: x if isinstance(x, int) else f"{x.C}-{x.D}")


@NAMED
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=slow)])
def test_the_step_is_the_formula_and_the_token_goes_into_its_slot(case, parts, dtype):
    """Slots that no token has reached hold NaN."""
    step = draw(case, dtype, fill=np.nan)
    o, after = run(case, parts, step, dtype)
    inputs = {name: jnp.asarray(x, dtype) for name, x in step.inputs.items()}
    cache = kernels.KVCache(jnp.asarray(step.cache_k, dtype), jnp.asarray(step.cache_v, dtype), **case.integer_inputs())
    plain, _ = kernels.decode_attention(**inputs, cache=cache, **case.options(), implementation="reference")
    assert o.dtype == jnp.dtype(dtype)
    tolerance.check({"o": o}, {"o": plain}, {"o": step.o}, dtype)
    np.testing.assert_array_equal(after.length, np.array(case.lengths) + 1)
    for found, old, new in ((after.k, step.cache_k, "k"), (after.v, step.cache_v, "v")):
        expected = old.copy()
        for b, length in enumerate(case.lengths):
            expected[b, :, length % case.C] = step.inputs[new][b]
        np.testing.assert_array_equal(tolerance.exact(found), expected)


def test_what_nobody_sees_changes_no_bit_and_two_runs_agree():
    """Empty slots, tokens behind the window and memory not yet written."""
    case, parts = CASES[1]
    outputs = []
    for fill, memory in ((0, "zero"), (np.nan, "nan"), (np.nan, "nan")):
        step = draw(case, "bfloat16", fill=fill)
        for b, length in enumerate(case.lengths):
            for p in range(max(0, length - case.C), length - case.window + 1):
                step.cache_k[b, :, p % case.C] = step.cache_v[b, :, p % case.C] = fill
        outputs.append({"o": run(case, parts, step, memory=memory)[0]})
    tolerance.same_bits(outputs[0], outputs[1])
    tolerance.same_bits(outputs[1], outputs[2])


@slow
def test_the_number_of_splits_changes_no_more_than_rounding():
    case = ring(520, 100, 519, 2000, D=128, window=400)
    step = draw(case)
    found = [tolerance.exact(run(case, parts, step, "float16")[0]) for parts in (1, 2, 5)]
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=2e-3, atol=1e-4)


def seen_blocks(length: int, C: int, limit: int) -> list[int]:
    """The blocks that hold the last `limit` tokens, from the oldest on."""
    return list(dict.fromkeys(p % C // mosaic_gpu.BLOCK for p in range(max(0, length + 1 - limit), length + 1)))


@pytest.mark.parametrize("C", [8, 64, 72, 200, 256])
def test_the_splits_share_the_blocks_that_hold_seen_tokens(C):
    lengths, blocks = np.arange(2 * C + 2, dtype=np.int32), -(-C // mosaic_gpu.BLOCK)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None, None, None))
    @functools.partial(jax.vmap, in_axes=(None, 0, None, None))
    def shares(length: Any, split: Any, limit: Any, parts: Any) -> mosaic_gpu.Share:
        return mosaic_gpu.share(length, split, mosaic_gpu.Static(C, limit, parts, 1.0, None, None))

    for limit in {min(limit, C) for limit in (1, 63, 64, 65, 130, C)}:
        expected = [seen_blocks(length, C, limit) for length in lengths.tolist()]
        assert max(map(len, expected)) <= mosaic_gpu.most_blocks(C, limit)
        for parts in (1, 2, 3, 7):
            found = shares(lengths, np.arange(parts, dtype=np.int32), np.int32(limit), np.int32(parts))
            found = jax.tree.map(lambda x: np.asarray(x).tolist(), found)
            for b, (first, starts, stops) in enumerate(zip(found.first, found.start, found.stop, strict=True)):
                steps = [n for start, stop in zip(starts, stops, strict=True) for n in range(start, stop)]
                assert [(first[0] + n) % blocks for n in steps] == expected[b], (limit, parts, b)
                sizes = [stop - start for start, stop in zip(starts, stops, strict=True)]
                assert max(sizes) - min(sizes) <= 1
            assert [slot[0] for slot in found.slot] == (lengths % C).tolist()
            assert [seen[0] for seen in found.seen] == np.minimum(lengths + 1, limit).tolist()


def finished(row: workloads.Decode, parts: int) -> int:
    """When the last of the thread blocks is done, in loads of a block: each that is done makes way for the next."""
    limit, free = min(row.C, row.window or row.C), [0] * mosaic_gpu.RESIDENT[row.D]
    for length in row.lengths:
        count = len(seen_blocks(length, row.C, limit))
        for _, part in itertools.product(range(row.K), range(parts)):
            mine = count * (part + 1) // parts - count * part // parts
            heapq.heapreplace(free, free[0] + mine + mosaic_gpu.START)
    return max(free)


def chosen(row: workloads.Decode) -> int:
    blocks = mosaic_gpu.most_blocks(row.C, min(row.C, row.window or row.C))
    return mosaic_gpu.splits(row.B, row.K, blocks, mosaic_gpu.RESIDENT[row.D])


def test_the_splits_fill_the_machine():
    for B, K, blocks in itertools.product((1, 2, 20, 150), (1, 2, 8), (1, 2, 9, 128, 512)):
        assert 1 <= mosaic_gpu.splits(B, K, blocks, 264) <= max(1, blocks // 2)
    for row in workloads.select("decode_attention", "bench", "h100"):
        if row.name != "nearly empty, B=8":  # the lengths are not known when the splits are chosen
            best = min(finished(row, parts) for parts in (1, 2, 4, 8, 11, 16, 32))
            assert finished(row, chosen(row)) <= 1.12 * best, row.name


def test_a_split_that_saw_nothing_does_not_count():
    o = jnp.stack([jnp.full((2, 3), 4.0), jnp.full((2, 3), jnp.nan), jnp.full((2, 3), 1.0)])
    lse = jnp.stack([jnp.full(2, 5.0), jnp.full(2, -jnp.inf), jnp.full(2, 6.0)])
    np.testing.assert_allclose(mosaic_gpu.combined(o, lse), np.full((2, 3), 2.0), rtol=1e-6)


def traffic(row: workloads.Decode) -> float:
    """Bytes that a step moves to and from memory, from the blocks that it visits, over the least there can be."""
    limit = min(row.C, row.window or row.C)
    parts = chosen(row)
    visited = [len(seen_blocks(length, row.C, limit)) for length in row.lengths]
    G = -(-row.H // row.K // 8) * 8
    blocks = sum(visited) * mosaic_gpu.BLOCK * row.D * 2 * 2
    # Each split that has something to do reads the queries and writes its output; all outputs are read again.
    output, lse = 4 * G * row.D, 4 * mosaic_gpu.ROWS
    each = sum(min(parts, count) for count in visited) * (2 * G * row.D + output)
    around = row.B * (2 * row.D * 2 + parts * (output + 2 * lse) + 2 * G * row.D)
    return row.K * (blocks + each + around) / row.cost().bytes


def test_a_step_moves_little_more_than_it_must():
    found = {row.name: traffic(row) for row in workloads.select("decode_attention", "bench", "h100")}
    short = found.pop("nearly empty, B=8")  # has the splits of a full ring; what they write stays in the L2 cache
    assert short < 1.6 and found and all(1 <= ratio < 1.03 for ratio in found.values()), (short, found)


def test_what_the_kernel_does_not_take_is_named():
    takes = {"B": 1, "H": 4, "K": 2, "C": 16, "D": 64, "q": "bfloat16", "ring": "bfloat16"}
    for change, said in (
        ({"q": "float32", "ring": "float32"}, "dtype float32"),
        ({"ring": "float16"}, "cache.k has dtype float16"),
        ({"ring": "int8"}, "cache.k has dtype int8"),
        ({"D": 96}, "head dim 96"),
        ({"H": 130}, "65 heads"),
        ({"C": 17}, "17 slots"),
    ):
        size = takes | change
        B, H, K, C, D = (size[name] for name in "BHKCD")
        q, k = (jnp.ones((B, heads, D), size["q"]) for heads in (H, K))
        cache = kernels.KVCache.zeros(B, K, C, D, size["ring"])
        options = {"gate": None, "window": None, "softcap": None}
        with pytest.raises(NotImplementedError, match=said):
            mosaic_gpu.decode_attention(q, k, k, cache, **options, scale=1.0)
        with dispatch.target_device(*H100), pytest.raises(NotImplementedError, match=f"'pallas' cannot run.*{said}"):
            kernels.decode_attention(q, k, k, cache, **options, implementation="pallas")
    with dispatch.target_device(*H100):
        kernels.decode_attention(q, k, k, cache, **options)  # of the last: auto takes another


def test_hopper_is_served_by_it_and_other_gpus_are_told_what_runs(monkeypatch):
    cache = kernels.KVCache.zeros(1, 1, 16, 64, jnp.bfloat16)
    x = jnp.ones((1, 1, 64), jnp.bfloat16)
    served = []
    monkeypatch.setattr(mosaic_gpu, "decode_attention", lambda *args, **options: served.append(options))
    with dispatch.target_device(*H100):
        assert kernels.implementations("decode_attention")["pallas"] is None
        kernels.decode_attention(x, x, x, cache)
        assert not served, "auto takes what has run on its device"
        kernels.decode_attention(x, x, x, cache, implementation="pallas")
        assert served == [{"gate": None, "window": None, "scale": 0.125, "softcap": None}]
    with dispatch.target_device("cuda", "NVIDIA A100-SXM4-80GB"):
        assert "'xla' runs here" in kernels.implementations("decode_attention")["pallas"]


def test_nothing():
    q, cache = jnp.ones((0, 2, 64), jnp.bfloat16), kernels.KVCache.zeros(0, 2, 16, 64, jnp.bfloat16)
    o, after = mosaic_gpu.decode_attention(q, q, q, cache, gate=None, window=None, scale=1.0, softcap=None)
    assert o.shape == q.shape and after.k.shape == cache.k.shape


def test_as_compiled_it_spills_nothing_multiplies_by_wgmma_and_copies_no_cache():
    """The committed profile: what ptxas made of it for sm_90a."""
    found = json.loads(PROFILE.read_text())["rows"]
    mine = {key: row for key, row in found.items() if key.startswith("decode_attention / ") and " / pallas / " in key}
    assert len(mine) == sum(len(row.dtypes) for row in workloads.select("decode_attention", "aot", "h100"))
    for key, row in mine.items():
        assert row["status"] == "compiled", key
        (kernel,) = row["kernels"]
        assert kernel["spill_bytes"] == kernel["local"] == kernel["mma"] == 0 and kernel["wgmma"] > 0, key
        assert kernel["blocks"] == mosaic_gpu.RESIDENT[128] // 132, key
        case = workloads.get("decode_attention", key.split(" / ")[1])
        assert row["temp_bytes"] < np.prod(case.cache_shape()) * 2 / 2, f"{key}: a ring is copied"
