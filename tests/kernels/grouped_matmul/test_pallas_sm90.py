"""The Hopper grouped matmul on a simulated GPU with race detection: values, races, unassigned rows, limits."""

import functools
import itertools
import re
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from bench.verification import race_detector
from dantinox import kernels
from dantinox.kernels import dispatch, first_use, workloads
from dantinox.kernels.ops.grouped_matmul.group_metadata import make_group_metadata
from dantinox.kernels.ops.grouped_matmul.pallas_sm90 import gmm, tgmm, tile_scheduler, vjp
from dantinox.kernels.ops.grouped_matmul.pallas_sm90.warp_specialized import Sm90GmmConfig
from dantinox.kernels.ops.moe.pallas_sm90.up_proj import up_proj
from tests.helpers import cases, tolerance, two_blocks

H100 = "NVIDIA H100 80GB HBM3"
slow = pytest.mark.slow


def row(*sizes: int, N: int = 0, M: int = 64, F: int = 64) -> workloads.GroupedMatmul:
    return cases.make_workload(workloads.GroupedMatmul, N=N or sum(sizes), M=M, F=F, E=len(sizes), sizes=sizes)


run_on_two_blocks = functools.partial(two_blocks.run_on_two_blocks, vjp.grouped_matmul)
run_two_blocks_checked = functools.partial(two_blocks.run_two_blocks_checked, vjp.grouped_matmul)


CASES = [
    # Tiles of two groups, runs of every size, an empty group, unassigned rows, a last tile past N; more steps than
    # stages, a quarter of a tile of columns, and one warpgroup's half of dw.
    (row(3, 0, 73, 51, N=129, M=192, F=320), 256),
    (row(0, 200, M=128, F=320), 128),
    (row(300, 0, 0, M=192, F=128), None),  # all to the first; one warpgroup's half of dw
    (row(0, 0, 257), 256),
    (row(0, 1), None),
    (row(0, 0, N=1), None),
    (row(127), 256),
    (row(128, 64, 64, N=264), 64),  # all edges at edges of tiles
    (row(0, 0, 0, N=200, F=192), 192),  # all rows unassigned
    (row(1, 2, 3, 4, 5, 6, 7, 8, 9, N=63), None),
    (row(63, 65, 130, 2, M=256, F=512), 192),
    # Narrower swizzles, and a last tile of columns and of the contraction past the ends.
    (row(3, 0, 73, 51, N=129, M=80, F=176), 256),
    (row(130, 1, M=96, F=16), 128),
    (row(5, 60, N=70, M=16, F=400), None),
]


@pytest.mark.parametrize(
    ("case", "width"),
    CASES,
    ids=lambda x: x.label() if isinstance(x, workloads.GroupedMatmul) else f"width={x or 'auto'}",
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.slow
def test_output_and_gradients_match_without_races(case, width, dtype):
    inputs, aux, dout = cases.draw(case)
    aux = {name: jnp.asarray(x) for name, x in aux.items()}
    run = functools.partial(run_two_blocks_checked, width)
    outputs = tolerance.assert_matches_reference("grouped_matmul", "hopper", inputs, dout, dtype, aux=aux, run=run)
    assert not np.any(tolerance.to_float64(outputs["o"])[sum(case.sizes) :]), "rows past the sum are zeros"
    assert not np.any(tolerance.to_float64(outputs["dw"])[np.array(case.sizes) == 0]), (
        "a group without rows has no gradient"
    )


@pytest.mark.parametrize("sizes", [(50, 0, 21), pytest.param((3, 0, 127), marks=slow)], ids=str)
def test_unassigned_rows_and_unused_matrices_do_not_affect_results(sizes):
    """Fills rows past the sum and matrices without rows with NaN."""
    case = row(*sizes, N=sum(sizes) + 9)
    inputs, aux, dout = cases.draw(case)
    inputs = {name: jnp.asarray(x, "bfloat16") for name, x in inputs.items()}
    dout, sizes = jnp.asarray(dout, "bfloat16"), jnp.asarray(aux["group_sizes"])
    unassigned = (jnp.arange(case.N) >= sum(case.sizes))[:, None]
    poisoned = {"x": jnp.where(unassigned, jnp.nan, inputs["x"]), "w": inputs["w"].at[1].set(jnp.nan)}
    run = jax.jit(functools.partial(run_on_two_blocks, interpret=plgpu.InterpretGPUParams()))
    once = run(inputs, {"group_sizes": sizes}, dout)
    tolerance.assert_bit_equal(once, run(poisoned, {"group_sizes": sizes}, jnp.where(unassigned, jnp.nan, dout)))


COLUMNS, TILES = 256, 8
LAUNCHED = {  # name -> (copies that fill a stage, what makes TILES tiles of one filling each)
    "y": (2, lambda config: gmm.gmm([ones(128, 64)], [ones(1, 64, TILES * COLUMNS)], SIZES, config)),
    "dw": (3, lambda config: tgmm.tgmm(ones(64, 128), ones(64, TILES * COLUMNS), SIZES // 2, config)),
    "up": (
        3,
        lambda config: up_proj(ones(128, 64), *[ones(1, 64, 4 * COLUMNS)] * 2, SIZES, config, save_residuals=False),
    ),
}
SIZES = np.array([128], np.int32)


def ones(*shape: int) -> jax.Array:
    return jnp.ones(shape, jnp.bfloat16)


@pytest.mark.parametrize("name", LAUNCHED)
@pytest.mark.sampled(2)
def test_next_tile_is_loaded_while_previous_one_is_stored(name, monkeypatch):
    """Blocks the first store until the producer has refilled the 4 stages, except for those not yet released."""
    copies, run = LAUNCHED[name]
    loaded, enough, in_time = itertools.count(1), threading.Event(), []
    load, store = race_detector.gpu_interpreter.copy_gmem_to_smem, race_detector.gpu_interpreter.copy_smem_to_gmem

    def count(**options: Any) -> Any:
        if next(loaded) > 4 * copies:
            enough.set()
        return load(**options)

    def hold(**options: Any) -> Any:
        in_time.append(enough.wait(timeout=30) if not in_time else True)
        return store(**options)

    monkeypatch.setattr(race_detector.gpu_interpreter, "copy_gmem_to_smem", count)
    monkeypatch.setattr(race_detector.gpu_interpreter, "copy_smem_to_gmem", hold)
    jax.block_until_ready(jax.jit(run, static_argnums=0)(Sm90GmmConfig(1, plgpu.InterpretGPUParams(), COLUMNS)))
    assert in_time[0], "the first tile is written, and nothing more is loaded"
    assert next(loaded) == TILES * copies + 1


@pytest.mark.parametrize("name", LAUNCHED)
def test_stage_is_released_after_its_wgmmas(name):
    """The simulated GPU multiplies synchronously, so this reads the jaxpr: one step is in flight, no more."""
    text = str(jax.make_jaxpr(LAUNCHED[name][1], static_argnums=0)(Sm90GmmConfig(1, None, COLUMNS)))
    assert sorted(map(int, re.findall(r"wgmma_wait\[n=(\d)\]", text))) == [0, text.count("wgmma_ref")]
    assert text.count("wgmma_ref") == (2 if name == "up" else 1)


def test_snake_order_visits_each_tile_once_panel_by_panel():
    snake_order = jax.jit(tile_scheduler.snake_order, static_argnums=2)
    for down, across in itertools.product((1, 2, 15, 16, 17, 40), (1, 3)):
        n = jnp.arange(down * across)
        tiles = np.stack(snake_order(n, down, across), axis=1)
        assert sorted(map(tuple, tiles)) == list(itertools.product(range(down), range(across)))
        panels = tiles[:, 0] // tile_scheduler.PANEL_ROW_TILES
        assert (np.diff(panels) >= 0).all()
        assert (np.abs(np.diff(tiles[:, 1])) <= 1).all(), "neighbouring columns follow each other"


def test_aligned_tiles_are_fewer_and_visit_each_row_once():
    rng, N = np.random.default_rng(0), 150
    aligned = jax.jit(functools.partial(make_group_metadata, N=N, block_m=16, align=8))
    spanning = jax.jit(functools.partial(make_group_metadata, N=N, block_m=16))
    for _ in range(100):
        sizes = rng.multinomial(rng.integers(0, N + 1), rng.dirichlet([0.4] * 6))
        metadata = aligned(sizes)
        assert int(metadata.count) <= int(spanning(sizes).count) <= len(metadata.group)
        owners = [[] for _ in range(N)]
        for group, top, low, high in np.stack([np.asarray(x)[: int(metadata.count)] for x in metadata[1:]], axis=1):
            assert top % 8 == 0 and 0 <= top < N
            for n in range(max(top, low), min(top + 16, high)):
                owners[n].append(group)
        assert owners == [[e] for e in np.repeat(np.arange(7), [*sizes, N - sizes.sum()])]


def test_unsupported_inputs_raise_with_the_reason():
    sizes = jnp.array([8], jnp.int32)
    for dtype, M, F, reason in (
        ("float32", 64, 64, "float32"),
        ("bfloat16", 24, 64, "M = 24"),
        ("float16", 64, 40, "F = 40"),
    ):
        x, w = jnp.ones((8, M), dtype), jnp.ones((1, M, F), dtype)
        with pytest.raises(NotImplementedError, match=reason):
            vjp.grouped_matmul(x, w, sizes)
        with dispatch.target_device("cuda", H100), pytest.raises(NotImplementedError, match=reason):
            kernels.grouped_matmul(x, w, sizes, implementation="pallas")


def abstract(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


IDS = jax.ShapeDtypeStruct((8, 2), jnp.int32)
OPERANDS = {
    "grouped_matmul": (abstract(8, 64), abstract(2, 64, 128), jax.ShapeDtypeStruct((2,), jnp.int32)),
    "moe_mlp": (abstract(8, 64), abstract(2, 64, 128), abstract(2, 64, 128), abstract(2, 128, 64), IDS, abstract(8, 2)),
}


@pytest.mark.parametrize("op", OPERANDS)
def test_pallas_gpu_requires_hopper(op, monkeypatch):
    names = lambda **how: str(jax.make_jaxpr(functools.partial(getattr(kernels, op), **how))(*OPERANDS[op]))
    with dispatch.target_device("cuda", H100):
        assert kernels.implementations(op)["pallas"] is None
        assert "warpgroup" in names(implementation="pallas")
        assert "warpgroup" in names()
        monkeypatch.setattr(first_use, "disagreement", lambda *_: "it failed its check")
        assert "warpgroup" not in names()
    with dispatch.target_device("cuda", "NVIDIA A100-SXM4-80GB"):
        assert "requires Hopper" in kernels.implementations(op)["pallas"]


def test_number_of_sms_follows_the_device_kind():
    kinds = {H100: 132, "NVIDIA H200": 132, "NVIDIA H20": 78, "NVIDIA H100 PCIe": 114, "NVIDIA GH200 480GB": 132}
    assert {kind: vjp.num_sms(kind) for kind in kinds} == kinds


@pytest.mark.parametrize("around", ["vmap", "shard_map", "shard_map without checks"])
def test_gradients_trace_under_vmap_and_shard_map(around):
    x, w = jnp.ones((2, 40, 64), jnp.bfloat16), jnp.ones((3, 64, 128), jnp.bfloat16)
    sizes = jnp.array([[8, 9, 10], [1, 2, 3]], jnp.int32)

    def gradients(x: jax.Array, w: jax.Array, sizes: jax.Array) -> tuple[jax.Array, ...]:
        y, pull = jax.vjp(lambda x, w: vjp.grouped_matmul(x, w, sizes), x, w)
        return y, *pull(y)

    if around == "vmap":
        run, args, lead = jax.vmap(gradients, (0, None, 0)), (x, w, sizes), (2,)
    else:
        mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        spec, same = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
        checked = around == "shard_map"
        outs = spec, spec, same if checked else spec
        run = jax.shard_map(gradients, mesh=mesh, in_specs=(spec, same, spec), out_specs=outs, check_vma=checked)
        args, lead = (x[0], w, sizes[0]), ()
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), jax.eval_shape(run, *args))
    assert shapes == tuple((shape, x.dtype) for shape in ((*lead, 40, 128), (*lead, 40, 64), (*lead, 3, 64, 128)))
