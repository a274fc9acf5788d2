"""Hopper's decoding at sizes of tensor cores, three steps in a row: outputs by the rule, rings bit by bit.

Through the public face, the cache donated from step to step. On a GPU this is the compiled kernel, large rings before
small ones and bfloat16 before float16; elsewhere small rings only, on a simulated GPU that watches for races.
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

from bench import wrong_places
from dantinox import kernels
from dantinox.kernels import dispatch, workloads
from dantinox.kernels.ops.decode_attention.pallas_sm90 import kernel
from tests.helpers import cases, tolerance

ON_GPU = jax.default_backend() == "gpu"
WHY = kernels.implementations("decode_attention")["pallas"]
pytestmark = pytest.mark.skipif(WHY is not None, reason=str(WHY))
H100 = ("cuda", "NVIDIA H100 80GB HBM3")
STEPS = 3
SLOTS = 2  # the axis of a ring [B, K, C, D] along which it turns
Cache = kernels.KVCache
Step = Callable[[dict[str, jax.Array], Cache], tuple[jax.Array, Cache]]


def ring(C: int, D: int, window: int | None = None, **sizes: Any) -> workloads.Decode:
    """Two key heads of four queries each; rings empty or with a block of tokens, about to turn or full, turned."""
    lengths = (0, C - 1, C, 3 * C + 5) if D == 128 else (0, 63, C - 1, 3 * C + 5)
    return cases.row(
        workloads.Decode, **({"C": C, "D": D, "H": 8, "K": 2, "window": window, "lengths": lengths} | sizes)
    )


# A ring of whole blocks and one that ends within a block, and that has fewer blocks than splits; None: as many splits
# as the kernel chooses.
LARGE = [
    *((ring(4096, D), 5) for D in (128, 64, 256)),
    *((ring(1000, D, 300), 2) for D in (128, 64, 256)),
    *((ring(4096, D, 300), 40) for D in (128, 64, 256)),
    *((ring(1000, D), 40) for D in (128, 64, 256)),
    *((ring(4096, D, 1), 2) for D in (128, 64, 256)),
    *((ring(1000, D, 1), 5) for D in (128, 64, 256)),
    *((ring(C, 128, gate="head", softcap=5.0, scale=-0.05), None) for C in (4096, 1000)),
]
SMALL = [
    (ring(136, 64, 70, H=4, lengths=(63, 3 * 136 + 5)), 2),
    (ring(136, 128, H=8, lengths=(0, 135)), 5),
    (ring(200, 64, 1, H=4, lengths=(198, 200)), 1),
    (ring(136, 256, 100, H=4, lengths=(135, 136)), None),
]
CASES = [*itertools.product([*(LARGE if ON_GPU else ()), *SMALL], ("bfloat16",))]
CASES += itertools.product(LARGE[:6] if ON_GPU else SMALL[:2], ("float16",))
QUICK = len(CASES) if ON_GPU else 2
NAMED = [
    pytest.param(
        *(case, parts, dtype),
        id=f"{case.label()}, {parts or 'chosen'}-{dtype}",
        marks=() if n < QUICK else pytest.mark.slow,
    )
    for n, ((case, parts), dtype) in enumerate(CASES)
]


def filled(rng: np.random.Generator, case: workloads.Decode, dtype: Any) -> np.ndarray:
    """A ring of random tokens; slots that none has reached hold NaN, each with bits of its own."""
    tokens = rng.standard_normal(case.cache_shape()).astype(dtype)
    payload = rng.integers(0, 2 ** (jnp.finfo(dtype).nmant - 1), case.cache_shape(), dtype=np.uint16)
    nan = (payload | np.full((), np.nan, dtype).view(np.uint16)).view(dtype)
    empty = np.arange(case.C) >= np.array(case.lengths)[:, None]
    return np.where(empty[:, None, :, None], nan, tokens)


def formula(
    case: workloads.Decode, inputs: dict[str, np.ndarray], k: np.ndarray, v: np.ndarray, length: Any
) -> np.ndarray:
    """The output in float64, from rings that hold the new token already; `length` counts the tokens before it."""
    q, k, v, o = tolerance.exact(inputs["q"]), tolerance.exact(k), tolerance.exact(v), np.zeros(case.out_shape())
    for b, newest in enumerate(length.tolist()):
        slots = np.arange(max(0, newest + 1 - min(case.C, case.window or case.C)), newest + 1) % case.C
        for h in range(case.H):
            keys, values = (x[b, h // (case.H // case.K), slots] for x in (k, v))
            scores = keys @ q[b, h] * (case.D**-0.5 if case.scale is None else case.scale)
            if case.softcap is not None:
                scores = case.softcap * np.tanh(scores / case.softcap)
            weights = np.exp(scores - scores.max())
            o[b, h] = weights / weights.sum() @ values
    return o if case.gate == "none" else o / (1 + np.exp(-tolerance.exact(inputs["gate"])))


@functools.cache
def plain(case: workloads.Decode) -> Step:
    """The reference in the dtype of its arguments, one program for all lengths."""
    return tolerance.quick(functools.partial(attend, case, "reference"))


def attend(case: workloads.Decode, implementation: str, inputs: dict[str, jax.Array], cache: Cache) -> Any:
    return kernels.decode_attention(**inputs, cache=cache, **case.options(), implementation=implementation)


@contextlib.contextmanager
def hopper(case: workloads.Decode, parts: int | None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The jitted step, which takes the cache's memory, with so many splits; on a simulated GPU where there is none."""
    forced = {"parts": parts}
    if not ON_GPU:
        forced["interpret"] = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")
    with monkeypatch.context() as patch, contextlib.nullcontext() if ON_GPU else dispatch.target_device(*H100):
        patch.setattr(kernel, "decode_attention", functools.partial(kernel.decode_attention, **forced))
        yield jax.jit(functools.partial(attend, case, "pallas"), donate_argnums=1)


def places(cache: Cache) -> set[int]:
    return {x.unsafe_buffer_pointer() for x in (cache.k, cache.v)}


def races() -> bool:
    found = interpreter.get_races().races_found
    interpreter.reset_gpu_interpret_mode_state()
    return found


def faults(
    case: workloads.Decode, dtype: Any, o: jax.Array, right: np.ndarray, about: jax.Array, cache: Cache, rings: dict
):
    """A line for the output where it breaks the rule, and for each array of the cache of which a bit is wrong."""
    wrong = tolerance.faults({"o": o}, {"o": about}, {"o": right}, dtype)
    for name, expected in rings.items():
        axis = SLOTS if expected.ndim > 1 else None
        if said := wrong_places.different_bits(getattr(cache, name), expected, axis):
            wrong.append(f"cache.{name}: {said}")
    return wrong


@pytest.mark.parametrize(("case", "parts", "dtype"), NAMED)
def test_three_steps_keep_the_rule_and_write_one_slot_of_each_ring(case, parts, dtype, monkeypatch):
    rng, dtype = np.random.default_rng(0), jnp.dtype(dtype)
    rings = {"k": filled(rng, case, dtype), "v": filled(rng, case, dtype), "length": np.int32(case.lengths)}
    cache = Cache(**{name: jnp.array(x) for name, x in rings.items()})
    with hopper(case, parts, monkeypatch) as step:
        for turn in range(STEPS):
            inputs = {name: rng.standard_normal(shape).astype(dtype) for name, shape in case.shapes().items()}
            about, _ = plain(case)(inputs, Cache(**{name: jnp.array(x) for name, x in rings.items()}))
            before = places(cache)
            o, cache = jax.block_until_ready(step(inputs, cache))
            assert ON_GPU or not races(), f"step {turn}"
            assert not ON_GPU or places(cache) == before, f"step {turn}: the cache has moved"
            for b, length in enumerate(rings["length"]):
                for name in "kv":
                    rings[name][b, :, length % case.C] = inputs[name][b]
            right = formula(case, inputs, rings["k"], rings["v"], rings["length"])
            rings["length"] = rings["length"] + 1
            if wrong := faults(case, dtype, o, right, about, cache, rings):
                raise AssertionError("\n".join([f"step {turn}", *wrong]))
