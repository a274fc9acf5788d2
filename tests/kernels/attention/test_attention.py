"""Attention: the reference against Python loops, every implementation against the reference."""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bench.verification import error_bound
from dantinox import kernels, reference
from dantinox.kernels import workloads
from dantinox.kernels.ops.attention import xla
from tests.helpers import cases, random_shapes, tolerance

IMPLEMENTATIONS = tolerance.runnable_implementations("attention")
CANCELLATION = error_bound.CANCELLATION_ULPS * float(jnp.finfo(jnp.float32).eps)


def loops(
    q, k, v, gate=None, sinks=None, *, causal=True, window=None, scale=None, softcap=None, segment_ids=None,
    return_lse=False,
):  # fmt: skip
    """The formula, one query and one key at a time, in float64; with `return_lse` the array of `join_lse`."""
    (B, T, H, D), (_, S, K, Dv) = q.shape, v.shape
    if segment_ids is not None and not isinstance(segment_ids, tuple):
        segment_ids = (segment_ids, segment_ids)
    o, lse = np.zeros((B, T, H, Dv)), np.zeros((B, T, H, 1))
    for b, t, h in np.ndindex(B, T, H):
        scores, values = ([], []) if sinks is None else ([sinks[h]], [np.zeros(Dv)])
        for s in range(S):
            distance = (S - T + t) - s
            if (causal and distance < 0) or (window is not None and distance >= window):
                continue
            if segment_ids is not None and segment_ids[0][b, t] != segment_ids[1][b, s]:
                continue
            score = float(q[b, t, h] @ k[b, s, h // (H // K)]) * (1 / math.sqrt(D) if scale is None else scale)
            scores.append(score if softcap is None else softcap * math.tanh(score / softcap))
            values.append(v[b, s, h // (H // K)])
        if scores:
            weights = [math.exp(score - max(scores)) for score in scores]
            o[b, t, h] = sum(w * value for w, value in zip(weights, values, strict=True)) / sum(weights)
            lse[b, t, h] = max(scores) + math.log(sum(weights))
            if gate is not None:
                o[b, t, h] *= 1 / (1 + np.exp(-gate[b, t, h]))
    return np.concatenate([o, lse], axis=-1) if return_lse else o


row = cases.attention


def directional_derivatives(
    case: workloads.Attention,
    inputs: dict,
    aux: dict,
    dout: np.ndarray,
    result: dict,
    by_hand: float | None = None,
    **options: bool,
) -> tuple[float, float]:
    """The gradient along one random direction: (as computed, by the loops, unless that is given)."""
    direction = {name: np.random.default_rng(1).standard_normal(x.shape) for name, x in inputs.items()}
    along = sum(np.sum(tolerance.to_float64(result[f"d{name}"]) * direction[name]) for name in inputs)
    if by_hand is None:
        by_hand = tolerance.directional_derivative(
            lambda **x: loops(**x, **aux, **case.options(), **options), inputs, direction, dout
        )
    return along, by_hand


TINY = {
    "causal": row(5, 5, B=2),
    "one key": row(1, 1),
    "grouped, elementwise gate": row(4, 6, H=6, K=2, gate="elementwise"),
    "multi-query, head gate, soft cap": row(5, 5, H=3, K=1, gate="head", softcap=1.5),
    "more queries than keys, window": row(7, 3, window=2, gate="head"),
    "window of one": row(4, 5, window=1),
    "full, scale": row(3, 5, causal=False, scale=-0.7),
    "segments": row(9, 9, B=2, segments="packed", window=3),
    "segments without a match": row(4, 9, B=2, segments="unmatched", causal=False),
}


@pytest.mark.parametrize("case", TINY.values(), ids=TINY)
@pytest.mark.sampled(4)
def test_reference_matches_python_loops(case):
    inputs, aux, dout = cases.draw(case)
    with jax.enable_x64(True):
        result = tolerance.program("attention", "reference", cases.options(case))(inputs, aux, dout)
    np.testing.assert_allclose(result["o"], loops(**inputs, **aux, **case.options()), rtol=1e-12, atol=1e-13)
    along, by_hand = directional_derivatives(case, inputs, aux, dout, result)
    assert along == pytest.approx(by_hand, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("case", "dtype"), cases.workload_parameters("attention"))
@pytest.mark.sampled(48)
def test_implementation_matches_reference(case, dtype, implementation):
    inputs, aux, dout = cases.draw(case)
    small = case.T * case.S < 2**18
    options = cases.options(case)
    result = tolerance.assert_matches_reference(
        "attention", implementation, inputs, dout, dtype, aux=aux, options=options, fast_compile=small
    )
    if case.T > case.S and case.causal:
        for name in ("o", "dq", *(["dgate"] if case.gate != "none" else [])):
            assert not np.any(result[name][:, : case.T - case.S]), f"{name}: a query that sees no key"


def assert_matches_loops(
    case: workloads.Attention, *runs: Callable[..., Any], seed: int = 0, return_lse: bool = False
) -> None:
    """Output and gradients of programs in float32 against the loops."""
    inputs, aux, dout = cases.draw(case, seed)
    if return_lse:
        dlse = np.random.default_rng(seed + 1).standard_normal((*dout.shape[:-1], 1))
        dout = np.concatenate([dout, dlse], axis=-1)
    inputs = {name: x.astype(np.float32).astype(np.float64) for name, x in inputs.items()}
    inputs_f32 = {name: jnp.float32(x) for name, x in inputs.items()}
    o, by_hand = loops(**inputs, **aux, **case.options(), return_lse=return_lse), None
    for run in runs:
        result = run(inputs_f32, aux, jnp.float32(dout))
        np.testing.assert_allclose(result["o"], o, rtol=2e-5, atol=2e-6)
        along, by_hand = directional_derivatives(case, inputs, aux, dout, result, by_hand, return_lse=return_lse)
        assert along == pytest.approx(by_hand, rel=1e-4, abs=1e-3)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@random_shapes.examples(12)
@given(
    sizes=st.tuples(st.integers(1, 12), st.integers(1, 24)),
    heads=st.sampled_from([(1, 1), (2, 1), (2, 2), (3, 1), (4, 2), (6, 3)]),
    B=st.integers(1, 2),
    D=st.integers(1, 6),
    gate=st.sampled_from(["none", "elementwise", "head"]),
    segments=st.sampled_from([None, "packed", "separate", "unmatched"]),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 26),
    softcap=st.none() | st.floats(1, 4),
    scale=st.none() | st.floats(-1, 1, width=32, allow_subnormal=False),
    Dv=st.none() | st.integers(1, 6),
    sinks=st.booleans(),
    return_lse=st.booleans(),
    seed=st.integers(0, 99),
)
@example(  # a window of more than all keys
    sizes=(3, 4), heads=(2, 1), B=1, D=3, gate="head", segments=None, causal=True, window=6, softcap=None, scale=None,
    Dv=2, sinks=True, return_lse=True, seed=0,
)  # fmt: skip
@pytest.mark.sampled(2)
def test_random_shapes_match_python_loops(
    implementation, sizes, heads, B, D, gate, segments, causal, window, softcap, scale, Dv, sinks, return_lse, seed
):
    (T, S), (H, K) = sizes, heads
    S, window = T if segments == "packed" else S, window if causal else None
    case = row(T, S, B=B, H=H, K=K, D=D, Dv=Dv, gate=gate, segments=segments, causal=causal, window=window,
               softcap=softcap, scale=scale, sinks=sinks)  # fmt: skip
    with contextlib.suppress(pytest.skip.Exception):  # of one shape, not of all
        options = (*cases.options(case), ("return_lse", return_lse))
        compiled = tolerance.program("attention", implementation, options)
        variants = tolerance.kernel_variants(implementation, compiled).values()
        assert_matches_loops(case, *variants, seed=seed, return_lse=return_lse)
    random_shapes.clear_programs()


CHUNKED = {
    "fewer queries": row(9, 12, H=4, softcap=2.0, gate="head"),
    "more queries, wide window": row(9, 7, window=5),
    "segments": row(9, 9, B=2, segments="packed"),
    "full, pair": row(9, 12, B=2, segments="separate", causal=False),
}


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=name, marks=pytest.mark.slow if "," in name else ()) for name, case in CHUNKED.items()],
)
@pytest.mark.sampled(24)
def test_chunked_scores_match_python_loops(case, monkeypatch):
    """The chunked path for long sequences, on short ones that `loops` can check: five chunks of two one-row blocks."""
    monkeypatch.setattr(xla, "MAX_DENSE_SCORES", 0)
    monkeypatch.setattr(xla, "CHUNK_BLOCK_Q", 1)
    # Bypass the cache of programs: its key does not include these two numbers.
    assert_matches_loops(case, tolerance.program.__wrapped__("attention", "xla", cases.options(case)))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("T", "S", "options"), [(40, 40, {"window": 1}), (6, 1, {"causal": False})], ids=["window of one", "one key"]
)
@pytest.mark.sampled(4)
def test_queries_of_one_key_have_no_gradient(T, S, options, implementation):
    """The weight is 1 whatever q and k are: both terms of its score's gradient are equal, in bfloat16 too."""
    inputs, _, dout = cases.draw(cases.attention(T, S, H=8, K=2, D=32, **options))
    run = tolerance.program("attention", implementation, tuple(options.items()))
    outputs = run({name: jnp.asarray(x, "bfloat16") for name, x in inputs.items()}, {}, jnp.asarray(dout, "bfloat16"))
    for name in ("dq", "dk"):
        assert np.abs(tolerance.to_float64(outputs[name])).max() < CANCELLATION, name


POISONED = {  # no query attends to some of the keys
    "one block, window": row(7, 40, window=30, gate="head"),
    "full, segments": row(9, 33, segments="unmatched", causal=False, softcap=2.0),
    "banded, window": row(127, 300, window=20, softcap=2.0),
    "banded, segments": row(200, 200, segments="unmatched", window=20),
    "chunked, segments": row(1030, 1030, segments="unmatched", H=1, K=1),
    "chunked, window": row(600, 2000, window=1200, H=1, K=1),
}


def poisoned_parameters() -> list[Any]:
    """(case, implementation) parameters; slow combinations are marked slow."""
    pairs = [(name, i) for name in POISONED for i in (*IMPLEMENTATIONS, "reference")]

    def is_slow(name: str, implementation: str) -> bool:
        return name == "chunked, window" or (implementation == "reference" and POISONED[name].S > 100)

    return [pytest.param(*p, id="-".join(p), marks=pytest.mark.slow if is_slow(*p) else ()) for p in pairs]


@pytest.mark.parametrize("compared", ["output", "gradients"])
@pytest.mark.parametrize(("name", "implementation"), poisoned_parameters())
@pytest.mark.sampled(128)
def test_masked_keys_do_not_affect_output(name, implementation, compared):
    case = POISONED[name]
    inputs, aux, dout = cases.draw(case)
    distance = np.arange(case.T)[:, None] + case.S - case.T - np.arange(case.S)
    mask = (distance >= 0) | (not case.causal)
    mask = (mask & (distance < (case.window or 10**9)))[None]
    if aux:
        q_ids, kv_ids = aux["segment_ids"]
        mask = mask & (q_ids[:, :, None] == kv_ids[:, None])
    masked = ~mask.any(axis=1)[:, :, None, None]
    assert masked.any(), "no key is masked in this case"
    run = tolerance.program("attention", implementation, cases.options(case))
    results = []
    for fill in (0, np.nan, np.inf):
        filled = {n: np.float32(np.where(masked, fill, x) if n in "kv" else x) for n, x in inputs.items()}
        result = run(filled, aux, np.float32(dout))
        results.append({n: x for n, x in result.items() if (n == "o") == (compared == "output")})
    for other in results[1:]:
        tolerance.assert_bit_equal(results[0], other)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["127 grouped, gate, window", "packed, window"])
@pytest.mark.sampled(24)
def test_two_runs_are_bit_equal(name, implementation):
    case = workloads.get("attention", name)
    inputs, aux, dout = cases.draw(case)
    run = tolerance.program("attention", implementation, cases.options(case))
    arguments = {n: jnp.float32(x) for n, x in inputs.items()}, aux, jnp.float32(dout)
    tolerance.assert_bit_equal(run(*arguments), run(*arguments))


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
def test_no_keys_or_no_queries(implementation):
    q, nothing = jnp.ones((2, 3, 2, 4)), jnp.ones((2, 0, 2, 4))
    for causal in (True, False):
        o = kernels.attention(q, nothing, nothing, causal=causal, implementation=implementation)
        np.testing.assert_array_equal(o, jnp.zeros_like(q))
        assert kernels.attention(nothing, q, q, causal=causal, implementation=implementation).shape == (
            2,
            0,
            2,
            4,
        )


def test_reference_has_the_defaults_of_the_operation():
    q, k, v = (jnp.float32(x) for x in cases.draw(row(5, 7))[0].values())
    expected = kernels.attention(q, k, v, implementation="reference")
    np.testing.assert_array_equal(reference.attention(q, k, v), expected)
