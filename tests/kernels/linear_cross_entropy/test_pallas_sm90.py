"""The Hopper linear cross-entropy on a simulated GPU that checks memory: values, gradients, races, limits."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from dantinox import kernels
from dantinox.kernels import dispatch, workloads
from dantinox.kernels.mosaic_gpu import softcap_tanh
from dantinox.kernels.ops.linear_cross_entropy import common
from dantinox.kernels.ops.linear_cross_entropy.pallas_sm90 import block_sizes, fwd, vjp
from tests.helpers import cases, tolerance, two_blocks
from tests.helpers.jaxpr_walk import largest_intermediate

H100, A100 = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"
slow = pytest.mark.slow


def row(N: int, M: int, V: int, **kind) -> workloads.LinearCrossEntropy:
    return cases.make_workload(workloads.LinearCrossEntropy, N=N, M=M, V=V, **kind)


@pytest.fixture
def small_parts(monkeypatch):
    """Let small problems have several splits of two tiles, and several chunks and a rest."""
    monkeypatch.setattr(fwd, "tiles_per_split", lambda *_: 2)
    monkeypatch.setattr(common, "MAX_CHUNK_LOGITS", 128 * 152)
    monkeypatch.setattr(common, "MIN_CHUNK", 128)


CASES = [
    # Two blocks of rows, several splits and tiles, several chunks and a rest, sizes that are multiples of nothing.
    ((150, 70, 333, {"softcap": 3.0, "z_loss": 0.1, "absent": "some"}), 64),
    pytest.param((65, 320, 256, {"z_loss": 0.1}), 64, marks=slow),  # more steps than stages
    pytest.param((130, 64, 600, {"absent": "some"}), 256, marks=slow),  # the tiles of a GPU
    pytest.param((20, 64, 300, {"softcap": 600.0}), 128, marks=slow),
    pytest.param((256, 128, 128, {}), 64, marks=slow),  # all edges at edges of tiles
    pytest.param((9, 8, 20, {"absent": "all", "z_loss": 0.1}), None, marks=slow),
    pytest.param((1, 1, 1, {}), None, marks=slow),
    pytest.param((1, 7, 65, {"softcap": 2.0}), 64, marks=slow),
]


@pytest.mark.parametrize(
    ("sizes", "width"), CASES, ids=lambda x: row(*x[:3], **x[3]).label() if isinstance(x, tuple) else f"width={x}"
)
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=slow)])
@pytest.mark.sampled(2)
def test_output_and_gradients_match_without_races(sizes, width, dtype, small_parts, monkeypatch):
    monkeypatch.setattr(common, "MIN_CHUNK", max(128, width or 256))  # a chunk has at least one tile
    *shape, kind = sizes
    case = row(*shape, **kind)
    inputs, aux, dout = cases.draw(case)
    options = case.options()
    run = functools.partial(
        two_blocks.run_two_blocks_checked, functools.partial(vjp.linear_cross_entropy, **options), width
    )
    outputs = tolerance.assert_matches_reference(
        "linear_cross_entropy", "hopper", inputs, dout, dtype, aux=aux, options=tuple(options.items()), run=run
    )
    absent = aux["targets"] < 0
    assert not np.any(outputs["o"][absent]) and not np.any(tolerance.to_float64(outputs["dh"])[absent])
    # The losses of 16-bit inputs are float32, and exact: the bound of 16 bits says little about them.
    rounded = {name: jnp.asarray(x, dtype).astype(jnp.float32) for name, x in inputs.items()}
    exact = kernels.linear_cross_entropy(**rounded, **aux, **options, implementation="reference")
    np.testing.assert_allclose(outputs["o"], exact, rtol=2e-6, atol=2e-5)


def simulate(h, w, targets, dloss, *, width=64):
    """The losses, dh and dw on two simulated thread blocks, without the checks of memory."""
    f = functools.partial(vjp.linear_cross_entropy, blocks=2, width=width, interpret=plgpu.InterpretGPUParams())

    @jax.jit
    def run(h, w, dloss):
        losses, pull = jax.vjp(lambda h, w: f(h, w, targets), h, w)
        return losses, *pull(dloss)

    return dict(zip(("o", "dh", "dw"), run(h, w, dloss), strict=True))


def test_rows_without_part_have_no_effect_and_runs_are_equal(small_parts):
    case = row(70, 64, 200, absent="some")
    inputs, aux, dout = cases.draw(case)
    h, w = (jnp.asarray(inputs[name], "bfloat16") for name in "hw")
    targets, dout = jnp.asarray(aux["targets"]), jnp.asarray(dout, jnp.float32)
    absent = targets < 0
    poisoned = jnp.where(absent[:, None], jnp.nan, h), w, targets, jnp.where(absent, jnp.nan, dout)
    tolerance.assert_bit_equal(simulate(h, w, targets, dout), simulate(*poisoned))


def test_large_logits_and_small_gradients_fit(small_parts):
    """Logits whose exponentials overflow, in the second split and in the first columns of a tile; float16."""
    w = jnp.linspace(-1, 1, 300).at[260].set(120).astype(jnp.float16)[:, None]
    h = jnp.asarray([[100], [-100], [3], [-500]], jnp.float16)
    targets, dloss = jnp.int32([260, 0, 3, 260]), jnp.full(4, 2.0**-20, jnp.float32)
    got = simulate(h, w, targets, dloss, width=128)

    def losses(h, w):
        return kernels.linear_cross_entropy(h, w, targets, implementation="reference")

    expected, pull = jax.vjp(losses, h.astype(jnp.float32), w.astype(jnp.float32))
    for name, value in zip(("o", "dh", "dw"), (expected, *pull(dloss)), strict=True):
        np.testing.assert_allclose(np.float32(got[name]), value, rtol=2e-3, atol=2.0**-24, err_msg=name)


def test_tanh_is_exact_near_zero_and_far_from_it():
    for softcap in (2.0, 256.0, 1e6):
        s = np.float32(softcap) * np.concatenate([np.linspace(-20, 20, 999), np.geomspace(1e-6, 1, 99)]).astype("f")
        t = softcap_tanh(jnp.asarray(s), scale=1.0, softcap=softcap)
        exact = np.tanh(s.astype(np.float64) / softcap)
        error = np.abs(t - exact) / (1 if softcap <= 256 else np.abs(exact) + 1e-30)
        assert error.max() < (2e-7 if softcap <= 256 else 4e-6)


@pytest.mark.parametrize("V", [1, 255, 32000, 50257, 151936])
def test_splits_are_not_empty_and_keep_the_sms_busy(V):
    for N in (1, 128, 1000, 8192, 100_000):
        tiles, rows = -(-V // block_sizes.BLOCK_V), -(-N // block_sizes.BLOCK_N)
        per_split = block_sizes.tiles_per_split(N, V, block_sizes.BLOCK_V, 132)
        assert 1 <= per_split <= tiles
        rounds = -(-rows * -(-tiles // per_split) // 132)
        least = max(1, rows * tiles / 132)  # tiles of an SM, if all had the same number
        assert least / (rounds * per_split) > (0.95 if rows * tiles > 40 * 132 else 0.5), (N, per_split)


def test_compiled_kernels_do_not_spill_and_use_the_tensor_cores():
    rows = json.loads((Path(__file__).parents[3] / "profiles/aot/h100.json").read_text())["rows"]
    ours = {key: row for key, row in rows.items() if key.startswith("linear_cross_entropy") and " / pallas / " in key}
    assert {key.split(" / ")[3] for key in ours} == {"bfloat16", "float16"} and len(ours) >= 12
    for key, row in ours.items():
        assert row["kernels"], key
        for kernel in row["kernels"]:
            assert kernel["spill_bytes"] == kernel["local"] == kernel["mma"] == 0 and kernel["wgmma"] > 0, key


def test_no_more_than_a_chunk_of_logits_is_kept():
    N, V, M = 8192, 151_936, 1024
    shapes = jax.ShapeDtypeStruct((N, M), jnp.bfloat16), jax.ShapeDtypeStruct((V, M), jnp.bfloat16)
    f = functools.partial(kernels.linear_cross_entropy, implementation="pallas")
    with dispatch.target_device("cuda", H100):
        jaxpr = jax.make_jaxpr(jax.grad(lambda h, w, t: f(h, w, t).mean(), argnums=(0, 1)))(
            *shapes, jax.ShapeDtypeStruct((N,), jnp.int32)
        )
    assert largest_intermediate(jaxpr) == V * M  # dw
    assert common.chunk_size(N, V, 256) == 2048


def test_unsupported_inputs_raise_with_the_reason(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    for dtype, softcap, reason in (
        ("float32", None, r"h has dtype float32 and .* bfloat16 and float16 here; implementation='triton' runs here"),
        ("bfloat16", 1e20, r"softcap is 1e\+20 and Hopper's kernels take 2\*\*-40 to 2\*\*40"),
    ):
        x, targets = jnp.ones((8, 64), dtype), jnp.zeros(8, jnp.int32)
        with pytest.raises(NotImplementedError, match=reason.split(";")[0]):
            vjp.linear_cross_entropy(x, x, targets, softcap=softcap)
        with dispatch.target_device("cuda", H100), pytest.raises(NotImplementedError, match=reason):
            kernels.linear_cross_entropy(x, x, targets, softcap=softcap, implementation="pallas")


def test_pallas_gpu_requires_hopper():
    x, targets = jnp.ones((8, 64), jnp.bfloat16), jnp.zeros(8, jnp.int32)
    names = lambda: str(jax.make_jaxpr(kernels.linear_cross_entropy)(x, x, targets))
    with dispatch.target_device("cuda", H100):
        assert kernels.implementations("linear_cross_entropy")["pallas"] is None
        assert "warpgroup" in names()
    with dispatch.target_device("cuda", A100):
        assert "requires Hopper" in kernels.implementations("linear_cross_entropy")["pallas"]


@pytest.mark.parametrize("around", ["vmap", "shard_map", "shard_map without checks"])
def test_gradients_trace_under_vmap_and_shard_map(around):
    h, w = jnp.ones((2, 40, 64), jnp.bfloat16), jnp.ones((100, 64), jnp.bfloat16)
    targets = jnp.zeros((2, 40), jnp.int32)

    def gradients(h: jax.Array, w: jax.Array, targets: jax.Array) -> tuple[jax.Array, ...]:
        f = functools.partial(kernels.linear_cross_entropy, targets=targets, implementation="pallas")
        losses, pull = jax.vjp(lambda h, w: f(h, w), h, w)
        return losses, *pull(losses)

    if around == "vmap":
        run, args, lead = jax.vmap(gradients, (0, None, 0)), (h, w, targets), (2,)
    else:
        mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        spec, same = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
        checked = around == "shard_map"
        outs = spec, spec, same if checked else spec
        run = jax.shard_map(gradients, mesh=mesh, in_specs=(spec, same, spec), out_specs=outs, check_vma=checked)
        args, lead = (h[0], w, targets[0]), ()
    with dispatch.target_device("cuda", H100):
        shapes = jax.tree.map(lambda x: (x.shape, x.dtype.name), jax.eval_shape(run, *args))
    assert shapes == (((*lead, 40), "float32"), ((*lead, 40, 64), "bfloat16"), ((*lead, 100, 64), "bfloat16"))


def test_second_derivative_is_refused():
    x, targets = jnp.ones((8, 64), jnp.bfloat16), jnp.zeros(8, jnp.int32)
    gradient = jax.grad(lambda h: vjp.linear_cross_entropy(h, x, targets).sum())
    with pytest.raises(NotImplementedError, match="implementation='pallas' has no second derivative"):
        jax.eval_shape(jax.grad(lambda h: gradient(h).sum()), x)
