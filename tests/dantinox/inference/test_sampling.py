"""Sampling against a NumPy oracle, and the guarantees of its settings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dantinox.inference.sampling import Sampling, sample, sampling_mask, scale_logits

V = 11
# Most of the time of these tests is LLVM's, and they run everything once.
quickly = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
draw = quickly(sample)
keep = quickly(lambda logits, sampling: sampling_mask(scale_logits(logits, sampling.temperature), sampling))


def oracle(logits, temperature, top_k, top_p, min_p):
    """Probabilities after each filter in turn, renormalised in between, in float64."""
    z = np.asarray(logits, np.float64) / temperature
    p = np.exp(z - z.max())
    p /= p.sum()
    order = sorted(range(len(p)), key=lambda i: (-logits[i], i))
    if top_k is not None:
        p[order[top_k:]] = 0
        p /= p.sum()
    if top_p < 1:
        mass, cut = 0.0, []
        for i in order:
            if mass >= top_p:
                cut.append(i)
            mass += p[i]
        p[cut] = 0
        p /= p.sum()
    p[p < min_p * p.max()] = 0
    return p / p.sum()


number = st.floats(-6, 6, width=16, allow_subnormal=False)  # no ties after rounding to float32
setting = st.fixed_dictionaries(
    {
        "temperature": st.floats(0.2, 5),
        "top_k": st.one_of(st.none(), st.integers(1, V + 2)),
        "top_p": st.one_of(st.just(1.0), st.floats(0.01, 0.999)),
        "min_p": st.one_of(st.just(0.0), st.floats(0.01, 0.99)),
    }
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(number, st.sampled_from([0.0, 1.0])), min_size=V, max_size=V), setting)
def test_sampling_mask_matches_numpy(logits, how):
    """Fault 15: of top_k and top_p together only one counts."""
    got = np.asarray(keep(jnp.asarray([logits], jnp.float32), Sampling.create(**how)))[0]
    # A token within rounding of a threshold may fall on either side.
    slack = 1e-5
    off = how["top_p"] == 1
    strict = how | {"top_p": 1.0 if off else how["top_p"] * (1 - slack), "min_p": how["min_p"] * (1 + slack)}
    loose = how | {"top_p": 1.0 if off else how["top_p"] * (1 + slack), "min_p": how["min_p"] * (1 - slack)}
    must, may = oracle(logits, **strict) > 0, oracle(logits, **loose) > 0
    assert (got >= must).all() and (got <= may).all()


@pytest.mark.parametrize(
    "how",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 4},
        {"temperature": 1.5, "top_k": 6, "top_p": 0.8, "min_p": 0.1},
    ],
)
def test_sample_frequencies_match_numpy(how):
    rows = 8_000
    logits = np.linspace(-1, 2, V).astype(np.float32)[np.random.default_rng(0).permutation(V)]
    keys = jax.random.split(jax.random.key(1), rows)
    ids = draw(jnp.broadcast_to(logits, (rows, V)), Sampling.create(**how), keys)
    p = oracle(logits, **({"top_k": None, "top_p": 1.0, "min_p": 0.0} | how))
    seen = np.bincount(ids, minlength=V) / rows
    assert (seen[p == 0] == 0).all()
    assert (np.abs(seen - p) < 5 * np.sqrt(p * (1 - p) / rows) + 1e-9).all()


def normal(rows: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(rows, V)).astype(np.float32)


def keys(rows: int, seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed), rows)


@pytest.mark.parametrize("how", [{"temperature": 0}, {"top_k": 1}, {"top_p": 1e-6}, {"top_p": 1e-60}])
def test_greedy_takes_the_first_of_equal_logits(how):
    """Fault 15: temperature 0 gives token 0 again and again."""
    logits = jnp.array([[0, 3, 1, 3, 2], [-jnp.inf, -5, -5, -5, -jnp.inf]], jnp.float32)
    for seed in range(5):
        assert draw(logits, Sampling.create(**how), keys(2, seed)).tolist() == [1, 1]


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-9, 1e9, 1e38, 1e300])
def test_extreme_temperatures_stay_finite(temperature):
    logits = normal(32) * 50
    ids = np.asarray(draw(logits, Sampling.create(temperature), keys(32)))
    assert ((ids >= 0) & (ids < V)).all()
    if temperature <= 1e-9:
        assert (ids == np.argmax(logits, axis=-1)).all()


def test_disabled_settings_and_full_top_k_change_nothing():
    logits = normal(32)
    plain = draw(logits, Sampling.create(), keys(32))
    for how in ({"top_k": V}, {"top_k": 10**12}, {"top_p": 1}, {"top_p": 1 - 1e-12}, {"min_p": 1e-30}):
        assert (draw(logits, Sampling.create(**how), keys(32)) == plain).all()


def test_top_k_keeps_exactly_k_of_equal_logits():
    logits = jnp.zeros((1, V))
    assert np.flatnonzero(keep(logits, Sampling.create(top_k=3))[0]).tolist() == [0, 1, 2]


def test_rows_of_a_batch_are_sampled_independently():
    logits = normal(4)
    together = draw(logits, Sampling.create(top_k=5, top_p=0.9), keys(4))
    for row in range(4):
        alone = draw(logits[row : row + 1], Sampling.create(top_k=5, top_p=0.9), keys(4)[row : row + 1])
        assert alone[0] == together[row]


def test_sampling_settings_do_not_recompile():
    """Fault 15: each value of a sampling parameter recompiles."""
    counted = jax.jit(lambda *args: sample(*args))
    logits = jnp.zeros((2, V))
    for how in ({}, {"temperature": 0}, {"temperature": 2, "top_k": 3}, {"top_p": 0.5, "min_p": 0.1}):
        counted(logits, Sampling.create(**how), keys(2))
    assert counted._cache_size() == 1


@pytest.mark.parametrize(
    ("name", "bad"),
    [("temperature", x) for x in (-1, -1e-9, float("nan"), float("inf"), "1", None, True)]
    + [("top_k", x) for x in (0, -1, 1.5, 2.0, "3", True)]
    + [("top_p", x) for x in (0, -0.1, 1.1, float("nan"), "1", None)]
    + [("repetition_penalty", x) for x in (0, -1, 1e3, float("nan"), "1", None)]
    + [("min_p", x) for x in (1, -0.1, 1.5, float("nan"), "0", None)],
)
def test_invalid_settings_raise_one_line_with_their_name(name, bad):
    """Fault 15: top_k 0, a top_p above 1 and an invalid temperature are accepted silently."""
    with pytest.raises(ValueError, match=rf"^{name} is .*; allowed: .*") as error:
        Sampling.create(**{name: bad})
    assert "\n" not in str(error.value)
