"""Decode attention on Hopper at tensor core shapes, three steps in a row: outputs, and caches bit by bit.

Calls the public function and donates the cache from step to step. On a GPU this tests the compiled kernel, large
caches before small ones and bfloat16 before float16; elsewhere small caches only, on a simulated GPU that detects
races.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import mosaic_gpu as plgpu

from bench.verification import wrong_places
from bench.verification.fast_compile import jit_fast_compile
from dantinox import kernels
from dantinox.kernels import dispatch, workloads
from dantinox.kernels.ops.decode_attention.pallas_sm90 import kernel
from tests.helpers import cases, tolerance

ON_GPU = jax.default_backend() == "gpu"
UNSUPPORTED_REASON = kernels.implementations("decode_attention")["pallas"]
pytestmark = pytest.mark.skipif(UNSUPPORTED_REASON is not None, reason=str(UNSUPPORTED_REASON))
H100 = ("cuda", "NVIDIA H100 80GB HBM3")
STEPS = 3
SLOT_AXIS = 2  # the axis of a ring buffer [B, K, C, D] along which it wraps
Cache = kernels.KVCache
Step = Callable[[dict[str, jax.Array], Cache], tuple[jax.Array, Cache]]


def kv_cache(C: int, D: int, window: int | None = None, **sizes: Any) -> workloads.Decode:
    """Two KV heads of four query heads each; lengths 0 or 63, C - 1, C and more than three times C."""
    lengths = (0, C - 1, C, 3 * C + 5) if D == 128 else (0, 63, C - 1, 3 * C + 5)
    return cases.make_workload(
        workloads.Decode, **({"C": C, "D": D, "H": 8, "K": 2, "window": window, "lengths": lengths} | sizes)
    )


# A ring buffer of whole blocks and one that ends inside a block and has fewer blocks than splits; None lets the kernel
# choose the number of splits.
LARGE = [
    *((kv_cache(4096, D), 5) for D in (128, 64, 256)),
    *((kv_cache(1000, D, 300), 2) for D in (128, 64, 256)),
    *((kv_cache(4096, D, 300), 40) for D in (128, 64, 256)),
    *((kv_cache(1000, D), 40) for D in (128, 64, 256)),
    *((kv_cache(4096, D, 1), 2) for D in (128, 64, 256)),
    *((kv_cache(1000, D, 1), 5) for D in (128, 64, 256)),
    *((kv_cache(C, 128, gate="head", softcap=5.0, scale=-0.05), None) for C in (4096, 1000)),
]
SMALL = [
    (kv_cache(136, 64, 70, H=4, lengths=(63, 3 * 136 + 5)), 2),
    (kv_cache(136, 128, H=8, lengths=(0, 135)), 5),
    (kv_cache(200, 64, 1, H=4, lengths=(198, 200)), 1),
    (kv_cache(136, 256, 100, H=4, lengths=(135, 136)), None),
]
CASES = [*itertools.product([*(LARGE if ON_GPU else ()), *SMALL], ("bfloat16",))]
CASES += itertools.product(LARGE[:6] if ON_GPU else SMALL[:2], ("float16",))
QUICK = len(CASES) if ON_GPU else 2
NAMED = [
    pytest.param(
        *(case, num_splits, dtype),
        id=f"{case.label()}, {num_splits or 'chosen'}-{dtype}",
        marks=() if n < QUICK else pytest.mark.slow,
    )
    for n, ((case, num_splits), dtype) in enumerate(CASES)
]


def random_ring_buffer(rng: np.random.Generator, case: workloads.Decode, dtype: Any) -> np.ndarray:
    """A ring buffer of random tokens; unused slots hold NaN, each with its own bits."""
    tokens = rng.standard_normal(case.cache_shape()).astype(dtype)
    payload = rng.integers(0, 2 ** (jnp.finfo(dtype).nmant - 1), case.cache_shape(), dtype=np.uint16)
    nan = (payload | np.full((), np.nan, dtype).view(np.uint16)).view(dtype)
    empty = np.arange(case.C) >= np.array(case.lengths)[:, None]
    return np.where(empty[:, None, :, None], nan, tokens)


def formula(
    case: workloads.Decode, inputs: dict[str, np.ndarray], k: np.ndarray, v: np.ndarray, length: Any
) -> np.ndarray:
    """The output in float64, from ring buffers that hold the new token; `length` counts the tokens before it."""
    q, k, v, o = (
        tolerance.to_float64(inputs["q"]),
        tolerance.to_float64(k),
        tolerance.to_float64(v),
        np.zeros(case.out_shape()),
    )
    for b, newest in enumerate(length.tolist()):
        slots = np.arange(max(0, newest + 1 - min(case.C, case.window or case.C)), newest + 1) % case.C
        for h in range(case.H):
            keys, values = (x[b, h // (case.H // case.K), slots] for x in (k, v))
            scores = keys @ q[b, h] * (case.D**-0.5 if case.scale is None else case.scale)
            if case.softcap is not None:
                scores = case.softcap * np.tanh(scores / case.softcap)
            weights = np.exp(scores - scores.max())
            o[b, h] = weights / weights.sum() @ values
    return o if case.gate == "none" else o / (1 + np.exp(-tolerance.to_float64(inputs["gate"])))


@functools.cache
def reference(case: workloads.Decode) -> Step:
    """The reference in the dtype of its arguments, compiled once for all lengths."""
    return jit_fast_compile(functools.partial(attend, case, "reference"))


def attend(case: workloads.Decode, implementation: str, inputs: dict[str, jax.Array], cache: Cache) -> Any:
    return kernels.decode_attention(**inputs, cache=cache, **case.options(), implementation=implementation)


@contextlib.contextmanager
def sm90_step(case: workloads.Decode, num_splits: int | None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The jitted step, which donates the cache, with `num_splits` splits; on a simulated GPU if there is none."""
    forced = {"num_splits": num_splits}
    if not ON_GPU:
        forced["interpret"] = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")
    with monkeypatch.context() as patch, contextlib.nullcontext() if ON_GPU else dispatch.target_device(*H100):
        patch.setattr(kernel, "decode_attention", functools.partial(kernel.decode_attention, **forced))
        yield jax.jit(functools.partial(attend, case, "pallas"), donate_argnums=1)


def buffer_pointers(cache: Cache) -> set[int]:
    return {x.unsafe_buffer_pointer() for x in (cache.k, cache.v)}


def has_races() -> bool:
    races_found = interpreter.get_races().races_found
    interpreter.reset_gpu_interpret_mode_state()
    return races_found


def faults(
    case: workloads.Decode,
    dtype: Any,
    o: jax.Array,
    exact_o: np.ndarray,
    reference_o: jax.Array,
    cache: Cache,
    expected_cache: dict,
):
    """One line if the output exceeds the error bound, and one per array of the cache that has a wrong bit."""
    wrong = tolerance.bound_violations({"o": o}, {"o": reference_o}, {"o": exact_o}, dtype)
    for name, expected in expected_cache.items():
        axis = SLOT_AXIS if expected.ndim > 1 else None
        if difference := wrong_places.different_bits(getattr(cache, name), expected, axis):
            wrong.append(f"cache.{name}: {difference}")
    return wrong


@pytest.mark.parametrize(("case", "num_splits", "dtype"), NAMED)
@pytest.mark.sampled(4)
def test_three_decode_steps_match_reference_at_tensor_core_sizes(case, num_splits, dtype, monkeypatch):
    rng, dtype = np.random.default_rng(0), jnp.dtype(dtype)
    expected = {"k": random_ring_buffer(rng, case, dtype), "v": random_ring_buffer(rng, case, dtype)}
    expected["length"] = np.int32(case.lengths)
    cache = Cache(**{name: jnp.array(x) for name, x in expected.items()})
    with sm90_step(case, num_splits, monkeypatch) as step:
        for t in range(STEPS):
            inputs = {name: rng.standard_normal(shape).astype(dtype) for name, shape in case.shapes().items()}
            reference_o, _ = reference(case)(inputs, Cache(**{name: jnp.array(x) for name, x in expected.items()}))
            pointers = buffer_pointers(cache)
            o, cache = jax.block_until_ready(step(inputs, cache))
            assert ON_GPU or not has_races(), f"step {t}"
            assert not ON_GPU or buffer_pointers(cache) == pointers, f"step {t}: the cache was copied"
            for b, length in enumerate(expected["length"]):
                for name in "kv":
                    expected[name][b, :, length % case.C] = inputs[name][b]
            exact_o = formula(case, inputs, expected["k"], expected["v"], expected["length"])
            expected["length"] = expected["length"] + 1
            if wrong := faults(case, dtype, o, exact_o, reference_o, cache, expected):
                raise AssertionError("\n".join([f"step {t}", *wrong]))
