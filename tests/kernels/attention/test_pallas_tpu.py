"""The attention kernels of TPUs and CPUs: block sizes, residuals, costs and what an output must not depend on."""

import re
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.verification.fast_compile import jit_fast_compile
from dantinox import kernels
from dantinox.kernels import cost, workloads
from dantinox.kernels.dispatch import target_device
from dantinox.kernels.ops.attention.pallas_cpu import block_sizes as cpu_block_sizes
from dantinox.kernels.ops.attention.pallas_cpu.block_sizes import CpuBlockSizes
from dantinox.kernels.ops.attention.pallas_tpu import block_sizes as tpu_block_sizes
from dantinox.kernels.ops.attention.pallas_tpu.block_sizes import TpuBlockSizes
from tests.helpers import cases, random_shapes, tolerance
from tests.helpers.jaxpr_walk import equations, largest_intermediate
from tests.kernels.attention.test_attention import assert_matches_loops

ROOT = Path(__file__).parents[3]
row = cases.attention


def attention(q: jax.Array, k: jax.Array, v: jax.Array, gate: jax.Array | None = None, **options: Any) -> jax.Array:
    return kernels.attention(q, k, v, gate=gate, implementation="pallas", **options)


def draw_f32(case: workloads.Attention) -> tuple[dict[str, np.ndarray], dict[str, Any], np.ndarray]:
    """Draws the arrays of a case in float32."""
    inputs, aux, dout = cases.draw(case)
    return {name: np.float32(x) for name, x in inputs.items()}, aux, np.float32(dout)


# What an output must not depend on.

WINDOWED = row(40, 40, B=2, H=4, window=9, gate="head")
SMALL_BLOCKS = CpuBlockSizes(kv_heads=1, block_q=16, block_kv=8)  # several blocks per head


@pytest.fixture
def use_block_sizes(monkeypatch):
    """use_block_sizes(sizes) replaces the heuristic of their device for the test."""

    def use(sizes: CpuBlockSizes | TpuBlockSizes) -> None:
        module = cpu_block_sizes if isinstance(sizes, CpuBlockSizes) else tpu_block_sizes
        monkeypatch.setattr(module, "heuristic_block_sizes", lambda *_, **__: sizes)

    return use


def test_tokens_outside_window_do_not_affect_output(use_block_sizes):
    use_block_sizes(SMALL_BLOCKS)
    inputs, *_ = draw_f32(WINDOWED)
    run = jit_fast_compile(lambda inputs: attention(**inputs, window=9))
    before = np.asarray(run(inputs))
    for t in (1, 15, 16, 23, 39):
        after = np.asarray(run({name: np.where(np.arange(40)[:, None, None] == t, 7, x) for name, x in inputs.items()}))
        np.testing.assert_array_equal(after[:, :t], before[:, :t])
        np.testing.assert_array_equal(after[:, t + 9 :], before[:, t + 9 :])
        changed = (after[:, t : t + 9] != before[:, t : t + 9]).any(axis=(0, 2, 3))
        assert changed.all(), "every query that sees token t depends on it"


def test_sequences_and_heads_do_not_mix(use_block_sizes):
    use_block_sizes(SMALL_BLOCKS._replace(kv_heads=2))
    inputs, *_ = draw_f32(WINDOWED)
    run = jit_fast_compile(lambda inputs: attention(**inputs, window=9))
    o = run(inputs)
    np.testing.assert_array_equal(run({name: x[::-1] for name, x in inputs.items()}), o[::-1])
    swapped = run({name: x[:, :, ::-1] for name, x in inputs.items()})  # key heads, and queries within their group
    np.testing.assert_array_equal(swapped, o[:, :, ::-1])


# Block sizes that no heuristic would choose: the row, key heads per step of a CPU, and the sizes of a TPU.

SPAN_CASES = {
    "window, gate": (row(40, 40, H=4, window=11, gate="head"), 1, TpuBlockSizes(8, 8, 16, 8, 16)),
    "cap, fewer queries": (
        row(21, 40, H=3, K=1, softcap=1.5, gate="elementwise"),
        1,
        TpuBlockSizes(16, 16, 48, 16, 16),
    ),
    "segments, more queries": (row(40, 21, segments="separate"), 2, TpuBlockSizes(16, 8, 16, 8, 16)),
    "packed, window": (row(33, 33, B=2, segments="packed", window=20), 2, TpuBlockSizes(8, 16, 8, 16, 16)),
    "full, unmatched": (row(20, 40, segments="unmatched", causal=False), 1, TpuBlockSizes(16, 8, 16, 8, 8)),
    "window of one, T > S": (row(30, 17, H=4, window=1), 1, TpuBlockSizes(4, 4, 8, 4, 8)),
}
SUBTILE_CASES = {
    "one subtile per head": (row(24, 24, H=4, window=5, gate="head"), 1, TpuBlockSizes(8, 16, 8, 8, 16)),
    "two subtiles per head": (row(12, 28, softcap=1.5), 2, TpuBlockSizes(16, 8, 8, 4, 16)),
    "two heads per subtile": (row(12, 20, H=8, D=4, segments="separate"), 2, TpuBlockSizes(4, 8, 8, 4, 64)),
}
MERGED_BLOCKS_CASES = {
    "three blocks per step": (row(40, 40, H=4, window=14, gate="head"), CpuBlockSizes(2, 8, 8, 3)),
    "blocks per step, packed": (row(33, 33, B=2, segments="packed", window=9), CpuBlockSizes(1, 4, 4, 3)),
    "blocks per step, fewer queries": (row(9, 40, window=12), CpuBlockSizes(2, 4, 8, 3)),
    "blocks per step, more queries": (row(40, 17, H=4, window=9), CpuBlockSizes(1, 8, 8, 3)),
}


def assert_matches_reference_uncached(case: workloads.Attention, dtype: str, *devices: str) -> None:
    """Applies the rule to the forms for these devices, evaluated in NumPy; without any, to the jitted program."""
    inputs, aux, dout = cases.draw(case)
    options = cases.options(case)
    run = tolerance.program.__wrapped__("attention", "pallas", options)  # the cache's key has no block sizes
    forms = tolerance.kernel_variants("pallas", run)
    for form in [forms[f"pallas for a {device}"] for device in devices] or [run]:
        tolerance.assert_matches_reference(
            "attention", "pallas", inputs, dout, dtype, aux=aux, options=options, run=form
        )


def span_parameters() -> list[Any]:
    """(name, dtype) parameters; three of them are quick."""
    found = []
    for name in SPAN_CASES:
        quick = name in ("window, gate", "cap, fewer queries", "window of one, T > S")
        found.append(pytest.param(name, "float32", marks=() if quick else pytest.mark.slow))
        found.append(pytest.param(name, "bfloat16", marks=pytest.mark.slow))
    return found


@pytest.mark.parametrize(("name", "dtype"), span_parameters())
@pytest.mark.sampled(3)
def test_gradients_summed_over_kv_spans_match_reference(name, dtype, use_block_sizes):
    case, kv_heads, sizes = SPAN_CASES[name]
    assert -(-case.S // sizes.block_kv) * sizes.block_kv > sizes.kv_span, "one span"
    use_block_sizes(sizes)
    use_block_sizes(CpuBlockSizes(kv_heads, sizes.block_q, sizes.block_kv))
    assert_matches_reference_uncached(case, dtype, "TPU")
    assert_matches_reference_uncached(case, dtype)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in list(MERGED_BLOCKS_CASES)[1:] else ())
        for name in (*SUBTILE_CASES, *MERGED_BLOCKS_CASES)
    ],
)
@pytest.mark.sampled(2)
def test_subtile_layouts_match_reference(name, use_block_sizes):
    """Several subtiles per block are a TPU's, several blocks per step a CPU's."""
    if name in MERGED_BLOCKS_CASES:
        case, sizes = MERGED_BLOCKS_CASES[name]
        use_block_sizes(sizes)
        assert_matches_reference_uncached(case, "float32")
    else:
        case, kv_heads, sizes = SUBTILE_CASES[name]
        use_block_sizes(sizes)
        use_block_sizes(CpuBlockSizes(kv_heads, sizes.block_q, sizes.block_kv))
        assert_matches_reference_uncached(case, "float32", "TPU", "CPU")


@random_shapes.examples(6)
@given(
    sizes=st.tuples(st.integers(1, 20), st.integers(1, 24)),
    heads=st.sampled_from([(1, 1), (2, 1), (2, 2), (6, 3)]),
    B=st.integers(1, 2),
    gate=st.sampled_from(["none", "elementwise", "head"]),
    segments=st.sampled_from([None, "packed", "separate", "unmatched"]),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 26),
    softcap=st.none() | st.floats(1, 4),
    q=st.sampled_from([1, 4, 8, 16]),
    k=st.sampled_from([1, 3, 8, 16]),
    span=st.sampled_from([1, 2, 100]),  # blocks
    together=st.booleans(),
    seed=st.integers(0, 99),
)
def test_random_shapes_and_block_sizes_match_python_loops(
    sizes, heads, B, gate, segments, causal, window, softcap, q, k, span, together, seed
):
    (T, S), (H, K) = sizes, heads
    S, window = T if segments == "packed" else S, window if causal else None
    case = row(T, S, B=B, H=H, K=K, D=3, gate=gate, segments=segments, causal=causal, window=window, softcap=softcap)
    tpu_sizes = TpuBlockSizes(block_q=q, block_kv=k, block_q_compute=H // K * q, block_kv_compute=k, kv_span=span * k)
    cpu_sizes = CpuBlockSizes(kv_heads=B * K if together else 1, block_q=q, block_kv=k)
    with (
        mock.patch.object(tpu_block_sizes, "heuristic_block_sizes", lambda *_, **__: tpu_sizes),
        mock.patch.object(cpu_block_sizes, "heuristic_block_sizes", lambda *_, **__: cpu_sizes),
    ):
        # The key of the program cache has no block sizes.
        compiled = tolerance.program.__wrapped__("attention", "pallas", cases.options(case))
        assert_matches_loops(case, *tolerance.kernel_variants("pallas", compiled).values(), seed=seed)
    random_shapes.clear_programs()


# Head dims of real models.

DTYPES = ("float32", "bfloat16", "float16")
HEAD_DIMS = [(D, dtype) for D in (32, 64, 80, 96, 128, 192, 256) for dtype in DTYPES]
FEW = ((80, "bfloat16"), (192, "float16"))


@pytest.mark.parametrize(
    ("D", "dtype"),
    [pytest.param(*w, id=f"D={w[0]}-{w[1]}", marks=() if w in FEW else pytest.mark.slow) for w in HEAD_DIMS],
)
@pytest.mark.sampled(2)
def test_each_head_dim_matches_reference(D, dtype):
    case = row(33, 33, H=2, K=1, D=D, window=20, gate="head")
    inputs, _, dout = cases.draw(case)
    tolerance.assert_matches_reference("attention", "pallas", inputs, dout, dtype, options=cases.options(case))


# Residuals, memory and cost.


@pytest.mark.parametrize("gate", ["none", "head", "elementwise"])
def test_residuals_are_inputs_output_and_row_statistics(gate):
    case = row(64, 64, B=2, H=4, D=16, gate=gate)
    inputs, *_ = draw_f32(case)
    _, pull = jax.eval_shape(lambda inputs: jax.vjp(lambda x: attention(**x), inputs), inputs)
    residual_sizes = sorted(x.size for x in jax.tree.leaves(pull))
    q = inputs["q"].size
    assert residual_sizes == sorted([*(x.size for x in inputs.values()), q, q // case.D, q // case.D])


def self_attention(window: int | None, backward: bool, **options: Any) -> Any:
    f = lambda q: attention(q, q, q, window=window, **options)
    return jax.grad(lambda q: jnp.sum(f(q) ** 2)) if backward else f


def query(S: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, S, 1, 16), jnp.float32)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("window", [64, None], ids=["window", "causal"])
def test_full_score_matrix_is_not_materialized(window, backward):
    S = 2048
    for segments in (None, jnp.zeros((1, S), jnp.int32)):
        jaxpr = jax.make_jaxpr(self_attention(window, backward, segment_ids=segments))(query(S))
        assert largest_intermediate(jaxpr) < S * S // 8
        assert any(e.primitive.name == "pallas_call" for e in equations(jaxpr))


@pytest.mark.parametrize(
    "backward", [pytest.param(False, id="forward", marks=pytest.mark.slow), pytest.param(True, id="backward")]
)
@pytest.mark.parametrize("window", [64, None], ids=["window", "causal"])
def test_memory_grows_linearly_with_sequence_length(window, backward):
    program = jit_fast_compile(self_attention(window, backward))
    one, two = (program.lower(query(S)).compile().memory_analysis().temp_size_in_bytes for S in (1024, 2048))
    assert 0 < two <= 2.3 * one, f"{one} bytes at 1024, {two} at 2048"


COST_CASES = {
    "grouped, window, gate": row(40, 40, B=2, H=4, K=2, window=9, gate="head"),
    "fewer queries, elementwise gate": row(9, 40, gate="elementwise"),
    "more queries, window": row(40, 9, H=4, K=1, window=3),
    "full": row(9, 40, causal=False),
}


@pytest.mark.parametrize(
    ("name", "device", "spans"),
    [(name, device, n) for name in COST_CASES for device, n in (("CPU", 1), ("TPU", 1), ("TPU", 3))],
)
def test_cost_estimates_match_the_cost_model(name, device, spans, use_block_sizes):
    case = COST_CASES[name]
    k = -(-case.S // spans)
    use_block_sizes(TpuBlockSizes(16, k, 16 * case.H // case.K, k, k))
    use_block_sizes(CpuBlockSizes(1, 16, k))
    inputs, *_ = draw_f32(case)
    with target_device(*tolerance.INTERPRETED_DEVICES[device]):
        jaxpr = jax.make_jaxpr(lambda x: jax.vjp(lambda x: attention(**x, **case.options()), x)[1](x["q"]))(inputs)
    calls = [e.params for e in equations(jaxpr) if e.primitive.name == "pallas_call"]
    estimates = [cost.Cost(p.flops, p.bytes_accessed, p.transcendentals) for p in (c["cost_estimate"] for c in calls)]
    forward, *backward = estimates
    sizes = {name: getattr(case, name) for name in ("B", "T", "S", "H", "K", "D", "causal", "window", "gate")}
    assert forward == cost.attention(**sizes, itemsize=4)
    assert len(backward) == spans
    # Each span rounds its share.
    np.testing.assert_allclose(np.sum(backward, axis=0), cost.attention(**sizes, itemsize=4, backward=True), atol=spans)


def test_kernel_docstrings_have_six_parts():
    names = ("fwd", "bwd", "gmm", "tgmm", "kernel", "pallas_cpu", "up_proj", "down_proj_bwd")
    files = [file for file in (ROOT / "kernels" / "ops").rglob("*.py") if file.stem in names]
    assert len(files) == 30
    for file in files:
        parts = re.findall(r"^(?:\"\"\")?(Math|Tiling|State|Traffic|Limits|Source) {2,}\S", file.read_text(), re.M)
        assert parts == ["Math", "Tiling", "State", "Traffic", "Limits", "Source"], file


def test_finite_values_of_hidden_keys_have_no_effect_on_gradients():
    """On a TPU: the first queries do not see the last key, whose products with their cotangents fit float32."""
    case = row(9, 9, softcap=2.0)
    inputs, aux, dout = cases.draw(case)
    run = tolerance.kernel_variants(
        "pallas", tolerance.program("attention", "pallas", cases.options(case))
    )["pallas for a TPU"]  # fmt: skip
    dout[:, 8] = 0
    results = []
    for value in (1.0, 1e36, -1e36):
        inputs["v"][:, 8] = value
        results.append(run({name: np.float32(x) for name, x in inputs.items()}, aux, np.float32(8 * dout)))
    for other in results[1:]:
        tolerance.assert_bit_equal({n: results[0][n][:, :8] for n in results[0]}, {n: other[n][:, :8] for n in other})


def test_every_finite_score_counts():
    """On a TPU: all scores of a row are the same, far below zero, so the output is the mean of the values."""
    case = row(9, 9, H=1, K=1, D=4, scale=1.0)
    inputs, aux, _ = cases.draw(case)
    inputs |= {"q": np.full_like(inputs["q"], 1e19), "k": np.full_like(inputs["k"], -5e18)}
    run = tolerance.kernel_variants(
        "pallas", tolerance.program("attention", "pallas", cases.options(case))
    )["pallas for a TPU"]  # fmt: skip
    o = run({name: np.float32(x) for name, x in inputs.items()}, aux, None)["o"]
    np.testing.assert_allclose(o, np.cumsum(inputs["v"], 1) / np.arange(1, 10)[:, None, None], rtol=1e-5, atol=1e-6)
