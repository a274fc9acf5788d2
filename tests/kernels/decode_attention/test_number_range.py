"""Decode attention at the ends of its dtypes: operands, scales, soft caps, lengths and sizes over their whole range."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import numpy_interpreter
from dantinox import kernels
from dantinox.kernels import dispatch
from dantinox.kernels.ops.decode_attention.kv_cache import QMAX, quantize
from tests.helpers import random_shapes, tolerance

FLOAT32 = jnp.finfo(jnp.float32)
DEVICES = tolerance.INTERPRETED_DEVICES
FORMS = ("reference", "xla", "pallas for a CPU", "pallas for a TPU")
B, K, G, D = 2, 1, 2, 8


class Call(NamedTuple):
    """The arrays of one call as JAX takes them; `gate`, `k_scale` and `v_scale` may be None."""

    q: Any
    k: Any
    v: Any
    cache_k: Any
    cache_v: Any
    length: Any
    gate: Any = None
    k_scale: Any = None
    v_scale: Any = None


class Expected(NamedTuple):
    """The output in float64, the largest |value| that a query sees, and the largest sum of |scaled products|."""

    o: np.ndarray
    value: np.ndarray
    score: np.ndarray


def run(form: str, call: Call, **options: Any) -> np.ndarray:
    """The output in float64; nothing is compiled."""
    implementation, _, device = form.partition(" for a ")

    def decode(call: Call) -> jax.Array:
        cache = kernels.KVCache(call.cache_k, call.cache_v, call.length, call.k_scale, call.v_scale)
        o, _ = kernels.decode_attention(
            call.q, call.k, call.v, cache, gate=call.gate, **options, implementation=implementation
        )
        return o

    with dispatch.target_device(*DEVICES[device or "CPU"]), np.errstate(all="ignore"):
        return tolerance.to_float64(numpy_interpreter.run(decode, call))


def expect(call: Call, window: int | None = None, scale: float = D**-0.5, softcap: float | None = None) -> Expected:
    """What Python loops compute in float64; an 8-bit cache stores the new token in 8 bits too."""
    x = {name: None if array is None else tolerance.to_float64(array) for name, array in call._asdict().items()}
    for name in ("k", "v"):
        if call.k_scale is not None:
            values, scales = quantize(getattr(call, name), call.cache_k.dtype)
            x[name] = tolerance.to_float64(values) * tolerance.to_float64(scales)[..., None]
            x[f"cache_{name}"] = x[f"cache_{name}"] * x[f"{name}_scale"][..., None]
    (B, H, D), (_, K, C, _) = x["q"].shape, x["cache_k"].shape
    expected = Expected(np.zeros((B, H, D)), np.zeros((B, H, 1)), np.zeros((B, H, 1)))
    for b, h in np.ndindex(B, H):
        length, head = int(x["length"][b]), h // (H // K)
        slots = [(length - age) % C for age in range(min(length + 1, C, window or C))]
        keys, values = ([x[n][b, head], *x[f"cache_{n}"][b, head, slots[1:]]] for n in "kv")
        keys, values = np.array(keys), np.array(values)
        scores = keys @ x["q"][b, h] * scale
        expected.score[b, h] = np.abs(keys * x["q"][b, h]).sum(axis=1).max() * abs(scale)
        expected.value[b, h] = np.abs(values).max()
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        with np.errstate(under="ignore"):
            weights = np.exp(scores - scores.max())
            expected.o[b, h] = weights / weights.sum() @ values
        if x["gate"] is not None:
            expected.o[b, h] /= 1 + np.exp(-x["gate"][b, h])
    return expected


def assert_right(form: str, call: Call, **options: Any) -> None:
    """Compare with float64 within what rounding of the scores and of the values allows."""
    expected, dtype, C = expect(call, **options), call.q.dtype, call.cache_k.shape[2]
    if form == "pallas for a TPU" and is_refused_on_tpu(call):
        with pytest.raises(NotImplementedError, match=r"cache has 1 slot|the cache is float16"):
            run(form, call, **options)
        return
    rounding = 16 * float(FLOAT32.eps) * expected.score
    if call.k_scale is not None or form == "reference":  # keys, or scores, that are rounded to q's dtype
        rounding += 4 * float(jnp.finfo(dtype).eps) * np.minimum(expected.score, 1e300)
    # Products of weights and values may be flushed to zero in float32, where those of float16 never are.
    smallest = float(jnp.finfo(dtype).smallest_subnormal if dtype == jnp.float16 else C * FLOAT32.tiny)
    bound = (8 * float(jnp.finfo(dtype).eps) + 4 * np.minimum(rounding, 1)) * expected.value
    error = np.abs(run(form, call, **options) - expected.o)
    bound = bound + 4 * smallest
    assert (error <= bound).all(), f"{form}: error {np.nanmax(error / bound):.3g} times the bound; options {options}"


def is_refused_on_tpu(call: Call) -> bool:
    """Whether a TPU has no registers for the cache's dtype, or cannot address its only slot."""
    sizes = [jnp.dtype(x.dtype).itemsize for x in (call.q, call.cache_k)]
    return call.cache_k.dtype == np.float16 or (call.cache_k.shape[2] == 1 and min(sizes) < 4)


def is_in_contract(form: str, call: Call, expected: Expected, scale: float) -> bool:
    """Whether the documented float32 intermediates fit: the scaled scores; the reference needs the products too."""
    limit = float(FLOAT32.max) / 4
    if form == "reference":
        return max(expected.score.max(), expected.score.max() / abs(scale)) < limit
    return call.q.dtype == jnp.float16 or expected.score.max() < limit


def numbers(rng: np.random.Generator, dtype: str, *shape: int) -> np.ndarray:
    """Random numbers about a magnitude from the smallest subnormal number to the largest finite one."""
    info = jnp.finfo(dtype)
    low, high = math.log2(float(info.smallest_subnormal)), float(info.maxexp)
    exponents = rng.uniform(low, high) + rng.uniform(-1, 1, shape) * rng.choice([0, 1, 4, 12])
    x = rng.standard_normal(shape) * 2.0 ** np.clip(exponents, low, high - 1)
    return np.asarray(np.clip(x, float(info.min), float(info.max)).astype(dtype))


def power_of_two(rng: np.random.Generator, low: int, high: int) -> float:
    return float(np.float32(2 ** rng.uniform(low, high)))


def with_cache(x: dict[str, np.ndarray], dtype: str, length: Any, gate: Any = None) -> Call:
    """A call with a cache of `dtype`, in 8 bits or the dtype of x: q [B, H, D], k and v [B, K, 1 + C, D]."""
    rings = {name: (x[name][:, :, 1:], None) for name in "kv"}
    if jnp.dtype(dtype) in QMAX:
        rings = {name: tuple(map(np.asarray, quantize(jnp.asarray(ring), dtype))) for name, (ring, _) in rings.items()}
    (k, k_scale), (v, v_scale) = rings["k"], rings["v"]
    return Call(x["q"], x["k"][:, :, 0], x["v"][:, :, 0], k, v, np.int32(length), gate, k_scale, v_scale)


@random_shapes.examples(20)
@given(
    form=st.sampled_from(FORMS),
    dtype=st.sampled_from(["float16", "float16", "bfloat16", "float32"]),
    cache=st.sampled_from(["same", "same", "int8", "float8_e4m3fn"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_output_is_right_over_the_whole_range(form, dtype, cache, seed):
    """Wherever it fits its dtype and the documented intermediates fit float32."""
    rng = np.random.default_rng(seed)
    C = int(rng.choice([1, 4, 16, 600]))
    x = {name: numbers(rng, dtype, *shape) for name, shape in
         {"q": (B, K * G, D), "k": (B, K, C + 1, D), "v": (B, K, C + 1, D)}.items()}  # fmt: skip
    gate = None if rng.random() < 0.5 else rng.uniform(-20, 20, (B, K * G, 1)).astype(dtype)
    options = {
        "window": [None, 3][rng.integers(2)],
        "scale": [D**-0.5, -1.0, power_of_two(rng, -126, 126) * rng.choice([-1, 1])][rng.integers(3)],
        "softcap": [None, None, 30.0, power_of_two(rng, -126, 127)][rng.integers(4)],
    }
    call = with_cache(x, dtype if cache == "same" else cache, rng.choice([0, 2, C - 1, C, 3 * C + 1], B), gate)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = expect(call, **options)
    if np.isfinite(expected.o).all() and is_in_contract(form, call, expected, options["scale"]):
        assert_right(form, call, **options)


def normal_numbers(dtype: str, C: int, factors: dict[str, float]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"q": (B, K * G, D), "k": (B, K, C + 1, D), "v": (B, K, C + 1, D)}
    return {name: (rng.standard_normal(shape) * factors[name]).astype(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cache", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize(("C", "size"), [(1000, 0.5), (1000, 1e-4), (16, 1e4)], ids=str)
@pytest.mark.sampled(2)
def test_values_of_an_eight_bit_cache_fit_float16(C, size, cache, form):
    """Each scaled weight is about size / 127 / C, which may be less than float16's smallest number."""
    x = normal_numbers("float16", C, {"q": 0.1, "k": 1.0, "v": size})
    x["v"] = np.abs(x["v"])
    assert_right(form, with_cache(x, cache, [C, 3 * C]))


EXTREMES = {
    "scores below -1e30": ("float32", {"q": -1e16, "k": 1e16, "v": 1.0}, {}),
    "scores near -3e38": ("float32", {"q": -1.4e19, "k": 1e19, "v": 1.0}, {"scale": 1.0}),
    "products beyond float32": ("float32", {"q": 1e25, "k": 1e15, "v": 1.0}, {"scale": 1e-36}),
    "products of bfloat16 beyond float32": ("bfloat16", {"q": 1e25, "k": 1e15, "v": 1.0}, {"scale": -1e-36}),
    "sums of values beyond float32": ("float32", {"q": 0.1, "k": 0.1, "v": 3e38}, {}),
    "the largest scale": ("float16", {"q": 100.0, "k": 100.0, "v": 1.0}, {"scale": float(FLOAT32.max)}),
    "the smallest scale": ("float16", {"q": 6e4, "k": 6e4, "v": 6e4}, {"scale": -float(FLOAT32.tiny)}),
    "scale 0": ("float32", {"q": 1e18, "k": 1e18, "v": 1.0}, {"scale": 0.0}),
    "the largest soft cap": ("float32", {"q": 1.0, "k": 1.0, "v": 1.0}, {"softcap": float(FLOAT32.max)}),
    "the smallest soft cap": ("float32", {"q": 1.0, "k": 1.0, "v": 1.0}, {"softcap": float(FLOAT32.tiny)}),
    "subnormal values": ("float16", {"q": 1.0, "k": 1.0, "v": 1e-6}, {}),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.sampled(4)
def test_extreme_numbers_give_the_exact_softmax(name, form):
    """All vectors point roughly the same way, so that sums of products are as large as they can be."""
    dtype, factors, options = EXTREMES[name]
    rng = np.random.default_rng(0)
    shapes = {"q": (B, K * G, 1), "k": (B, K, 17, 1), "v": (B, K, 17, D)}
    x = {n: (rng.uniform(0.5, 1, shape) * factors[n]).astype(dtype) for n, shape in shapes.items()}
    x |= {n: x[n].repeat(D, axis=-1) / np.asarray(D if n == "q" else 1, dtype) for n in "qk"}
    call = with_cache(x, dtype, [3, 40])
    if options.get("scale") == 0 or is_in_contract(form, call, expect(call, **options), options.get("scale", D**-0.5)):
        assert_right(form, call, **options)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.sampled(4)
def test_longest_sequence_is_read_like_a_short_one(window, form):
    """The largest int32 has no successor."""
    C, longest = 12, 2**31 - 1
    x = normal_numbers("float32", C, {"q": 1.0, "k": 1.0, "v": 1.0})
    long, short = (with_cache(x, "float32", [length, length - 1]) for length in (longest, longest % C + C))
    long = long._replace(length=jnp.asarray(long.length))
    np.testing.assert_array_equal(run(form, long, window=window), run(form, short, window=window))


@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas"])
@pytest.mark.parametrize("empty", ["B", "H", "D"])
@pytest.mark.sampled(2)
def test_sizes_of_zero_give_an_empty_output(empty, implementation):
    sizes = {"B": 2, "H": 4, "D": 8} | {empty: 0}
    b, h, d = sizes.values()
    cache = kernels.KVCache.zeros(b, 2, 4, d, jnp.float32)
    q, kv = jnp.ones((b, h, d)), jnp.ones((b, 2, d))
    o, cache = kernels.decode_attention(q, kv, kv, cache, implementation=implementation)
    assert o.shape == q.shape and cache.length.tolist() == [1] * b
    np.testing.assert_array_equal(cache.k[:, :, 0], 1)
    np.testing.assert_array_equal(cache.k[:, :, 1:], 0)


def test_no_key_value_head_is_refused_by_name():
    cache = kernels.KVCache.zeros(1, 0, 4, 8, jnp.float32)
    for H in (0, 4):
        with pytest.raises(ValueError, match=f"^q has {H} heads and k has 0; allowed: a multiple of k's heads$"):
            kernels.decode_attention(jnp.ones((1, H, 8)), jnp.ones((1, 0, 8)), jnp.ones((1, 0, 8)), cache)
