"""Cached decoding: every implementation against python loops over the tokens so far, and against the rule."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels
from tests.parity import rule

IMPLEMENTATIONS = rule.runnable("decode_attention")


class Case(NamedTuple):
    """Sizes and settings of one decoding step for sequences of the given lengths."""

    C: int = 8
    H: int = 4
    K: int = 2
    D: int = 6
    gate: str = "none"
    window: int | None = None
    scale: float | None = None
    softcap: float | None = None

    @property
    def lengths(self) -> list[int]:
        """Empty, one token, one before the ring is full, full, wrapped, wrapped ten times."""
        return [0, 1, self.C - 1, self.C, self.C + 1, 2 * self.C - 1, 10 * self.C]


CASES = {
    "grouped": Case(),
    "multi-head, elementwise gate": Case(H=2, gate="elementwise"),
    "multi-query, head gate, cap": Case(H=3, K=1, gate="head", softcap=1.5),
    "window": Case(window=3, scale=0.3),
    "window of one": Case(window=1, gate="head"),
    "window past C": Case(window=100),
    "one slot": Case(C=1, gate="elementwise"),
    "129 slots": Case(C=129, D=16, window=70),
}


class Step(NamedTuple):
    """One step: what is given, in float64, and what the loops say comes out."""

    inputs: dict[str, np.ndarray]
    cache_k: np.ndarray
    cache_v: np.ndarray
    o: np.ndarray


def draw(case: Case, dtype: str = "float32", fill: float = 0) -> Step:
    """A ring filled token by token, `fill` in the slots that no token has reached, every number rounded to dtype."""
    rng = np.random.default_rng(0)
    B, H, K, D, C = len(case.lengths), case.H, case.K, case.D, case.C
    normal = lambda *shape: rule.exact(jnp.asarray(rng.standard_normal(shape), dtype))
    inputs = {"q": normal(B, H, D), "k": normal(B, K, D), "v": normal(B, K, D)}
    if case.gate != "none":
        inputs["gate"] = normal(B, H, D if case.gate == "elementwise" else 1)
    cache_k, cache_v = np.full((B, K, C, D), fill, float), np.full((B, K, C, D), fill, float)
    o = np.zeros((B, H, D))
    for b, length in enumerate(case.lengths):
        keys, values = normal(length, K, D), normal(length, K, D)
        for p in range(length):
            cache_k[b, :, p % C], cache_v[b, :, p % C] = keys[p], values[p]
        keys, values = [*keys, inputs["k"][b]], [*values, inputs["v"][b]]
        first = max(0, len(keys) - min(C, case.window or C))
        for h in range(H):
            scores = []
            for p in range(first, len(keys)):
                score = float(inputs["q"][b, h] @ keys[p][h // (H // K)])
                score *= 1 / math.sqrt(D) if case.scale is None else case.scale
                scores.append(score if case.softcap is None else case.softcap * math.tanh(score / case.softcap))
            weights = np.exp(np.array(scores) - max(scores))
            o[b, h] = sum(w * values[first + i][h // (H // K)] for i, w in enumerate(weights / weights.sum()))
            if case.gate != "none":
                o[b, h] /= 1 + np.exp(-inputs["gate"][b, h])
    return Step(inputs, cache_k, cache_v, o)


@functools.cache
def program(implementation: str, case: Case, donate: bool = False):
    """Jitted (inputs, cache) -> (o, cache)."""
    options = {name: getattr(case, name) for name in ("window", "scale", "softcap")}
    run = lambda inputs, cache: kernels.decode_attention(
        **inputs, cache=cache, **options, implementation=implementation
    )
    return jax.jit(run, donate_argnums=(1,)) if donate else jax.jit(run, compiler_options=rule.HURRY)


def run(implementation: str, case: Case, step: Step, dtype: str) -> tuple[jax.Array, kernels.KVCache]:
    """One step in the given dtype."""
    inputs = {name: jnp.asarray(x, dtype) for name, x in step.inputs.items()}
    cache = kernels.KVCache(
        jnp.asarray(step.cache_k, dtype),
        jnp.asarray(step.cache_v, dtype),
        jnp.asarray(case.lengths, jnp.int32),
    )
    return program(implementation, case)(inputs, cache)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_reference_is_the_formula(case):
    with jax.enable_x64(True):
        step = draw(case, "float64")
        o, _ = run("reference", case, step, "float64")
    np.testing.assert_allclose(o, step.o, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
@pytest.mark.parametrize("name", CASES)
def test_the_token_goes_into_its_slot_and_nothing_else_moves(name, implementation):
    case = CASES[name]
    step = draw(case, fill=np.nan)
    _, cache = run(implementation, case, step, "float32")
    np.testing.assert_array_equal(cache.length, np.array(case.lengths) + 1)
    assert cache.length.dtype == jnp.int32
    for ring, old, new in ((cache.k, step.cache_k, "k"), (cache.v, step.cache_v, "v")):
        expected = old.copy()
        for b, length in enumerate(case.lengths):
            expected[b, :, length % case.C] = step.inputs[new][b]
        np.testing.assert_array_equal(ring, expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CASES)
def test_every_implementation_keeps_the_rule(name, dtype, implementation):
    case = CASES[name]
    step = draw(case, dtype)
    mine, plain = (run(i, case, step, dtype)[0] for i in (implementation, "reference"))
    assert mine.dtype == jnp.dtype(dtype) and mine.shape == step.o.shape
    rule.check({"o": mine}, {"o": plain}, {"o": step.o}, dtype)


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
@pytest.mark.parametrize("name", ["grouped", "window", "multi-query, head gate, cap", "129 slots"])
def test_what_empty_slots_hold_reaches_nobody(name, implementation):
    case = CASES[name]
    outputs = [
        {"o": run(implementation, case, draw(case, fill=fill), "float32")[0]} for fill in (0, np.nan, np.inf, -np.inf)
    ]
    for poisoned in outputs[1:]:
        rule.same_bits(outputs[0], poisoned)


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
def test_what_lies_behind_the_window_reaches_nobody(implementation):
    """Old tokens still in the ring are as masked as empty slots."""
    case, outputs = CASES["window"], []
    for fill in (0, np.nan):
        step = draw(case)
        for b, length in enumerate(case.lengths):
            for p in range(max(0, length - case.C), length - case.window + 1):
                step.cache_k[b, :, p % case.C] = step.cache_v[b, :, p % case.C] = fill
        outputs.append({"o": run(implementation, case, step, "float32")[0]})
    rule.same_bits(*outputs)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_two_runs_are_bit_equal(implementation):
    case = CASES["129 slots"]
    a, b = (run(implementation, case, draw(case), "bfloat16") for _ in range(2))
    rule.same_bits({"o": a[0], "k": a[1].k}, {"o": b[0], "k": b[1].k})


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
@pytest.mark.parametrize("window", [None, 3])
def test_step_by_step_equals_attention_over_all_tokens(window, implementation):
    """Through an empty ring, a full one and two rounds of it, the cache handed on from step to step."""
    case, T = Case(window=window), 19
    rng = np.random.default_rng(0)
    q, k, v = (jnp.float32(rng.standard_normal((2, T, heads, case.D))) for heads in (case.H, case.K, case.K))
    expected = kernels.attention(q, k, v, window=min(case.C, window or case.C), implementation="reference")
    cache = kernels.KVCache.zeros(2, case.K, case.C, case.D, jnp.float32)
    for t in range(T):
        inputs = {"q": q[:, t], "k": k[:, t], "v": v[:, t]}
        o, cache = program(implementation, case)(inputs, cache)
        np.testing.assert_allclose(o, expected[:, t], rtol=1e-5, atol=1e-6, err_msg=f"token {t}")


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
def test_a_donated_cache_is_written_in_place(implementation):
    case = Case(C=1024, K=2, D=32)
    cache = kernels.KVCache.zeros(2, case.K, case.C, case.D, jnp.float32)
    inputs = {
        "q": jnp.ones((2, case.H, case.D)),
        "k": jnp.ones((2, case.K, case.D)),
        "v": jnp.ones((2, case.K, case.D)),
    }
    memory = program(implementation, case, donate=True).lower(inputs, cache).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= cache.k.nbytes + cache.v.nbytes
    if implementation != "reference":
        assert memory.temp_size_in_bytes < cache.k.nbytes + cache.v.nbytes, "the cache is copied on the way"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_narrow_cache_serves_wide_queries(implementation):
    """The cache may be kept in bfloat16 beside float32 queries: it comes back in its own dtype."""
    case = CASES["grouped"]
    step = draw(case, "bfloat16")
    inputs = {name: jnp.float32(x) for name, x in step.inputs.items()}
    rings = (jnp.asarray(x, jnp.bfloat16) for x in (step.cache_k, step.cache_v))
    o, cache = program(implementation, case)(inputs, kernels.KVCache(*rings, jnp.asarray(case.lengths, jnp.int32)))
    assert o.dtype == jnp.float32 and cache.k.dtype == cache.v.dtype == jnp.bfloat16
    np.testing.assert_allclose(o, step.o, rtol=1e-5, atol=1e-6)
