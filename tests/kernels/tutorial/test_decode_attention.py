"""The steps of kernels/tutorial/decode_attention: outputs, the new cache, what they visit, documentation, messages."""

import functools
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import numpy_interpreter
from bench.verification.fast_compile import FAST_COMPILE_OPTIONS, jit_fast_compile
from dantinox import kernels, reference
from dantinox.kernels import workloads
from dantinox.kernels.dispatch import target_device
from dantinox.kernels.ops.decode_attention.kv_cache import quantize
from dantinox.kernels.tutorial import decode_attention as tutorial
from dantinox.kernels.tutorial.decode_attention import common, step3_ring_buffer
from tests.helpers import tolerance
from tests.helpers.decode_steps import Step, draw
from tests.kernels.decode_attention.test_decode_attention import row
from tests.kernels.decode_attention.test_pallas_tpu import V6E, run_with_race_detection

FOLDER = Path(common.__file__).parent
EIGHT_BITS = "eight_bit_cache"
IN_KERNEL = ("append_in_kernel", EIGHT_BITS)
STEPS = pytest.mark.parametrize("step", tutorial.STEPS)
RINGS = {  # with blocks of 16 slots, and of 128 for step 5
    "from empty to wrapped ten times": row(0, 1, 7, 8, 9, 15, 80),
    "one slot": row(0, 1, 7, C=1, H=1, K=1, D=5),
    "127 slots, grouped": row(0, 126, 127, 128, C=127, H=4, K=2),
    "129 slots, window": row(0, 5, 128, 129, 300, C=129, D=16, window=70),
    "whole blocks, window across the end": row(5, 40, 48, 100, C=48, window=11, scale=-0.3),
    "wrapped, both ends in one block": row(150, 257, 383, C=128, H=6, K=1, D=7),
    "window of one": row(0, 16, 31, 40, C=32, H=2, window=1),
    "window past C": row(30, 40, C=33, H=1, K=1, window=1000),
    "large blocks": row(40, 299, 300, 513, 700, C=300, window=140),
}
COMPILED = ("from empty to wrapped ten times", "129 slots, window")  # also interpreted by XLA, which compiles
Outputs = dict[str, Any]


def cache_of(step: str, drawn: Step, case: workloads.Decode, dtype: str) -> kernels.KVCache:
    length = np.int32(case.lengths)
    if step != EIGHT_BITS:
        return kernels.KVCache(jnp.asarray(drawn.cache_k, dtype), jnp.asarray(drawn.cache_v, dtype), length)
    (k, k_scale), (v, v_scale) = (quantize(jnp.float32(x), jnp.int8) for x in (drawn.cache_k, drawn.cache_v))
    return kernels.KVCache(k, v, length, k_scale, v_scale)


def inputs_of(drawn: Step, dtype: str) -> dict[str, jax.Array]:
    return {name: jnp.asarray(x, dtype) for name, x in drawn.inputs.items()}


@functools.cache
def function(step: str, window: int | None, scale: float | None, block: int | None = None) -> Any:
    """(inputs, cache) -> output and arrays of the new cache, by name; small blocks unless `block` is given."""
    run, block = tutorial.load_step(step), block or (128 if step == EIGHT_BITS else 16)

    def call(inputs: dict[str, jax.Array], cache: kernels.KVCache) -> Outputs:
        o, cache = run(**inputs, cache=cache, window=window, scale=scale, block=block)
        return {"o": o} | {name: x for name, x in cache._asdict().items() if x is not None}

    return call


def on_tpu(
    step: str, case: workloads.Decode, inputs: Any, cache: kernels.KVCache, run=numpy_interpreter.run
) -> Outputs:
    """The kernel for a TPU, evaluated in NumPy."""
    with target_device(*V6E):
        return run(function(step, case.window, case.scale), inputs, cache)


def in_xla(step: str, case: workloads.Decode, inputs: Any, cache: kernels.KVCache) -> Outputs:
    """The kernel that a CPU runs, interpreted by XLA."""
    return compiled(step, case.window, case.scale)(inputs, cache)


@functools.cache
def compiled(step: str, window: int | None, scale: float | None) -> Any:
    return jit_fast_compile(function(step, window, scale))


@functools.cache
def arguments(case: workloads.Decode, dtype: str, eight_bits: bool) -> tuple[Any, kernels.KVCache, Outputs, Outputs]:
    """(inputs, cache, the reference in the dtype of the arguments, and in float64)."""
    drawn = draw(case, dtype, fill=0 if eight_bits else np.nan)
    inputs, cache = inputs_of(drawn, dtype), cache_of(EIGHT_BITS if eight_bits else "", drawn, case, dtype)

    def call(inputs: dict[str, jax.Array], cache: kernels.KVCache) -> Outputs:
        o, cache = reference.decode_attention(**inputs, cache=cache, window=case.window, scale=case.scale)
        return {"o": o} | {name: x for name, x in cache._asdict().items() if x is not None}

    plain = numpy_interpreter.run(call, inputs, cache)
    with jax.enable_x64(True):
        wide = {name: jnp.asarray(tolerance.to_float64(x)) for name, x in inputs.items()}
        scales = (cache.k_scale, cache.v_scale)
        ring_buffers = [tolerance.to_float64(x) for x in (cache.k, cache.v)]
        if cache.k_scale is not None:  # the vectors that the cache represents, the new one included
            ring_buffers = [x * tolerance.to_float64(s)[..., None] for x, s in zip(ring_buffers, scales, strict=True)]
            for name in "kv":
                values, scale = quantize(jnp.float32(wide[name]), jnp.int8)
                wide[name] = jnp.asarray(tolerance.to_float64(values) * tolerance.to_float64(scale)[..., None])
        wide_cache = kernels.KVCache(*map(jnp.asarray, ring_buffers), cache.length)
        return inputs, cache, plain, numpy_interpreter.run(call, wide, wide_cache)


def assert_step_is_right(step: str, case: workloads.Decode, dtype: str, run: Any = on_tpu) -> None:
    inputs, cache, plain, exact = arguments(case, dtype, step == EIGHT_BITS)
    actual = run(step, case, inputs, cache)
    assert actual["o"].dtype == jnp.dtype(dtype) and actual["o"].shape == case.out_shape()
    tolerance.assert_within_bound({"o": actual["o"]}, {"o": plain["o"]}, {"o": exact["o"]}, dtype)
    for name in set(plain) - {"o"}:  # only the slot of the new token has changed
        assert actual[name].dtype == plain[name].dtype, name
        np.testing.assert_allclose(*(np.float64(x[name]) for x in (actual, plain)), rtol=3e-7 * ("scale" in name))


@STEPS
@pytest.mark.parametrize("name", RINGS)
@pytest.mark.sampled(32)
def test_each_step_matches_reference(step, name):
    assert_step_is_right(step, RINGS[name], "float32")


@STEPS
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n not in COMPILED else ()) for n in RINGS])
@pytest.mark.sampled(2)
def test_each_step_matches_reference_in_bfloat16(step, name):
    assert_step_is_right(step, RINGS[name], "bfloat16")


@STEPS
@pytest.mark.parametrize("name", [COMPILED[0], pytest.param(COMPILED[1], marks=pytest.mark.slow)])
@pytest.mark.sampled(4)
def test_each_step_matches_reference_on_a_cpu(step, name):
    assert_step_is_right(step, RINGS[name], "float32", in_xla)


@pytest.mark.slow
@STEPS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_default_block_size_matches_reference(step, dtype):
    case = row(100, 1000, 1500, C=1024, H=8, K=2, D=32, window=300)

    def default_blocks(step: str, case: workloads.Decode, inputs: Any, cache: kernels.KVCache) -> Outputs:
        return jax.jit(function(step, case.window, case.scale, block=256))(inputs, cache)

    assert_step_is_right(step, case, dtype, default_blocks)


@pytest.mark.slow
@pytest.mark.parametrize("step", IN_KERNEL)
def test_append_has_no_race(step):
    """On JAX's simulated TPU: no block is read after its tile has been written."""
    case = row(5, 127, 128, 300, C=256, window=150)
    assert_step_is_right(step, case, "float32", functools.partial(on_tpu, run=run_with_race_detection))


@STEPS
@pytest.mark.parametrize("name", ["from empty to wrapped ten times", "129 slots, window", "window of one"])
@pytest.mark.sampled(4)
def test_invisible_slots_do_not_affect_output(step, name):
    """Neither unused slots nor tokens before the window; NaN in scales, too."""
    case, outputs = RINGS[name], []
    drawn = draw(case)
    for fill in (0, np.nan, np.inf):
        cache = cache_of(step, drawn, case, "float32")
        length = np.array(case.lengths)[:, None]
        position = length - 1 - (length - 1 - np.arange(case.C)) % case.C  # of the token in each slot, [B, C]
        invisible = position < np.maximum(0, length + 1 - min(case.C, case.window or case.C))
        poisoned = {}
        for field in {"k", "v", "k_scale", "v_scale"} - {n for n, x in cache._asdict().items() if x is None}:
            x = np.array(getattr(cache, field))
            x[np.broadcast_to(invisible[:, None], x.shape[:3])] = fill if x.dtype != np.int8 else 127 * (fill != 0)
            poisoned[field] = jnp.asarray(x)
        outputs.append({"o": on_tpu(step, case, inputs_of(drawn, "float32"), cache._replace(**poisoned))["o"]})
    for poisoned in outputs[1:]:
        tolerance.assert_bit_equal(outputs[0], poisoned)


@STEPS
def test_two_runs_are_bit_equal(step):
    case = RINGS[COMPILED[0]]
    drawn = draw(case)
    a, b = (in_xla(step, case, inputs_of(drawn, "float32"), cache_of(step, drawn, case, "float32")) for _ in range(2))
    tolerance.assert_bit_equal(a, b)


@STEPS
@pytest.mark.parametrize("window", [pytest.param(None, marks=pytest.mark.slow), 20])
@pytest.mark.sampled(12)
def test_generation_equals_attention_over_all_tokens(step, window):
    """Starts from an empty cache and wraps around; blocks of 16 slots, and the cache ends inside one."""
    case, T = row(0, 0, C=37, D=8, window=window), 80
    rng = np.random.default_rng(0)
    q, k, v = (jnp.float32(rng.standard_normal((2, T, heads, case.D))) for heads in (case.H, case.K, case.K))
    expected = reference.attention(q, k, v, window=min(case.C, window or case.C))
    cache = kernels.KVCache.zeros(2, case.K, case.C, case.D, jnp.int8 if step == EIGHT_BITS else jnp.float32)
    with target_device(*V6E):
        run = numpy_interpreter.trace(function(step, window, None), {"q": q[:, 0], "k": k[:, 0], "v": v[:, 0]}, cache)
    for t in range(T):
        result = run({"q": q[:, t], "k": k[:, t], "v": v[:, t]}, cache)
        cache = kernels.KVCache(**{name: x for name, x in result.items() if name != "o"})
        atol = 0.05 if step == EIGHT_BITS else 2e-6
        np.testing.assert_allclose(result["o"], expected[:, t], rtol=1e-5, atol=atol, err_msg=f"token {t}")


@STEPS
@pytest.mark.sampled(2)
def test_donated_cache_is_updated_in_place(step):
    case = row(0, C=512, D=32)
    cache = kernels.KVCache.zeros(1, case.K, case.C, case.D, jnp.int8 if step == EIGHT_BITS else jnp.float32)
    inputs = {name: jnp.ones(shape) for name, shape in case.shapes().items()}
    call = function(step, None, None, block=256)
    if step in IN_KERNEL:
        donating = jax.jit(call, donate_argnums=1, compiler_options=FAST_COMPILE_OPTIONS)
        memory = donating.lower(inputs, cache).compile().memory_analysis()
        assert memory.alias_size_in_bytes >= cache.k.nbytes + cache.v.nbytes
    with target_device(*V6E):
        jaxpr = jax.make_jaxpr(call)(inputs, cache)
    (kernel,) = [equation for equation in jaxpr.eqns if equation.primitive.name == "pallas_call"]
    shapes = [kernel.invars[i].aval.shape for i, _ in kernel.params["input_output_aliases"]]
    ring_buffers = [x.shape for x in (cache.k, cache.k_scale, cache.v, cache.v_scale) if x is not None]
    assert shapes == (ring_buffers if step in IN_KERNEL else [])


@pytest.mark.parametrize("C", [1, 16, 40, 48, 65])
@pytest.mark.sampled(2)
def test_visible_blocks_hold_visible_tokens(C):
    """Against a count of the blocks of all visible positions."""
    lengths = np.arange(3 * C + 2)
    for window in {min(C, n) for n in (1, 2, 16, 17, 33, C)}:
        ring = common.Ring(C, window, 16)
        tables = _, count = [np.asarray(x) for x in step3_ring_buffer.visible_blocks(ring, jnp.asarray(lengths))]
        assert count.max() <= step3_ring_buffer.max_blocks(ring)
        for b, length in enumerate(lengths):
            expected = [p % C // 16 for p in range(max(0, length + 1 - window), length + 1)]
            steps = range(step3_ring_buffer.max_blocks(ring))
            blocks = [int(step3_ring_buffer.block_of_step(ring, b, j, *tables)) for j in steps]
            assert blocks[: count[b]] == list(dict.fromkeys(expected))
            assert set(blocks[count[b] :]) <= {blocks[count[b] - 1]}, "a skipped step repeats the last block"


Q, KV = jnp.ones((1, 4, 8)), jnp.ones((1, 2, 8))
WRONG = {
    "k has shape (1, 2, 7)": {"k": KV[..., :7]},
    "v has dtype bfloat16": {"v": KV.astype(jnp.bfloat16)},
    "q has 4 heads and k has 3": {"k": jnp.ones((1, 3, 8)), "v": jnp.ones((1, 3, 8))},
    "window is 0": {"window": 0},
    "scale is inf": {"scale": float("inf")},
    "block is 7; allowed: a multiple of": {"block": 7},
}


@STEPS
@pytest.mark.sampled(2)
def test_invalid_argument_raises_with_its_name(step):
    run, dtype = tutorial.load_step(step), jnp.int8 if step == EIGHT_BITS else jnp.float32
    cache = kernels.KVCache.zeros(1, 2, 4, 8, dtype)
    good = {"q": Q, "k": KV, "v": KV, "cache": cache}
    for message, bad in WRONG.items():
        heads = bad.get("k", KV).shape[1]
        fitting = {"cache": kernels.KVCache.zeros(1, heads, 4, 8, dtype)}
        with pytest.raises(ValueError, match=re.escape(message)):
            run(**(good | fitting | bad))
    wrong_caches = {
        "cache.v has shape": cache._replace(v=cache.v[:, :, :3]),
        "cache.length has shape": cache._replace(length=jnp.zeros(2, jnp.int32)),
        "cache has 0 slots": kernels.KVCache.zeros(1, 2, 0, 8, dtype),
    }
    for message, bad in wrong_caches.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            run(**(good | {"cache": bad}))
    for name, value in {"softcap": 2.0, "gate": Q}.items():
        with pytest.raises(NotImplementedError, match=f"no {name}"):
            run(**good, **{name: value})
    for other in {jnp.int8, jnp.float32, jnp.float8_e4m3fn, jnp.bfloat16} - {dtype}:
        with pytest.raises(NotImplementedError, match=f"this step reads {jnp.dtype(dtype)}"):
            run(**(good | {"cache": kernels.KVCache.zeros(1, 2, 4, 8, other)}))
    with target_device("cuda", "NVIDIA H100"), pytest.raises(NotImplementedError, match="this device is a gpu"):
        run(**good)
    nothing = kernels.KVCache.zeros(0, 2, 4, 8, dtype)
    o, empty = run(Q[:0], KV[:0], KV[:0], nothing)
    assert o.shape == (0, 4, 8) and empty.k.shape == nothing.k.shape


def test_eight_bit_step_checks_the_scales():
    cache = kernels.KVCache.zeros(1, 2, 4, 8, jnp.int8)
    run = tutorial.load_step(EIGHT_BITS)
    with pytest.raises(ValueError, match=r"cache\.v_scale has shape"):
        run(Q, KV, KV, cache._replace(v_scale=cache.v_scale[:, :1]))
    with pytest.raises(ValueError, match=r"cache\.k_scale is None; allowed"):
        run(Q, KV, KV, cache._replace(k_scale=None))


@STEPS
def test_steps_are_short_and_docstrings_have_six_parts(step):
    text = next(FOLDER.glob(f"step?_{step}.py")).read_text()
    assert len(text.splitlines()) < 120
    parts = re.findall(r"^(Math|Tiling|State|Traffic|Limits|Source) {2,}\S", text, re.M)
    assert parts == ["Math", "Tiling", "State", "Traffic", "Limits", "Source"]
    assert "slots ->" in text and ("░" in text) == (step != "read_everything")


def test_readme_covers_every_step_in_order():
    guide = (FOLDER / "README.md").read_text()
    positions = [guide.index(f"## {number}. `step{number}_{step}.py`") for number, step in enumerate(tutorial.STEPS, 1)]
    assert positions == sorted(positions)
