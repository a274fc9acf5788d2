"""Attention: the reference against python loops, every implementation against the reference."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from tests.parity import rule

IMPLEMENTATIONS = rule.runnable("attention")


class Case(NamedTuple):
    """Sizes and settings; `segments`: None, "packed" (one array), "pair" (query and key ids) or "nobody"."""

    T: int
    S: int
    H: int = 2
    K: int = 2
    D: int = 8
    B: int = 1
    gate: str = "none"
    segments: str | None = None
    causal: bool = True
    window: int | None = None
    scale: float | None = None
    softcap: float | None = None

    @property
    def options(self) -> rule.Options:
        return tuple((name, getattr(self, name)) for name in ("causal", "window", "scale", "softcap"))


def draw(case: Case, seed: int = 0) -> tuple[dict[str, np.ndarray], dict[str, Any], np.ndarray]:
    """(q, k, v and gate in float64, segment ids, cotangent)."""
    rng = np.random.default_rng(seed)
    B, T, S, H, K, D = case.B, case.T, case.S, case.H, case.K, case.D
    shapes = {"q": (B, T, H, D), "k": (B, S, K, D), "v": (B, S, K, D)}
    if case.gate != "none":
        shapes["gate"] = (B, T, H, D if case.gate == "elementwise" else 1)
    inputs = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    return inputs, segment_ids(case, rng), rng.standard_normal((B, T, H, D))


def segment_ids(case: Case, rng: np.random.Generator) -> dict[str, Any]:
    """Documents packed one after the other; queries are the last T of the S positions."""
    if case.segments is None:
        return {}
    n = max(case.S, case.T)
    cuts = np.sort(rng.integers(0, n, (case.B, 3)), axis=1)
    # In no order: rising ids would let a comparison with < pass for one with ==.
    ids = np.int32([2, 0, 3, 1])[np.sum(np.arange(n)[None, :, None] >= cuts[:, None], axis=-1)]
    if case.segments == "packed":
        return {"segment_ids": jnp.asarray(ids)}
    q_ids, kv_ids = ids[:, n - case.T :], ids[:, n - case.S :].copy()
    if case.segments == "nobody":
        kv_ids[:, case.S // 3 : case.S // 2] = 99
    return {"segment_ids": (jnp.asarray(q_ids), jnp.asarray(kv_ids))}


def loops(q, k, v, gate=None, *, causal=True, window=None, scale=None, softcap=None, segment_ids=None):
    """The formula, one query and one key at a time, in float64."""
    (B, T, H, D), (_, S, K, _) = q.shape, k.shape
    if segment_ids is not None and not isinstance(segment_ids, tuple):
        segment_ids = (segment_ids, segment_ids)
    o = np.zeros((B, T, H, D))
    for b, t, h in np.ndindex(B, T, H):
        scores, values = [], []
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
            if gate is not None:
                o[b, t, h] *= 1 / (1 + np.exp(-gate[b, t, h]))
    return o


TINY = {
    "causal": Case(5, 5, B=2),
    "one key": Case(1, 1),
    "grouped, elementwise gate": Case(4, 6, H=6, K=2, gate="elementwise"),
    "multi-query, head gate, soft cap": Case(5, 5, H=3, K=1, gate="head", softcap=1.5),
    "more queries than keys, window": Case(7, 3, window=2, gate="head"),
    "window of one": Case(4, 5, window=1),
    "full, scale": Case(3, 5, causal=False, scale=-0.7),
    "segments": Case(9, 9, B=2, segments="packed", window=3),
    "segments nobody shares": Case(4, 9, B=2, segments="nobody", causal=False),
}


@pytest.mark.parametrize("case", TINY.values(), ids=TINY)
def test_the_reference_is_the_formula(case):
    inputs, aux, dout = draw(case)
    plain = jax.tree.map(np.asarray, aux)
    with jax.enable_x64(True):
        got = rule.program("attention", "reference", case.options)(inputs, aux, dout)
    expected = loops(**inputs, **plain, **dict(case.options))
    np.testing.assert_allclose(got["o"], expected, rtol=1e-12, atol=1e-13)
    toward = {name: np.random.default_rng(1).standard_normal(x.shape) for name, x in inputs.items()}
    along = sum(np.sum(rule.exact(got[f"d{name}"]) * toward[name]) for name in inputs)
    by_hand = rule.slope(lambda **x: loops(**x, **plain, **dict(case.options)), inputs, toward, dout)
    assert along == pytest.approx(by_hand, rel=1e-6, abs=1e-8)


CASES = {
    "1": Case(1, 1, gate="elementwise"),
    "7": Case(7, 7, B=2, D=5),
    "127 grouped, gate, window": Case(127, 127, H=4, K=2, B=2, gate="elementwise", window=16),
    "129 multi-query, head gate, cap": Case(129, 129, H=4, K=1, gate="head", softcap=2.0, D=64),
    "7 of 129": Case(7, 129, H=4, K=2, scale=0.5),
    "7 of 129, window": Case(7, 129, window=16, gate="head"),
    "1 of 127": Case(1, 127, H=4, K=2),
    "129 on 7": Case(129, 7, gate="elementwise"),
    "129 on 7, window": Case(129, 7, window=3, gate="head"),
    "300 on 200, window": Case(300, 200, H=4, K=2, window=20),
    "window 1": Case(127, 127, window=1),
    "window S": Case(129, 129, window=129),
    "window past S": Case(7, 7, window=1000),
    "window just banded": Case(140, 140, window=75),
    "full, cap": Case(7, 129, H=4, K=2, causal=False, softcap=1.5, gate="head"),
    "full, T > S": Case(129, 7, causal=False),
    "packed": Case(129, 129, H=4, K=2, B=2, segments="packed"),
    "packed, window": Case(200, 200, B=2, segments="packed", window=16, gate="elementwise"),
    "pair": Case(33, 129, B=2, segments="pair", window=70),
    "nobody": Case(129, 129, B=2, segments="nobody", causal=False),
    "nobody, banded": Case(127, 300, B=2, segments="nobody", window=20),
    "banded 600": Case(600, 600, H=4, K=2, window=64, softcap=3.0),
    "banded 127 of 700": Case(127, 700, window=41),
    "chunked causal": Case(1100, 1100, H=2, K=1, gate="head"),
    "chunked full": Case(300, 4000, causal=False, H=1, K=1),
    "chunked window": Case(1100, 1100, H=1, K=1, window=1000),
    "chunked packed": Case(1030, 1030, H=1, K=1, segments="packed", softcap=2.0),
    "chunked 257 of 4100": Case(257, 4100, H=1, K=1),
    "chunked 4100 on 257": Case(4100, 257, H=1, K=1),
}
NARROW = [  # what is judged in bfloat16 too
    "129 multi-query, head gate, cap",
    "129 on 7, window",
    "packed, window",
    "nobody",
    "banded 600",
    "chunked causal",
]
HALF = ["127 grouped, gate, window", "nobody", "chunked full"]  # and in float16
SLOW = {  # variations on quick ones
    *("1", "1 of 127", "7 of 129", "129 on 7", "full, T > S", "300 on 200, window", "window S", "window just banded"),
    *("nobody", "banded 127 of 700", "chunked packed", "chunked full", "chunked window"),
    *("chunked 257 of 4100", "chunked 4100 on 257"),
}


def judged() -> list[Any]:
    """(case, dtype) parameters, the long ones marked slow."""
    rows = [(name, dtype) for dtype, names in zip(DTYPES, (CASES, NARROW, HALF), strict=True) for name in names]
    long = lambda name, dtype: name in SLOW or (dtype == "bfloat16" and name.startswith(("chunked", "129 on")))
    return [pytest.param(*r, id="-".join(r), marks=pytest.mark.slow if long(*r) else ()) for r in rows]


DTYPES = ("float32", "bfloat16", "float16")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("name", "dtype"), judged())
def test_every_implementation_keeps_the_rule(name, dtype, implementation):
    case = CASES[name]
    inputs, aux, dout = draw(case)
    small = case.T * case.S < 2**18
    got = rule.judge("attention", implementation, inputs, dout, dtype, aux=aux, options=case.options, hurry=small)
    if case.T > case.S and case.causal:
        for row in ("o", "dq", *(["dgate"] if case.gate != "none" else [])):
            assert not np.any(got[row][:, : case.T - case.S]), f"{row}: a query that sees no key"


@settings(max_examples=25)
@given(
    sizes=st.tuples(st.integers(1, 10), st.integers(1, 24)),
    heads=st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 2)]),
    D=st.integers(1, 5),
    gate=st.sampled_from(["none", "elementwise", "head"]),
    segments=st.sampled_from([None, "pair", "nobody"]),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 26),
    softcap=st.sampled_from([None, 2.0]),
    seed=st.integers(0, 9),
)
def test_any_small_shape_is_the_formula(sizes, heads, D, gate, segments, causal, window, softcap, seed):
    case = Case(
        *sizes,
        *heads,
        D=D,
        gate=gate,
        segments=segments,
        causal=causal,
        window=window if causal else None,
        softcap=softcap,
    )
    inputs, aux, dout = draw(case, seed)
    plain = jax.tree.map(np.asarray, aux)
    inputs = {name: x.astype(np.float32).astype(np.float64) for name, x in inputs.items()}
    expected = loops(**inputs, **plain, **dict(case.options))
    toward = {name: np.random.default_rng(1).standard_normal(x.shape) for name, x in inputs.items()}
    by_hand = rule.slope(lambda **x: loops(**x, **plain, **dict(case.options)), inputs, toward, dout)
    for implementation in IMPLEMENTATIONS:
        run = rule.program("attention", implementation, case.options)
        narrow = {name: jnp.float32(x) for name, x in inputs.items()}
        got = run(narrow, aux, jnp.float32(dout))
        np.testing.assert_allclose(got["o"], expected, rtol=2e-5, atol=2e-6)
        along = sum(np.sum(rule.exact(got[f"d{name}"]) * toward[name]) for name in inputs)
        assert along == pytest.approx(by_hand, rel=1e-4, abs=1e-3)


POISONED = {  # some keys are seen by no query at all
    "one block, window": Case(7, 40, window=30, gate="head"),
    "full, segments": Case(9, 33, segments="nobody", causal=False, softcap=2.0),
    "banded, window": Case(127, 300, window=20, softcap=2.0),
    "banded, segments": Case(200, 200, segments="nobody", window=20),
    "chunked, segments": Case(1030, 1030, segments="nobody", H=1, K=1),
    "chunked, window": Case(600, 2000, window=1200, H=1, K=1),
}


def poisoned() -> list[Any]:
    """(case, implementation) parameters; the reference only where it is quick."""
    pairs = [(name, i) for name in POISONED for i in (*IMPLEMENTATIONS, "reference")]
    long = lambda name, i: name == "chunked, window" or (i == "reference" and POISONED[name].S > 100)
    return [pytest.param(*p, id="-".join(p), marks=pytest.mark.slow if long(*p) else ()) for p in pairs]


@pytest.mark.parametrize("what", ["output", "gradients"])
@pytest.mark.parametrize(("name", "implementation"), poisoned())
def test_what_unseen_keys_hold_reaches_nobody(name, implementation, what):
    case = POISONED[name]
    inputs, aux, dout = draw(case)
    distance = np.arange(case.T)[:, None] + case.S - case.T - np.arange(case.S)
    mask = (distance >= 0) | (not case.causal)
    mask = (mask & (distance < (case.window or 10**9)))[None]
    if aux:
        q_ids, kv_ids = (np.asarray(ids) for ids in aux["segment_ids"])
        mask = mask & (q_ids[:, :, None] == kv_ids[:, None])
    unseen = ~mask.any(axis=1)[:, :, None, None]
    assert unseen.any(), "the case poisons nothing"
    run = rule.program("attention", implementation, case.options)
    parts = []
    for fill in (0, np.nan, np.inf):
        filled = {n: np.float32(np.where(unseen, fill, x) if n in "kv" else x) for n, x in inputs.items()}
        got = run(filled, aux, np.float32(dout))
        parts.append({n: x for n, x in got.items() if (n == "o") == (what == "output")})
    for part in parts[1:]:
        rule.same_bits(parts[0], part)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["127 grouped, gate, window", "packed, window"])
def test_two_runs_are_bit_equal(name, implementation):
    case = CASES[name]
    inputs, aux, dout = draw(case)
    run = rule.program("attention", implementation, case.options)
    arguments = {n: jnp.float32(x) for n, x in inputs.items()}, aux, jnp.float32(dout)
    rule.same_bits(run(*arguments), run(*arguments))


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
