"""Checks of the Triton decode attention in Triton's interpreter: needs Triton, no GPU.

`python -m tests.helpers.triton_decode_attention NAME[=NUMBER]...` runs the named checks, or all, and prints one line
for each; it fails at the first that does not hold. The cases of single features and of pairs are those of
`bench.judge`.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from tests.helpers.triton_attention import DEVICE, dot_of_tensor_cores, run_checks  # isort: skip (sets the environment)

import jax
import jax.numpy as jnp
import numpy as np
from triton.runtime.interpreter import InterpreterBuilder

from bench.judge import triton_interpreter
from bench.verification.error_bound import bound_violations, to_float64
from dantinox import kernels
from dantinox.kernels import workloads
from dantinox.kernels.dispatch import target_device
from dantinox.kernels.ops.decode_attention.kv_cache import quantize
from dantinox.kernels.ops.decode_attention.triton import block_sizes
from tests.helpers.decode_steps import Step, draw

Array = jax.Array
EIGHT_BITS = ("int8", "float8_e4m3fn")
WITH_FLOAT8 = "gpu", "NVIDIA H100 80GB HBM3"
PARITY = workloads.select("decode_attention", "parity")


def row(*lengths: int, **sizes: Any) -> workloads.Decode:
    return workloads.Decode(name="", suites=(), devices=(), lengths=lengths, **sizes)


@contextlib.contextmanager
def small_blocks(splits: int = 3, max_rows: int = 16, block_kv: int = 16) -> Iterator[None]:
    """Let few tokens have several tiles and splits, and few queries several tiles of rows."""
    sizes = block_sizes.TritonBlockSizes(max_rows, block_kv, 4, 1)
    with (
        mock.patch.object(block_sizes, "SIZES", dict.fromkeys(block_sizes.SIZES, sizes)),
        mock.patch.object(block_sizes, "choose_num_splits", lambda *_: splits),
    ):
        yield


def interpret(
    f: Callable[..., Any],
    *args: Any,
    precision: str = "highest",
    device: tuple[str, str] = DEVICE,
    backwards: bool = False,
) -> Any:
    """Return f(*args), with the Triton kernels in the interpreter; `backwards` runs the last program first."""
    set_index = InterpreterBuilder.set_grid_idx

    def mirrored(self: Any, x: int, y: int, z: int) -> None:
        set_index(self, self.grid_dim[0] - 1 - x, y, z)

    with (
        target_device(*device),
        jax.default_matmul_precision(precision),
        np.errstate(over="ignore", invalid="ignore"),
        mock.patch.object(InterpreterBuilder, "set_grid_idx", mirrored if backwards else set_index),
    ):
        return triton_interpreter.run(f, args)


def decode(implementation: str, **options: Any) -> Callable[..., tuple[Array, kernels.KVCache]]:
    """Return a function of the inputs and the cache."""

    def run(inputs: dict[str, Array], cache: kernels.KVCache) -> tuple[Array, kernels.KVCache]:
        return kernels.decode_attention(**inputs, cache=cache, **options, implementation=implementation)

    return run


def arguments(step: Step, case: workloads.Decode, dtype: str = "float32", cache_dtype: str | None = None) -> Any:
    """Return the inputs and the cache of a step."""
    inputs = {name: jnp.asarray(x, "float32" if name == "sinks" else dtype) for name, x in step.inputs.items()}
    (k, k_scale), (v, v_scale) = (
        quantize(jnp.asarray(x, dtype), jnp.dtype(cache_dtype or dtype)) for x in (step.cache_k, step.cache_v)
    )
    return inputs, kernels.KVCache(k, v, jnp.int32(case.lengths), k_scale, v_scale)


def assert_same_cache(actual: kernels.KVCache, expected: kernels.KVCache) -> None:
    """Compare two caches bit by bit, but for NaN, which may be any."""
    for name, a, b in zip(kernels.KVCache._fields, actual, expected, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            a, b = np.asarray(a), np.asarray(b)
            assert a.dtype == b.dtype and a.shape == b.shape, name
            np.testing.assert_array_equal(a.astype(np.float32), b.astype(np.float32), err_msg=name)


def assert_right(case: workloads.Decode, *, cache_dtype: str | None = None, seed: int = 0, **how: Any) -> Any:
    """Compare a step in float32 with Python loops, or with the reference's products of an 8-bit cache."""
    step = draw(case, fill=0 if cache_dtype in EIGHT_BITS else np.nan, seed=seed)
    args = arguments(step, case, cache_dtype=cache_dtype)
    o, cache = interpret(decode("triton", **case.options()), *args, **how)
    expected, expected_cache = jax.jit(decode("reference", **case.options()))(*args)
    expected = step.o if cache_dtype is None else expected
    np.testing.assert_allclose(o, expected, rtol=2e-5, atol=3e-6, err_msg=f"{case}, {cache_dtype}")
    assert_same_cache(cache, expected_cache)
    return o, cache


def check_features() -> None:
    """Every feature, on as few tokens as give several tiles, splits and tiles of rows."""
    with small_blocks():
        assert_right(row(5, 91, C=48, H=6, K=2, D=24, window=14, new_tokens=9, gate="head", sinks=True))
        assert_right(row(0, 200, C=80, softcap=1.5, gate="elementwise"), cache_dtype="float8_e4m3fn")
        assert_right(row(30, 200, C=40, new_tokens=3, window=30, scale=-0.4, sinks=True), cache_dtype="int8")
        assert_right(row(69, 300, C=129, D=16, window=70), backwards=True)
    with small_blocks(splits=1):
        assert_right(row(0, 7, C=1, gate="elementwise"))
        assert_right(row(0, 4, 22, C=24, H=5, K=1, new_tokens=2, gate="head", sinks=True))


def check_workloads() -> None:
    """All workloads, in the tiles of a GPU too."""
    for case in PARITY:
        with small_blocks():
            assert_right(case)
        assert_right(case)
        with small_blocks(splits=1):
            assert_right(case)


def check_sizes() -> None:
    """Ring buffers of one slot, of one tile and of one more; windows of one, of all and of more."""
    with small_blocks(splits=2):
        for C in (1, 15, 16, 17, 33):
            for window in (None, 1, C, C + 5):
                assert_right(row(0, 1, C - 1, C, 3 * C + 2, C=C, H=2, K=1, D=3, window=window))
    # More tiles of rows than splits, a row tile that ends inside a token, and a share of tokens per tile of rows.
    with small_blocks(splits=2):
        assert_right(row(0, 7, 50, C=70, H=6, K=2, D=8, new_tokens=20, window=51))
        assert_right(row(3, C=64, H=5, K=1, D=8, new_tokens=33))
        # Tokens that the new ones overwrite are gone; in a trace, where lengths have no values, nothing refuses this.
        assert_right(row(35, 200, C=40, D=8, new_tokens=6))
    with small_blocks(splits=20):  # more than the kernel that combines them holds at a time
        assert_right(row(100, 500, C=400, H=2, K=1, D=8, window=390, sinks=True))
    assert_right(row(10, 300, C=300, H=32, K=1, D=130, window=100, new_tokens=5, gate="head"))
    assert_right(row(0, 257, C=256, H=1, K=1, D=1, gate="elementwise"))


def check_eight_bits() -> None:
    """Every byte of float8_e4m3fn, and caches of 8 bits for every dtype of queries, with and without conversions."""
    every = np.arange(256, dtype=np.uint8).view(jnp.float8_e4m3fn)
    finite = np.where(np.isfinite(every.astype(np.float32)), every, np.zeros_like(every))
    k, v = np.zeros((1, 1, 2, 256), every.dtype), np.stack([np.zeros_like(finite), finite])[None, None]
    scale = jnp.ones((1, 1, 2))
    cache = kernels.KVCache(jnp.asarray(k), jnp.asarray(v), jnp.int32([2]), scale, scale)
    q = jnp.zeros((1, 1, 256))
    for device in (DEVICE, WITH_FLOAT8):
        o, _ = interpret(decode("triton"), {"q": q, "k": q, "v": q}, cache, device=device)
        np.testing.assert_array_equal(o[0, 0], finite.astype(np.float32) / 2)
    with_nan = cache._replace(v=jnp.asarray(np.stack([np.zeros_like(every), every])[None, None]))
    o, _ = interpret(decode("triton"), {"q": q, "k": q, "v": q}, with_nan)
    np.testing.assert_array_equal(np.isnan(o[0, 0]), np.isnan(every.astype(np.float32)))

    with small_blocks():
        for dtype in ("float32", "bfloat16", "float16"):
            for cache_dtype in EIGHT_BITS:
                assert_within_bound(row(0, 20, 40, 133, C=40, H=4, K=2, D=16, window=33), dtype, cache_dtype)
        for device in (DEVICE, WITH_FLOAT8):
            for cache_dtype in EIGHT_BITS:
                case = row(0, 3, 40, 77, C=40, H=4, K=2, D=20, window=36, gate="head", new_tokens=5, sinks=True)
                assert_right(case, cache_dtype=cache_dtype, device=device)


def assert_within_bound(case: workloads.Decode, dtype: str, cache_dtype: str | None = None, size: float = 1.0) -> None:
    """Compare a step in any dtype with float64, by the error rule; the caches are equal."""
    step = draw(case, dtype)
    step = step._replace(cache_v=step.cache_v * size)
    args = arguments(step, case, dtype, cache_dtype)
    o, cache = interpret(decode("triton", **case.options()), *args)
    plain, expected_cache = jax.jit(decode("reference", **case.options()))(*args)
    with jax.enable_x64(True):

        def widen(path: Any, x: Any) -> Any:
            x = np.asarray(x)
            return jnp.float64(to_float64(x)) if x.dtype == dtype and "scale" not in str(path) else jnp.asarray(x)

        exact, _ = jax.jit(decode("reference", **case.options()))(*jax.tree.map_with_path(widen, args))
    assert o.dtype == jnp.dtype(dtype)
    wrong = bound_violations({"o": o}, {"o": plain}, {"o": exact}, dtype)
    assert not wrong, (case, dtype, cache_dtype, wrong)
    assert_same_cache(cache, expected_cache)


def check_dtypes() -> None:
    """16 bits by the error rule; ring buffers of another dtype than the queries."""
    for case in PARITY[::3]:
        for dtype in ("bfloat16", "float16"):
            with small_blocks():
                assert_within_bound(case, dtype)
            assert_within_bound(case, dtype)
    with small_blocks():
        for dtype, cache_dtype in (("float32", "bfloat16"), ("bfloat16", "float32"), ("float32", "float16")):
            case = row(0, 20, 90, C=40, H=4, K=2, D=16, window=30, new_tokens=2)
            assert_within_bound(case, dtype, cache_dtype)
        assert_within_bound(row(40, 90, C=40, D=16), "float16", "int8", size=1e-3)  # weights times scales are tiny


def check_tf32() -> None:
    """By default float32 is rounded to TF32: as exact as rounding, not as cutting off, and exact where asked for."""
    case = row(100, 300, C=100, H=4, K=1, D=32, window=80)
    step = draw(case)
    args, f = arguments(step, case), decode("triton", **case.options())
    with mock.patch.object(triton_interpreter, "_dot", dot_of_tensor_cores):
        rounded = interpret(f, *args, precision="default")[0]
    exact = interpret(f, *args, precision="high")[0]
    rms, exact_rms = (np.sqrt(np.mean((o - step.o) ** 2) / np.mean(step.o**2)) for o in (rounded, exact))
    assert 1e-4 < rms < 5.2e-4 and exact_rms < 1e-6, (rms, exact_rms)


def check_number_range() -> None:
    """Sums of values beyond float32, scales and soft caps at its ends, sinks of any size, the longest length."""
    case = row(5, 40, C=20, H=2, K=1, D=8)
    step = draw(case)
    for factors, dtype, options in (
        ({"v": 1e38}, "float32", {}),
        ({"v": 1e38}, "bfloat16", {"sinks": jnp.float32([0.5, -2.0])}),
        ({"q": 1e25, "k": 1e14}, "float32", {"scale": 1e-36}),
        ({"q": 1e18, "k": 1e18}, "float32", {"scale": 0.0}),
        ({"q": -1e16, "k": 1e16}, "float32", {}),
        ({"q": 1e4}, "float32", {}),  # the largest scores of two tiles are far apart
        ({"q": 9.0, "k": 9.0}, "float16", {"scale": float(np.finfo(np.float32).max), "sinks": jnp.float32([0, 9.0])}),
        ({}, "float32", {"softcap": float(np.finfo(np.float32).max)}),
        ({}, "float32", {"softcap": float(np.finfo(np.float32).tiny)}),
        ({"v": 1e-6}, "float16", {}),
    ):
        fill = np.float32(1.0)  # every vector points the same way, so that sums of products are large
        scaled = {name: np.abs(x) * factors.get(name, fill) for name, x in step.inputs.items()}
        if "q" in factors:
            scaled["q"] = np.sign(factors["q"]) * np.abs(scaled["q"])
        rings = {name: np.abs(getattr(step, f"cache_{name}")) * factors.get(name, fill) for name in "kv"}
        inputs, cache = arguments(step._replace(inputs=scaled, cache_k=rings["k"], cache_v=rings["v"]), case, dtype)
        with small_blocks(splits=2):
            o, _ = interpret(decode("triton", **options), inputs, cache)
        with jax.enable_x64(True):
            wide = lambda x: jnp.float64(to_float64(x)) if jnp.issubdtype(x.dtype, jnp.floating) else x
            exact, _ = jax.jit(decode("reference", **options))(*jax.tree.map(wide, (inputs, cache)))
        largest = np.abs(to_float64(exact)).max()
        limit = largest * 2.0 ** (-6 if dtype == "bfloat16" else -9) + 2.0**-24 * (dtype == "float16")
        assert np.abs(to_float64(o) - to_float64(exact)).max() <= limit, (factors, dtype, options)
    q = jnp.ones((1, 4, 8))
    cache = kernels.KVCache.zeros(1, 2, 4, 8, jnp.float32)
    inputs = {"q": q, "k": q[:, :2], "v": q[:, :2]}
    o, _ = interpret(decode("triton", sinks=jnp.float32([-jnp.inf, -1e30, 0, 1e30]), scale=0.0), inputs, cache)
    np.testing.assert_allclose(o[0, :, 0], [1, 1, 0.5, 0], rtol=1e-6)
    longest, short = (cache._replace(length=jnp.int32([n])) for n in (2**31 - 1, 7))
    for a, b in zip(*(jax.tree.leaves(interpret(decode("triton"), inputs, x)) for x in (longest, short)), strict=True):
        assert a.shape == (1,) or np.array_equal(a, b)


def check_hidden_slots() -> None:
    """Slots that no query sees have no effect, bit for bit, whatever they hold."""
    B, C = 4, 40
    lengths = np.array([0, 3, C, 95])
    for T, window, dtype in ((1, None, "float32"), (1, 9, "bfloat16"), (4, 9, "float32"), (4, 9, "int8")):
        case = row(*lengths, C=C, H=4, K=2, D=8, window=window, new_tokens=T, gate="head")
        hidden = np.ones((B, C), bool)
        for b, length in enumerate(lengths):
            for age in range(1, min(length, C - T, (window or C) - 1) + 1):
                hidden[b, (length - age) % C] = False
        step, outputs = draw(case), []
        queries = "float32" if dtype == "int8" else dtype
        for fill in (0.0, np.nan, np.inf, -3e38):
            inputs, cache = arguments(step, case, queries, dtype)
            names = ("k_scale", "v_scale") if dtype == "int8" else ("k", "v")
            poisoned = {}
            for name in names:
                x = getattr(cache, name)
                mask = hidden[:, None] if x.ndim == 3 else hidden[:, None, :, None]
                poisoned[name] = jnp.where(mask, jnp.asarray(fill, x.dtype), x)
            with small_blocks():
                o, new = interpret(decode("triton", **case.options()), inputs, cache._replace(**poisoned))
            outputs.append(o)
            kept = hidden.copy()  # but for those that get a token, they keep their content
            for b, length in enumerate(lengths):
                kept[b, (length + np.arange(T)) % C] = False
            for name, x in poisoned.items():
                a, b = (np.asarray(y, np.float32) for y in (getattr(new, name), x))
                where = np.broadcast_to(kept[:, None], a.shape[:3])
                np.testing.assert_array_equal(a[where], b[where])
        for o in outputs:
            assert np.isfinite(to_float64(o)).all() and np.array_equal(o, outputs[0]), (T, window, dtype)


def check_determinism() -> None:
    """Two runs are bit-equal, in whatever order the programs run."""
    for case, dtype, cache_dtype in (
        (row(0, 3, 40, 133, C=40, H=4, K=2, D=16, window=33, gate="head"), "bfloat16", "bfloat16"),
        (row(0, 3, 40, 133, C=50, H=6, K=2, D=16, window=33, new_tokens=15, sinks=True), "float32", "int8"),
    ):
        args = arguments(draw(case), case, dtype, cache_dtype)
        with small_blocks():
            runs = [interpret(decode("triton", **case.options()), *args, backwards=x) for x in (False, False, True)]
        for other in runs[1:]:
            assert jax.tree.all(jax.tree.map(np.array_equal, runs[0], other)), case


def random_case(rng: np.random.Generator) -> tuple[workloads.Decode, str | None]:
    """Return random sizes, lengths and features, and the dtype of the cache or None for that of the queries."""

    def pick(*values: Any) -> Any:
        return values[rng.integers(len(values))]

    G, K = pick(1, 1, 2, 3, 5, 8), pick(1, 2, 3)
    C = int(pick(1, 2, 13, 16, 31, 64, rng.integers(1, 90)))
    T = int(rng.integers(1, min(C, 20) + 1)) if rng.random() < 0.5 else 1
    window = pick(None, int(rng.integers(1, C + 6 if T == 1 else C - T + 2)))
    lengths = rng.integers(0, 4 * C, rng.integers(1, 4)).tolist()
    if T > 1 and window is None:  # then the ring may not wrap
        lengths = [length % (C - T + 1) for length in lengths]
    case = row(
        *lengths,
        C=C,
        H=G * K,
        K=K,
        D=int(pick(1, 8, 16, 20, rng.integers(1, 50))),
        window=window,
        gate=pick("none", "elementwise", "head"),
        softcap=pick(None, None, 1.5),
        scale=pick(None, -0.4),
        new_tokens=T,
        sinks=pick(False, True),
    )
    return case, pick(None, None, *EIGHT_BITS)


def check_random_shapes(number: int = 10) -> None:
    """Random cases in random tilings; the message of one that fails has its seed."""
    for seed in range(number):
        rng = np.random.default_rng(seed)
        case, cache_dtype = random_case(rng)
        splits, exponent = rng.integers(1, 5), rng.integers(4, 6, 2)
        tiling = {"splits": int(splits), "max_rows": 1 << int(exponent[0]), "block_kv": 1 << int(exponent[1])}
        try:
            with small_blocks(**tiling) if rng.random() < 0.8 else contextlib.nullcontext():
                assert_right(case, cache_dtype=cache_dtype, seed=seed, backwards=bool(rng.integers(2)))
        except Exception as problem:
            raise AssertionError(f"seed {seed}: {case}, cache {cache_dtype}, {tiling}") from problem
        if seed % 100 == 99:
            jax.clear_caches()


if __name__ == "__main__":
    sys.exit(run_checks(globals(), sys.argv[1:]))
