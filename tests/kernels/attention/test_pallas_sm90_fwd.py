"""Hopper attention, interpreted on the CPU: values, races, rows that see no key, and which blocks it visits."""

import functools
import itertools
import math
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import mosaic_gpu as plgpu

from dantinox import kernels
from dantinox.kernels import dispatch, workloads
from dantinox.kernels.ops.attention.pallas_sm90 import vjp
from dantinox.kernels.ops.attention.pallas_sm90.common import LOG2E, Sm90AttentionConfig, visible_kv_range
from dantinox.kernels.ops.attention.pallas_sm90.fwd_kernel import FwdOutputs
from dantinox.reference.attention import visible
from tests.helpers import cases, tolerance

RACES = plgpu.InterpretGPUParams(detect_races=True)
slow = pytest.mark.slow


def row(T: int, S: int, D: int = 64, **sizes: Any) -> workloads.Attention:
    return cases.attention(T, S, **({"H": 2, "K": 1, "D": D} | sizes))


def options(case: workloads.Attention) -> dict[str, Any]:
    return case.options() | {"scale": case.D**-0.5 if case.scale is None else case.scale}


def arrays(case: workloads.Attention, dtype: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns (inputs, with gate None where there is none; segment ids as the kernel takes them)."""
    inputs, aux, _ = cases.draw(case)
    inputs = {"gate": None} | {name: jnp.asarray(x, dtype) for name, x in inputs.items()}
    ids = aux.get("segment_ids")
    ids = (ids, ids) if isinstance(ids, np.ndarray) else ids
    return inputs, {"segment_ids": None if ids is None else tuple(map(jnp.asarray, ids))}


def races_detected() -> bool:
    races_found = interpreter.get_races().races_found
    interpreter.reset_gpu_interpret_mode_state()
    return races_found


def kernel_config(case: workloads.Attention) -> Sm90AttentionConfig:
    window = None if case.window is None else min(case.window, case.S)
    scale = options(case)["scale"]
    return Sm90AttentionConfig(case.T, case.S, case.H // case.K, case.causal, window, scale, case.softcap, RACES)


@functools.cache
def forward(case: workloads.Attention, dtype: str) -> FwdOutputs:
    """Returns the output and the residuals, computed once."""
    inputs, aux = arrays(case, dtype)
    run = functools.partial(vjp.padded_forward, config=kernel_config(case), residuals=True, lse=True)
    out = jax.jit(run)(inputs["q"], inputs["k"], inputs["v"], inputs["gate"], aux["segment_ids"])
    out = jax.tree.map(np.asarray, out)
    assert not races_detected()
    return out


def forward_float64(case: workloads.Attention, dtype: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (o, o without the gate, log2-sum-exp) in float64."""
    inputs, aux = arrays(case, dtype)
    q, k, v = (tolerance.to_float64(inputs[name]) for name in "qkv")
    G = case.H // case.K
    s = np.einsum("BTKGD,BSKD->BKGTS", q.reshape(case.B, case.T, case.K, G, case.D), k) * options(case)["scale"]
    if case.softcap is not None:
        s = case.softcap * np.tanh(s / case.softcap)
    seen = np.asarray(visible(case.T, case.S, causal=case.causal, window=case.window))[None, None, None]
    if aux["segment_ids"] is not None:
        q_ids, kv_ids = map(np.asarray, aux["segment_ids"])
        seen = seen & (q_ids[:, :, None] == kv_ids[:, None])[:, None, None]
    weights = np.where(seen, np.exp2(s * math.log2(math.e)), 0)
    total = weights.sum(-1)
    o = np.einsum("BKGTS,BSKD->BTKGD", weights / np.where(total == 0, 1, total)[..., None], v)
    o = o.reshape(case.out_shape())
    lse = np.where(total == 0, np.inf, np.log2(np.where(total == 0, 1, total))).reshape(case.B, case.H, case.T)
    gate = 1.0 if inputs["gate"] is None else 1 / (1 + np.exp(-tolerance.to_float64(inputs["gate"])))
    return o * gate, o, lse


FORWARD = {
    # Two query blocks per head, the second with few rows; both edges of a window in one block, and in two.
    "window, gate": row(129, 200, window=70, gate="elementwise"),
    "full, softcap, head gate": row(65, 127, D=128, K=2, causal=False, gate="head", softcap=2.0),
    "queries without keys": row(200, 65, D=256, gate="elementwise"),  # the first queries see no key
    "D=96, gate": row(129, 70, D=96, window=50, gate="elementwise"),
}
FORWARD_SLOW = {
    "unmatched, window": row(64, 129, segments="unmatched", window=100, gate="head", B=2),
    "one query": row(1, 200, D=128, gate="elementwise"),
    "one query, one key": row(1, 1, gate="elementwise"),
    "one key": row(129, 1, D=128, gate="head"),
    "full, more queries": row(127, 64, causal=False),
    "window of one, softcap": row(200, 200, D=128, window=1, softcap=1.0),
    "separate, window past S": row(127, 200, D=128, window=1000, segments="separate"),
    "negative scale, window": row(200, 129, D=256, window=64, scale=-0.05, gate="elementwise"),
    "packed, full, softcap": row(129, 129, D=256, causal=False, segments="packed", softcap=3.0),
    "zero scale": row(65, 65, scale=0.0, H=4, K=2, B=2),
    "long window": row(600, 600, window=300, gate="elementwise"),
    "more blocks than stages": row(600, 1000, D=128, H=1, gate="elementwise"),
    "long window, D=256": row(200, 700, D=256, H=1, window=400, gate="elementwise"),
    # Documents longer than a block: some blocks are skipped, some need no mask.
    "packed": row(600, 600, segments="packed", gate="elementwise"),
    # Head dims of narrower swizzles: rows of 32, 64 and 128 bytes.
    "D=16, window, gate": row(129, 200, D=16, window=70, gate="elementwise"),
    "D=32, segments": row(200, 200, D=32, segments="packed", gate="head"),
    "D=80, full": row(65, 127, D=80, causal=False, softcap=2.0, gate="elementwise"),
    "D=112, window": row(200, 129, D=112, window=64, gate="elementwise"),
    "D=160": row(129, 200, D=160, gate="elementwise"),
    "D=192": row(129, 200, D=192, window=50, gate="head"),
    "D=240": row(129, 129, D=240, gate="elementwise"),
    "packed, full, D=256": row(500, 500, D=256, H=1, segments="packed", causal=False),
}


@pytest.mark.parametrize(
    "case",
    [
        *(pytest.param(case, id=name) for name, case in FORWARD.items()),
        *(pytest.param(case, id=name, marks=slow) for name, case in FORWARD_SLOW.items()),
    ],
)
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=slow)])
@pytest.mark.sampled(5)
def test_output_and_residuals_match_float64_without_races(case, dtype):
    out = forward(case, dtype)
    inputs, aux = arrays(case, dtype)
    plain = forward_reference(case, inputs, aux)
    o, o_ungated, lse = forward_float64(case, dtype)
    tolerance.assert_within_bound({"o": out.o}, {"o": plain}, {"o": o}, dtype)
    if out.o_ungated is not None:
        bare = forward_reference(case, inputs | {"gate": None}, aux)
        tolerance.assert_within_bound({"o": out.o_ungated}, {"o": bare}, {"o": o_ungated}, dtype)
    assert (np.isposinf(out.lse) == np.isposinf(lse)).all()
    np.testing.assert_allclose(out.lse, lse, atol=2e-4, rtol=1e-5)
    assert out.o.shape == case.out_shape() and out.o.dtype == inputs["q"].dtype
    sees_no_key = np.isposinf(lse).swapaxes(1, 2)
    assert not out.o[sees_no_key].any(), "a query that sees no key gives zeros"


def forward_reference(case: workloads.Attention, inputs: dict[str, Any], aux: dict[str, Any]) -> jax.Array:
    from dantinox.reference import attention

    return attention(**inputs, **aux, **options(case))


GRADIENTS = [row(72, 136, window=70, gate="elementwise"), row(65, 40, D=128, gate="head", K=2, softcap=2.0)]


@slow
@pytest.mark.parametrize("case", GRADIENTS, ids=["window", "softcap"])
def test_gradients_match_reference_in_interpret_mode(case):
    inputs, _, dout = cases.draw(case)

    def run(inputs: dict, aux: dict, dout: jax.Array) -> dict[str, jax.Array]:
        call = lambda x: vjp.attention(**x, **options(case), segment_ids=None, interpret=RACES)
        o, pull = jax.vjp(call, inputs)
        return {"o": o} | {f"d{name}": gradient for name, gradient in pull(dout)[0].items()}

    tolerance.assert_matches_reference(
        "attention", "hopper", inputs, dout, jnp.bfloat16, options=cases.options(case), run=run
    )
    assert not races_detected()


@pytest.mark.parametrize("gate", [None, 1, 16], ids=["no gate", "head gate", "elementwise gate"])
def test_bwd_preprocess_matches_autodiff(gate):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    do, o_ungated, logits = draw(2, 5, 3, 16), draw(2, 5, 3, 16), gate and draw(2, 5, 3, gate)
    do_ungated, dgate, delta = vjp.bwd_preprocess(do, o_ungated, logits)

    def gated(o: jax.Array, logits: jax.Array | None) -> jax.Array:
        return o if logits is None else o * jax.nn.sigmoid(logits)

    _, pull = jax.vjp(gated, o_ungated, logits)
    do_expected, dgate_expected = pull(do)
    np.testing.assert_allclose(do_ungated, do_expected, rtol=1e-6)
    np.testing.assert_allclose(delta, np.einsum("BTHD,BTHD->BHT", do_expected, o_ungated), rtol=1e-5, atol=1e-6)
    assert (dgate is None) == (gate is None)
    if gate:
        np.testing.assert_allclose(dgate, dgate_expected, rtol=1e-5, atol=1e-6)


@slow
def test_masked_keys_do_not_affect_output():
    case = row(65, 200, window=40, segments="unmatched")
    inputs, aux = arrays(case, "bfloat16")
    run = jax.jit(lambda x: vjp.attention(**x, **options(case), **aux, interpret=RACES))
    once, again = run(inputs), run(inputs)
    ids = aux["segment_ids"][1][0] == 99
    hidden = (ids | (jnp.arange(200) < 200 - 65 - 40 + 1))[None, :, None, None]
    assert hidden.sum() == 96 + 4
    poisoned = inputs | {name: jnp.where(hidden, jnp.nan, inputs[name]) for name in "kv"}
    tolerance.assert_bit_equal({"o": once}, {"o": again})
    tolerance.assert_bit_equal({"o": once}, {"o": run(poisoned)})


@slow
def test_blocks_of_other_segments_are_not_loaded():
    """Copies into shared memory, by the simulated device, for one document and for four as long."""
    copies = []
    for documents in (1, 4):
        case = row(256 * documents, 256 * documents, H=1)
        inputs, _ = arrays(case, "bfloat16")
        ids = jnp.repeat(jnp.arange(documents, dtype=jnp.int32), 256)[None]
        run = functools.partial(vjp.attention, **options(case), segment_ids=(ids, ids), interpret=RACES)
        with mock.patch.object(gpu_callbacks, "copy_gmem_to_smem", wraps=gpu_callbacks.copy_gmem_to_smem) as ran:
            jax.block_until_ready(jax.jit(run)(**inputs))
        assert not races_detected()
        copies.append(ran.call_count)
    assert copies[1] == 4 * copies[0], copies


LENGTHS = (1, 64, 65, 130, 200)
WINDOWS = {
    "full": (False, None),
    "causal": (True, None),
    **{f"window={window}": (True, window) for window in (1, 63, 64, 100, 1000)},
}


@pytest.mark.parametrize(("causal", "window"), WINDOWS.values(), ids=WINDOWS)
def test_kv_range_covers_visible_blocks_and_its_interior_is_unmasked(causal, window):
    for q, k in ((64, 128), (128, 64), (16, 32)):
        q_starts = np.arange(0, 256, q, dtype=np.int32)

        @jax.jit
        @functools.partial(jax.vmap, in_axes=(0, None, None))
        def kv_ranges(q_start: Any, T: Any, S: Any, q: int = q, k: int = k) -> tuple:
            return visible_kv_range(q_start, q, k, Sm90AttentionConfig(T, S, 1, causal, window, 1.0, None))

        for T, S in itertools.product(LENGTHS, LENGTHS):
            ranges = [np.asarray(x) for x in kv_ranges(q_starts, np.int32(T), np.int32(S))]
            distance = np.arange(T)[:, None] + S - T - np.arange(S)
            seen = ((distance >= 0) | (not causal)) & (distance < (window or 10**6))
            for n, q_start in enumerate(q_starts):
                start, interior_start, interior_end, end = (int(x[n]) for x in ranges)
                blocks = [seen[q_start : q_start + q, j * k : (j + 1) * k] for j in range(-(-S // k))]
                needed = [j for j, block in enumerate(blocks) if block.any()]
                assert list(range(start, end)) == needed, (T, S, q, k, q_start)
                unmasked = [j for j in needed if blocks[j].all() and (j + 1) * k <= S]
                assert list(range(interior_start, interior_end)) == unmasked, (T, S, q, k, q_start)


@slow
@pytest.mark.parametrize("D", [64, 256])
def test_float16_takes_the_cotangents_of_a_scaled_loss(D):
    case = row(24, 40, D=D, gate="head")
    inputs, _, dout = cases.draw(case)

    def run(inputs: dict, aux: dict, dout: jax.Array) -> dict[str, jax.Array]:
        call = lambda x: vjp.attention(**x, **options(case), segment_ids=None, interpret=RACES)
        return tolerance.output_and_gradients(call, inputs, dout)

    # Small queries and keys, so that their gradients fit float16 where those of the scores would not.
    large = inputs | {"q": inputs["q"] / 32, "k": inputs["k"] / 32, "v": 64 * inputs["v"]}
    for x, size in ((large, 8192), (inputs, 2**-12)):
        tolerance.assert_matches_reference(
            "attention", "hopper", x, size * dout, jnp.float16, options=cases.options(case), run=run
        )
    assert not races_detected()


def test_every_finite_score_counts():
    """All scores of a row are the same, far below zero: the output is the mean of the values."""
    case = row(8, 40, scale=2.0**100 / LOG2E)  # their product is a power of two, so that no rounding decides
    inputs, _ = arrays(case, "bfloat16")
    inputs |= {"q": jnp.full_like(inputs["q"], 1e3), "k": jnp.full_like(inputs["k"], -1e2)}
    o = jax.jit(lambda x: vjp.attention(**x, **options(case), segment_ids=None, interpret=RACES))(inputs)
    v = np.cumsum(tolerance.to_float64(inputs["v"]), 1)[:, -case.T :] / np.arange(33, 41)[:, None, None]
    np.testing.assert_allclose(tolerance.to_float64(o), np.repeat(v, 2, axis=2), atol=2e-2)


def test_unsupported_inputs_raise():
    x = jnp.ones((1, 8, 2, 64), jnp.bfloat16)
    for softcap in (1e-20, 1e20):
        with pytest.raises(NotImplementedError, match=r"softcap is 1e.20 and Hopper's kernels take"):
            vjp.attention(x, x, x, gate=None, causal=True, window=None, scale=1.0, softcap=softcap, segment_ids=None)
    for dtype, D, reason in (("float32", 64, "float32"), ("bfloat16", 72, "head dim 72"), ("bfloat16", 272, "272")):
        x = jnp.ones((1, 8, 2, D), dtype)
        with pytest.raises(NotImplementedError, match=reason):
            vjp.attention(x, x, x, gate=None, causal=True, window=None, scale=1.0, softcap=None, segment_ids=None)


def test_output_is_zero_without_keys():
    q, none = jnp.ones((1, 8, 2, 64), jnp.bfloat16), jnp.ones((1, 0, 2, 64), jnp.bfloat16)
    o = vjp.attention(q, none, none, gate=None, causal=False, window=None, scale=1.0, softcap=None, segment_ids=None)
    assert o.shape == q.shape and not o.any()


def test_pallas_gpu_requires_hopper():
    with dispatch.target_device("cuda", "NVIDIA H100 80GB HBM3"):
        assert kernels.implementations("attention")["pallas"] is None
        x = jnp.ones((1, 8, 2, 72), jnp.bfloat16)
        with pytest.raises(NotImplementedError, match="head dim 72"):
            kernels.attention(x, x, x, implementation="pallas")
    with dispatch.target_device("cuda", "NVIDIA A100-SXM4-80GB"):
        assert "requires Hopper (compute capability 9.0)" in kernels.implementations("attention")["pallas"]


@pytest.mark.parametrize("segments", [False, True], ids=["no segments", "segments"])
@pytest.mark.parametrize("around", ["vmap", "shard_map", "shard_map without checks"])
@pytest.mark.sampled(2)
def test_gradients_trace_under_vmap_and_shard_map(around, segments):
    q, k, ids = (jnp.ones(shape, jnp.bfloat16) for shape in ((2, 1, 64, 4, 64), (2, 1, 64, 2, 64), (2, 1, 64)))
    call = functools.partial(vjp.attention, gate=None, causal=True, window=9, scale=1.0, softcap=None)

    def gradients(q: jax.Array, k: jax.Array, ids: jax.Array) -> tuple[jax.Array, ...]:
        ids = (ids, ids) if segments else None
        o, pull = jax.vjp(lambda q, k, v: call(q, k, v, segment_ids=ids), q, k, k)
        return o, *pull(o)

    if around == "vmap":
        run, args = jax.vmap(gradients), (q, k, ids.astype(jnp.int32))
    else:
        mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        spec = jax.sharding.PartitionSpec("data")
        checked = around == "shard_map"
        run = jax.shard_map(gradients, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=checked)
        args = q[0], k[0], ids[0].astype(jnp.int32)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), jax.eval_shape(run, *args))
    assert shapes == tuple((x.shape, x.dtype) for x in (args[0], args[0], args[1], args[1]))
