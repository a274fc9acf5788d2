"""Decode attention: the reference against Python loops, every implementation against the reference."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.verification.fast_compile import jit_fast_compile
from dantinox import kernels
from dantinox.kernels import workloads
from tests.helpers import cases, random_shapes, tolerance
from tests.helpers.decode_steps import Step, draw

IMPLEMENTATIONS = tolerance.runnable_implementations("decode_attention")
WORKLOADS = workloads.select("decode_attention", "parity")
NAMED = pytest.mark.parametrize("case", WORKLOADS, ids=lambda case: case.name)


def find(name: str) -> workloads.Decode:
    return workloads.get("decode_attention", name)


def row(*lengths: int, **sizes) -> workloads.Decode:
    return cases.make_workload(workloads.Decode, lengths=lengths, **sizes)


# A batch large enough for the scatter.
LARGE_BATCH = row(*range(0, 27, 3), window=5)


@functools.cache
def program(implementation: str, case: workloads.Decode, donate: bool = False):
    """Jitted (inputs, cache) -> (o, cache)."""

    def run(inputs: dict[str, jax.Array], cache: kernels.KVCache) -> tuple[jax.Array, kernels.KVCache]:
        with tolerance.skip_if_unsupported(implementation):
            return kernels.decode_attention(**inputs, cache=cache, **case.options(), implementation=implementation)

    return jax.jit(run, donate_argnums=(1,)) if donate else jit_fast_compile(run)


StepFunction = Callable[[dict[str, jax.Array], kernels.KVCache], tuple[jax.Array, kernels.KVCache]]


def run(
    implementation: str, case: workloads.Decode, step: Step, dtype: str, step_function: StepFunction | None = None
) -> tuple[jax.Array, kernels.KVCache]:
    """Runs one step in the given dtype, with the implementation's own program unless `step_function` is given."""
    inputs = {name: jnp.asarray(x, dtype) for name, x in step.inputs.items()}
    cache = kernels.KVCache(
        jnp.asarray(step.cache_k, dtype),
        jnp.asarray(step.cache_v, dtype),
        **case.integer_inputs(),
    )
    return (step_function or any_lengths(implementation, case))(inputs, cache)


def any_lengths(implementation: str, case: workloads.Decode) -> StepFunction:
    """One compiled program for all lengths."""
    return program(implementation, dataclasses.replace(case, lengths=(0,) * case.B))


@NAMED
@pytest.mark.sampled(4)
def test_reference_matches_python_loops(case):
    with jax.enable_x64(True):
        step = draw(case, "float64")
        o, _ = run("reference", case, step, "float64")
    np.testing.assert_allclose(o, step.o, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
@pytest.mark.parametrize("case", [*WORKLOADS, LARGE_BATCH], ids=lambda case: case.name or "large batch")
@pytest.mark.sampled(64)
def test_new_tokens_are_stored_in_their_slots_only(case, implementation):
    step = draw(case, fill=np.nan)
    _, cache = run(implementation, case, step, "float32")
    T = case.new_tokens
    np.testing.assert_array_equal(cache.length, np.array(case.lengths) + T)
    assert cache.length.dtype == jnp.int32
    for ring_buffer, old, new in ((cache.k, step.cache_k, "k"), (cache.v, step.cache_v, "v")):
        expected, tokens = old.copy(), step.inputs[new].reshape(case.B, T, case.K, case.D)
        for b, t in np.ndindex(case.B, T):
            expected[b, :, (case.lengths[b] + t) % case.C] = tokens[b, t]
        np.testing.assert_array_equal(ring_buffer, expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("case", "dtype"), cases.workload_parameters("decode_attention"))
@pytest.mark.sampled(24)
def test_implementation_matches_reference(case, dtype, implementation):
    step = draw(case, dtype)
    o, reference = (run(name, case, step, dtype)[0] for name in (implementation, "reference"))
    assert o.dtype == jnp.dtype(dtype) and o.shape == step.o.shape
    tolerance.assert_within_bound({"o": o}, {"o": reference}, {"o": step.o}, dtype)


@random_shapes.examples(40)
@given(
    implementation=st.sampled_from(IMPLEMENTATIONS),
    shape=random_shapes.shapes(20),
    lengths=st.lists(st.integers(0, 40), min_size=10, max_size=10),
    seed=st.integers(0, 99),
)
def test_random_caches_match_python_loops(implementation, shape, lengths, seed):
    H, K = shape.choice([(1, 1), (2, 1), (3, 3), (4, 2), (6, 2)]).tolist()
    pick = lambda *values: values[shape.integers(len(values))]
    lengths = lengths[: shape.integers(1, 11)]
    C = int(shape.integers(1, 13))
    T = int(shape.integers(1, min(C, 6) + 1)) if shape.integers(2) else 1
    window = pick(None, int(shape.integers(1, 16 if T == 1 else C - T + 2)))
    if T > 1 and window is None:  # then the ring may not wrap
        lengths = [length % (C - T + 1) for length in lengths]
    case = row(
        *lengths,
        C=C,
        H=H,
        K=K,
        D=int(shape.integers(1, 7)),
        window=window,
        gate=pick("none", "elementwise", "head"),
        softcap=pick(None, 1.5),
        scale=pick(None, -0.4),
        new_tokens=T,
        sinks=bool(shape.integers(2)),
    )
    step = draw(case, fill=7.0, seed=seed)
    for form, step_function in tolerance.kernel_variants(implementation, any_lengths(implementation, case)).items():
        o, cache = run(implementation, case, step, "float32", step_function)
        np.testing.assert_allclose(o, step.o, rtol=2e-5, atol=2e-6, err_msg=form)
        np.testing.assert_array_equal(cache.length, np.array(lengths) + T)
        k, v = (step.inputs[name].reshape(case.B, T, K, case.D).astype(np.float32) for name in "kv")
        for b, t in np.ndindex(case.B, T):
            slot = (lengths[b] + t) % C
            np.testing.assert_array_equal(cache.k[b, :, slot], k[b, t])
            np.testing.assert_array_equal(cache.v[b, :, slot], v[b, t])
    random_shapes.clear_programs()


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
@pytest.mark.parametrize("name", ["grouped", "window", "multi-query, head gate, cap", "129 slots"])
@pytest.mark.sampled(4)
def test_unused_slots_do_not_affect_output(name, implementation):
    case = find(name)
    outputs = [
        {"o": run(implementation, case, draw(case, fill=fill), "float32")[0]} for fill in (0, np.nan, np.inf, -np.inf)
    ]
    for poisoned in outputs[1:]:
        tolerance.assert_bit_equal(outputs[0], poisoned)


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
def test_tokens_outside_window_do_not_affect_output(implementation):
    """Old tokens that are still in the ring buffer are masked like unused slots."""
    case, outputs = find("window"), []
    for fill in (0, np.nan):
        step = draw(case)
        for b, length in enumerate(case.lengths):
            for p in range(max(0, length - case.C), length - case.window + 1):
                step.cache_k[b, :, p % case.C] = step.cache_v[b, :, p % case.C] = fill
        outputs.append({"o": run(implementation, case, step, "float32")[0]})
    tolerance.assert_bit_equal(*outputs)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.sampled(2)
def test_two_runs_are_bit_equal(implementation):
    case = find("129 slots")
    a, b = (run(implementation, case, draw(case), "bfloat16") for _ in range(2))
    tolerance.assert_bit_equal({"o": a[0], "k": a[1].k}, {"o": b[0], "k": b[1].k})


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
@pytest.mark.parametrize("window", [None, 3], ids=["no window", "window"])
@pytest.mark.sampled(4)
def test_decode_steps_equal_attention_over_all_tokens(window, implementation):
    """Starts from an empty cache, fills it and wraps around twice."""
    case, T = row(0, 0, window=window), 19
    rng = np.random.default_rng(0)
    q, k, v = (jnp.float32(rng.standard_normal((2, T, heads, case.D))) for heads in (case.H, case.K, case.K))
    expected = kernels.attention(q, k, v, window=min(case.C, window or case.C), implementation="reference")
    cache = kernels.KVCache.zeros(2, case.K, case.C, case.D, jnp.float32)
    for t in range(T):
        inputs = {"q": q[:, t], "k": k[:, t], "v": v[:, t]}
        o, cache = program(implementation, case)(inputs, cache)
        np.testing.assert_allclose(o, expected[:, t], rtol=1e-5, atol=1e-6, err_msg=f"token {t}")


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
@pytest.mark.sampled(2)
def test_donated_cache_is_updated_in_place(implementation):
    case = row(0, 0, C=1024, K=2, D=32)
    cache = kernels.KVCache.zeros(2, case.K, case.C, case.D, jnp.float32)
    inputs = {name: jnp.ones(shape) for name, shape in case.shapes().items()}
    memory = program(implementation, case, donate=True).lower(inputs, cache).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= cache.k.nbytes + cache.v.nbytes
    if implementation in kernels.IMPLEMENTATION_NAMES and implementation != "reference":  # others may be interpreted
        assert memory.temp_size_in_bytes < cache.k.nbytes + cache.v.nbytes, "the cache is copied on the way"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_cache_supports_float32_queries(implementation):
    """The returned cache keeps its own dtype."""
    case = find("grouped")
    step = draw(case, "bfloat16")
    inputs = {name: jnp.float32(x) for name, x in step.inputs.items()}
    ring_buffers = (jnp.asarray(x, jnp.bfloat16) for x in (step.cache_k, step.cache_v))
    o, cache = program(implementation, case)(inputs, kernels.KVCache(*ring_buffers, **case.integer_inputs()))
    assert o.dtype == jnp.float32 and cache.k.dtype == cache.v.dtype == jnp.bfloat16
    np.testing.assert_allclose(o, step.o, rtol=1e-5, atol=1e-6)
