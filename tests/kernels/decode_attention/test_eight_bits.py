"""Decode attention with an 8-bit KV cache: quantization, and the output computed from it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import numpy_interpreter
from dantinox import kernels
from dantinox.kernels.dispatch import target_device
from dantinox.kernels.ops.decode_attention.kv_cache import QMAX, dequantize, quantize
from dantinox.kernels.ops.decode_attention.pallas_tpu import block_sizes
from tests.helpers import tolerance
from tests.helpers.decode_steps import Step, draw
from tests.kernels.decode_attention.test_decode_attention import IMPLEMENTATIONS, find, program, row
from tests.kernels.decode_attention.test_pallas_tpu import run_with_race_detection

ALL = ["reference", *IMPLEMENTATIONS]
DTYPES = pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
CASES = ["grouped", "window", "multi-query, head gate, cap", "129 slots"]


def quantized_cache(step: Step, case, dtype: str) -> kernels.KVCache:
    """The step's cache in 8 bits."""
    k, v = (quantize(jnp.float32(x), dtype) for x in (step.cache_k, step.cache_v))
    return kernels.KVCache(k[0], v[0], case.integer_inputs()["length"], k[1], v[1])


def run(implementation: str, case, step: Step, cache: kernels.KVCache) -> tuple[jax.Array, kernels.KVCache]:
    return program(implementation, case)({name: jnp.float32(x) for name, x in step.inputs.items()}, cache)


@DTYPES
@pytest.mark.sampled(2)
def test_quantize_rounds_to_nearest(dtype):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((50, 16)) * 10.0 ** rng.integers(-6, 6, (50, 1))
    x[0], x[1, 1:] = 0, 0
    values, scales = (np.asarray(x, np.float64) for x in quantize(jnp.float32(x), dtype))
    qmax = QMAX[jnp.dtype(dtype)]
    grid = np.arange(-127, 128) if dtype == "int8" else np.arange(256, dtype=np.uint8).view(jnp.float8_e4m3fn)
    grid = grid.astype(np.float64)
    grid = grid[np.isfinite(grid)]
    for vector, stored, scale in zip(np.float32(x).astype(float), values, scales, strict=True):
        assert scale == pytest.approx(np.abs(vector).max() / qmax, rel=1e-6)
        nearest = np.abs(vector[:, None] - grid * scale).min(axis=1)
        np.testing.assert_allclose(np.abs(vector - stored * scale), nearest, atol=1e-5 * np.abs(vector).max())
    np.testing.assert_array_equal(dequantize(*quantize(jnp.float32(x[:1]), dtype), jnp.float32), 0)


@DTYPES
@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.sampled(40)
def test_output_matches_dequantized_cache(name, implementation, dtype):
    """In float64, with the new token quantized as the others are."""
    case = find(name)
    step = draw(case)
    cache = quantized_cache(step, case, dtype)
    o, _ = run(implementation, case, step, cache)
    with jax.enable_x64(True):
        exact = lambda values, scale: jnp.asarray(np.asarray(values, np.float64) * np.asarray(scale)[..., None])
        rounded = {name: exact(*quantize(jnp.float32(step.inputs[name]), dtype)) for name in ("k", "v")}
        inputs = {name: jnp.asarray(x) for name, x in (step.inputs | rounded).items()}
        full = kernels.KVCache(exact(cache.k, cache.k_scale), exact(cache.v, cache.v_scale), cache.length)
        expected, _ = program("reference", case)(inputs, full)
    np.testing.assert_allclose(o, expected, rtol=2e-5, atol=2e-6)
    # The error against the unquantized output is that of 8 bits, and not zero.
    error = np.abs(np.asarray(o) - step.o).max() / np.abs(step.o).max()
    assert 1e-5 < error < (0.02 if dtype == "int8" else 0.1)


@DTYPES
@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.sampled(4)
def test_new_token_is_stored_in_its_slot_only(implementation, dtype):
    case = row(*range(0, 27, 3), window=5)  # a batch large enough for the scatter
    step = draw(case)
    old_cache = quantized_cache(step, case, dtype)
    _, new_cache = run(implementation, case, step, old_cache)
    np.testing.assert_array_equal(new_cache.length, np.array(case.lengths) + 1)
    for name in ("k", "v"):
        values, scale = quantize(jnp.float32(step.inputs[name]), dtype)
        for field, new in ((name, values), (f"{name}_scale", scale)):
            expected = np.array(getattr(old_cache, field), np.float32)
            for b, length in enumerate(case.lengths):
                expected[b, :, length % case.C] = np.asarray(new, np.float32)[b]
            written = getattr(new_cache, field)
            assert written.dtype == getattr(old_cache, field).dtype
            np.testing.assert_array_equal(np.asarray(written, np.float32), expected)


@DTYPES
@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.sampled(24)
def test_unused_slots_do_not_affect_output(name, implementation, dtype):
    case = find(name)
    step, outputs = draw(case), []
    lengths = np.array(case.lengths)
    unused = np.arange(case.C)[None] >= lengths[:, None]  # [B, C]
    for value, scale in ((0, 0.0), (127, np.nan), (-127, np.inf)):
        cache = quantized_cache(step, case, dtype)
        if dtype != "int8" and value:
            value = np.nan
        filled = {
            f"{name}{kind}": jnp.where(unused[:, None, :, *([None] * (kind == ""))], fill, x).astype(x.dtype)
            for name in ("k", "v")
            for kind, fill in (("", value), ("_scale", scale))
            for x in [getattr(cache, f"{name}{kind}")]
        }
        outputs.append({"o": run(implementation, case, step, cache._replace(**filled))[0]})
    for poisoned in outputs[1:]:
        tolerance.assert_bit_equal(outputs[0], poisoned)


@pytest.mark.parametrize(
    "run_on_tpu",
    [
        pytest.param(numpy_interpreter.run, id="numpy"),
        pytest.param(run_with_race_detection, id="race detector", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("D", [6, 128], ids=["tokens in lanes", "head dim in lanes"])
def test_tpu_kernel_appends_values_and_scales(D, dtype, run_on_tpu, monkeypatch):
    """The kernel writes only the memory tiles of the new token and of its scales."""
    case = row(5, 100, 256, 900, C=256, D=D, window=150, gate="elementwise")
    monkeypatch.setattr(block_sizes, "choose_block_size", lambda *_: 128)
    step = draw(case)
    cache = quantized_cache(step, case, dtype)
    inputs = {key: jnp.float32(x) for key, x in step.inputs.items()}
    operation = lambda inputs, cache: kernels.decode_attention(
        **inputs, cache=cache, **case.options(), implementation="pallas"
    )
    with target_device("tpu", "TPU v6 lite"):
        o, new_cache = run_on_tpu(operation, inputs, cache)
    reference, expected = run("reference", case, step, cache)
    np.testing.assert_allclose(o, reference, rtol=2e-5, atol=2e-6)
    for actual, desired in zip(new_cache, expected, strict=True):
        np.testing.assert_allclose(np.asarray(actual, np.float32), np.asarray(desired, np.float32), rtol=1e-6)


def test_invalid_scales_raise_with_their_name():
    cache = kernels.KVCache.zeros(1, 2, 4, 8, jnp.int8)
    assert cache.k_scale.shape == (1, 2, 4) and kernels.KVCache.zeros(1, 2, 4, 8, jnp.bfloat16).v_scale is None
    q, kv = jnp.zeros((1, 2, 8)), jnp.zeros((1, 2, 8))
    for message, bad in {
        "cache.k_scale is None": cache._replace(k_scale=None),
        "cache.v_scale has shape": cache._replace(v_scale=cache.v_scale[:, :1]),
        "cache.v_scale has dtype": cache._replace(v_scale=cache.v_scale.astype(jnp.bfloat16)),
        "cache.v has dtype": cache._replace(v=cache.v.astype(jnp.float32)),
        "cache.k_scale is given": cache._replace(k=cache.k.astype(jnp.float32), v=cache.v.astype(jnp.float32)),
    }.items():
        with pytest.raises(ValueError, match=f"^{message}.*; allowed"):
            kernels.decode_attention(q, kv, kv, bad)
