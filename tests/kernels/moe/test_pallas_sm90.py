"""The mixture of experts on Hopper, on a simulated GPU that checks memory: values, gradients, races, limits."""

import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from dantinox import kernels
from dantinox.kernels import dispatch, workloads
from dantinox.kernels.ops.grouped_matmul.pallas_sm90.block_sizes import BLOCK_M
from dantinox.kernels.ops.grouped_matmul.pallas_sm90.tile_scheduler import tma_group_metadata
from dantinox.kernels.ops.moe.pallas_sm90 import vjp as experts_vjp
from dantinox.kernels.ops.moe.pallas_sm90.down_proj_bwd import gather_row_values
from tests.helpers import cases, tolerance, two_blocks

H100 = "NVIDIA H100 80GB HBM3"
slow = pytest.mark.slow


CLAMPED = ("swiglu_clamped", 1.25, 1.702)


def row(N: int, E: int, k: int, M: int = 64, F: int = 64, skew: str = "uniform", **kind) -> workloads.MoE:
    return cases.make_workload(workloads.MoE, N=N, M=M, F=F, E=E, k=k, skew=skew, **kind)


def draw_scaled(case: workloads.MoE) -> cases.DrawnArrays:
    """Matrices of the size that keeps features near 1, as in a network."""
    inputs, aux, dout = cases.draw(case)
    for name, width in (("w_gate", case.M), ("w_up", case.M), ("w_down", case.F)):
        inputs[name] /= math.sqrt(width)
    return inputs, {name: jnp.asarray(x) for name, x in aux.items()}, dout


run_on_two_blocks = functools.partial(two_blocks.run_on_two_blocks, experts_vjp.moe_mlp)


CASES = [
    # An idle expert, tiles of two experts, both warpgroups and one, a last tile past the rows, a quarter of features.
    (row(75, 4, 2, F=320, skew="one"), 256),
    pytest.param(row(1, 3, 2), None, marks=slow),
    pytest.param(row(1, 1, 1), 256, marks=slow),
    pytest.param(row(65, 3, 2, skew="uniform", M=128), 128, marks=slow),
    pytest.param(row(150, 5, 1, skew="zipf"), None, marks=slow),
    pytest.param(row(150, 6, 1, skew="empty", M=192), 256, marks=slow),
    pytest.param(row(140, 1, 1, F=320), 256, marks=slow),  # everything to one expert
    pytest.param(row(20, 9, 3, skew="zipf", M=64, F=256), 256, marks=slow),
    pytest.param(row(75, 4, 2, F=128, skew="one", biases=True, activation=CLAMPED), 128, marks=slow),
    pytest.param(row(70, 4, 2, skew="empty", biases=True), 64, marks=slow),
    # Narrower swizzles, last columns and last steps of the contraction past the ends.
    pytest.param(row(75, 4, 2, M=80, F=176, skew="one"), 256, marks=slow),
    pytest.param(row(40, 3, 2, M=96, F=16, skew="zipf"), 128, marks=slow),
    pytest.param(row(40, 3, 2, M=32, F=144, skew="zipf", biases=True, activation=CLAMPED), None, marks=slow),
]


@pytest.mark.parametrize(
    ("case", "width"),
    CASES,
    ids=lambda x: x.label() if isinstance(x, workloads.MoE) else f"width={x or 'auto'}",
)
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=slow)])
@pytest.mark.slow
def test_output_and_gradients_match_without_races(case, width, dtype):
    inputs, aux, dout = draw_scaled(case)
    operation = functools.partial(experts_vjp.moe_mlp, **case.options())
    run = functools.partial(two_blocks.run_two_blocks_checked, operation, width)
    keep_float32 = ("expert_weights",)
    got = tolerance.assert_matches_reference(
        "moe_mlp",
        "hopper",
        inputs,
        dout,
        dtype,
        aux=aux,
        run=run,
        keep_float32=keep_float32,
        options=cases.options(case),
    )
    idle = [e for e in range(case.E) if e not in np.asarray(aux["expert_ids"])]
    for name in ("dw_gate", "dw_up", "dw_down"):
        assert not np.any(tolerance.to_float64(got[name])[idle]), f"{name} of an expert without tokens"


@pytest.mark.slow
def test_idle_expert_weights_do_not_affect_results():
    """NaN in an expert without tokens changes no bit."""
    inputs, aux, dout = draw_scaled(row(21, 3, 2))
    inputs = {name: jnp.asarray(x, "bfloat16") for name, x in inputs.items()}
    ids = jnp.where(aux["expert_ids"] == 1, 2, aux["expert_ids"]), jnp.asarray(dout, "bfloat16")
    poisoned = {name: x.at[1].set(jnp.nan) if name.startswith("w_") else x for name, x in inputs.items()}
    run = jax.jit(functools.partial(run_on_two_blocks, interpret=plgpu.InterpretGPUParams()))
    tolerance.assert_bit_equal(
        run(inputs, {"expert_ids": ids[0]}, ids[1]), run(poisoned, {"expert_ids": ids[0]}, ids[1])
    )


def test_gather_row_values_restores_row_order():
    rng, N, E = np.random.default_rng(0), 700, 5

    @jax.jit
    def gather(sizes: jax.Array) -> tuple[jax.Array, jax.Array]:
        metadata = tma_group_metadata(sizes, N)
        # Row n of the visits has the value n + 1; rows of no visit are NaN.
        number = metadata.row[:, None] + jnp.arange(BLOCK_M)
        owned = (metadata.row_start[:, None] <= number) & (number < metadata.row_end[:, None])
        owned &= (jnp.arange(len(metadata.group)) < metadata.count)[:, None]
        return gather_row_values(jnp.where(owned, number + 1.0, jnp.nan), metadata, N, E), jnp.sum(sizes)

    for _ in range(50):
        values, num_assigned = gather(rng.multinomial(rng.integers(0, N + 1), rng.dirichlet([0.4] * E)))
        np.testing.assert_array_equal(values, np.where(np.arange(N) < num_assigned, np.arange(N) + 1, 0))


def test_unsupported_inputs_raise_with_the_reason():
    ids, weights = jnp.zeros((8, 1), jnp.int32), jnp.ones((8, 1))
    for dtype, M, F, said in (
        ("float32", 64, 64, "float32"),
        ("bfloat16", 24, 64, "w_gate has M = 24"),
        ("float16", 64, 40, "w_gate has F = 40"),
    ):
        x, up, down = jnp.ones((8, M), dtype), jnp.ones((1, M, F), dtype), jnp.ones((1, F, M), dtype)
        with pytest.raises(NotImplementedError, match=said):
            experts_vjp.moe_mlp(x, up, up, down, ids, weights)
        with dispatch.target_device("cuda", H100), pytest.raises(NotImplementedError, match=said):
            kernels.moe_mlp(x, up, up, down, ids, weights, implementation="pallas")


def test_compiled_kernels_use_wgmma_without_spills():
    rows = json.loads((Path(__file__).parents[3] / "profiles/aot/h100.json").read_text())["rows"]
    ours = {key: row for key, row in rows.items() if key.startswith(("moe_mlp", "grouped_matmul")) and "pallas" in key}
    assert {key.split(" / ")[3] for key in ours} == {"bfloat16", "float16"} and len(ours) >= 30
    for key, row in ours.items():
        for kernel in row["kernels"]:
            assert kernel["spill_bytes"] == kernel["local"] == kernel["mma"] == 0 and kernel["wgmma"] > 0, key


def moe_inputs(N: int = 8, M: int = 64, F: int = 128, E: int = 2, k: int = 2) -> tuple[jax.Array, ...]:
    x, up, down = (jnp.ones(shape, jnp.bfloat16) for shape in ((N, M), (E, M, F), (E, F, M)))
    return x, up, up, down, jnp.zeros((N, k), jnp.int32), jnp.ones((N, k))


@pytest.mark.parametrize("around", ["vmap", "shard_map", "shard_map without checks"])
@pytest.mark.sampled(2)
def test_gradients_trace_under_vmap_and_shard_map(around):
    x, *experts, ids, weights = moe_inputs()

    def gradients(x: jax.Array, ids: jax.Array) -> tuple[jax.Array, ...]:
        y, pull = jax.vjp(lambda x, *ws: experts_vjp.moe_mlp(x, *ws, ids, weights), x, *experts)
        return y, *pull(y)

    if around == "vmap":
        run, args, lead = jax.vmap(gradients), (x[None], ids[None]), (1,)
    else:
        mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        spec, same = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
        checked = around == "shard_map"
        outs = (spec, spec, *[same if checked else spec] * 3)
        run = jax.shard_map(gradients, mesh=mesh, in_specs=(spec, spec), out_specs=outs, check_vma=checked)
        args, lead = (x, ids), ()
    shapes = jax.tree.map(lambda x: x.shape, jax.eval_shape(run, *args))
    assert shapes == tuple((*lead, *each.shape) for each in (x, x, *experts))


def test_gradients_of_biases_trace_under_shard_map():
    x, *experts, ids, weights = moe_inputs()
    biases = {name: jnp.ones((2, width), x.dtype) for name, width in (("b_gate", 128), ("b_up", 128), ("b_down", 64))}

    def gradients(x: jax.Array, ids: jax.Array) -> dict[str, jax.Array]:
        f = lambda biases: experts_vjp.moe_mlp(x, *experts, ids, weights, activation=CLAMPED, **biases)
        y, pull = jax.vjp(f, biases)
        return pull(y)[0]

    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    run = jax.shard_map(gradients, mesh=mesh, in_specs=(spec, spec), out_specs=jax.sharding.PartitionSpec())
    shapes = jax.tree.map(lambda x: x.shape, jax.eval_shape(run, x, ids))
    assert shapes == {name: b.shape for name, b in biases.items()}
