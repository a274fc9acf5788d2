"""Branches and loops of kernels over their grids, against counts by hand, plain Python and the schedules of blocks."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from bench.aot import hardware
from bench.aot.cases import Case
from bench.aot.tpu import attention_bundles, block_transfers, gmm_bundles, grid_steps, products, traced_kernels
from bench.aot.tpu.grid_steps import Part
from dantinox.kernels import workloads
from dantinox.kernels.dispatch import Device
from dantinox.kernels.ops.attention.pallas_tpu import common

V6E = hardware.get("v6e")
BLOCK = pl.BlockSpec((8, 128), lambda *place: (0, 0))


def body_of(kernel, grid, *tables: np.ndarray, scratch=(), batch: int = 0) -> Part:
    """The counted body of a kernel with an input, an output and tables in scalar memory."""
    call = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(tables), grid=grid, in_specs=[BLOCK], out_specs=BLOCK, scratch_shapes=scratch
        ),
    )
    shape = (batch, 8, 128) if batch else (8, 128)
    traced = jax.make_jaxpr(jax.vmap(call) if batch else call)(*tables, jax.ShapeDtypeStruct(shape, jnp.float32))
    (found,) = block_transfers.kernel_calls(traced, dict(enumerate(tables)))
    return grid_steps.run_grid(found)


def counts(part: Part) -> dict[str, int]:
    """Count by name, of a part's own parts."""
    assert len({inner.name for inner in part.parts}) == len(part.parts)
    return {inner.name: inner.count for inner in part.parts}


def add_one(ref):
    ref[...] += 1.0


def test_branches_by_place_in_the_grid():
    def kernel(x_ref, o_ref):
        i, j = pl.program_id(0), pl.program_id(1)

        @pl.when(j == 0)
        def init():
            o_ref[...] = jnp.zeros_like(o_ref)

        @pl.when(j <= i)
        def visible():
            o_ref[...] += jnp.exp(x_ref[...])

            @pl.when((i + j) % 3 == 0)
            def third():
                o_ref[...] += jnp.dot(x_ref[...], x_ref[...].T)[:, :1]

        @pl.when(j == pl.num_programs(1) - 1)
        def write():
            add_one(o_ref)

    body = body_of(kernel, (5, 7))
    places = list(itertools.product(range(5), range(7)))
    visible = [(i, j) for i, j in places if j <= i]
    third = [(i, j) for i, j in visible if (i + j) % 3 == 0]
    assert body.count == 35
    assert counts(body) == {"init": 5, "visible": len(visible), "write": 5} == {"init": 5, "visible": 15, "write": 5}
    assert counts(body.parts[1]) == {"third": len(third)}
    units = {part.name: (part.has_matmul, part.has_transcendental) for part in (*body.parts, body.parts[1].parts[0])}
    assert units == {
        "init": (False, False),
        "visible": (True, True),
        "third": (True, False),
        "write": (False, False),
    }


def test_tables_decide_branches_and_loops():
    starts, ends = np.int32([0, 3, 3, 10]), np.int32([3, 3, 9, 50])

    def kernel(start, end, x_ref, o_ref):
        t = pl.program_id(0)

        @pl.when(end[t] > start[t])
        def occupied():
            @pl.loop(start[t], end[t], step=4)
            def chunk(row):
                @pl.when(row % 8 == 0)
                def aligned():
                    add_one(o_ref)

    body = body_of(kernel, (4,), starts, ends)
    (occupied,) = body.parts
    rows = [row for start, end in zip(starts, ends) for row in range(start, end, 4)]
    loop = occupied.parts[-1]
    while not loop.loop:
        entered, loop = loop, loop.parts[-1]
    assert (occupied.count, entered.count, loop.count) == (3, 3, len(rows)) == (3, 3, 13)
    assert loop.parts[-1].name == "aligned"
    assert loop.parts[-1].count == sum(row % 8 == 0 for row in rows)


def test_loops_of_fixed_length():
    def kernel(x_ref, o_ref):
        def early():
            add_one(o_ref)

        def late():
            add_one(o_ref)

        def always():
            add_one(o_ref)

        def rolled(n, total):
            pl.when(n < pl.program_id(0))(early)
            return total + n

        def unrolled(n, total):
            pl.when(total == 15 + n)(late)
            return total

        total = jax.lax.fori_loop(0, 6, rolled, 0)
        jax.lax.fori_loop(0, 2, unrolled, total, unroll=True)
        pl.when(total == 15)(always)

    body = body_of(kernel, (9,))
    assert [(part.name, part.loop, part.count) for part in body.parts] == [
        ("rolled", True, 9 * 6),
        ("late", False, 9),  # an unrolled loop is no part, and has its parts once per iteration
        ("late", False, 0),
        ("always", False, 9),
    ]
    assert counts(body.parts[0]) == {"early": sum(n < step for step in range(9) for n in range(6))}


def test_either_branch_and_several_branches():
    def kernel(x_ref, o_ref):
        def even():
            add_one(o_ref)

        def odd():
            o_ref[...] = x_ref[...]

        step = pl.program_id(0)
        jax.lax.cond(step % 2 == 0, even, odd)
        chosen = jax.lax.switch(step, [lambda: 4, lambda: 5, lambda: 6])

        @pl.when(chosen == 6)
        def last():
            add_one(o_ref)

    body = body_of(kernel, (7,))
    assert counts(body) == {"even": 4, "odd": 3, "last": 5}
    assert all(part.known for part in body.parts)


def test_loaded_data_gives_upper_bounds_or_an_error():
    def branch(x_ref, o_ref, scratch_ref):
        @pl.when(x_ref[0, 0] > 0)
        def positive():
            add_one(o_ref)

            @pl.when(pl.program_id(0) == 0)
            def first():
                add_one(o_ref)

        @pl.when(scratch_ref[0] == 0)
        def counted():
            scratch_ref[0] += 1

    body = body_of(branch, (5,), scratch=[pltpu.SMEM((1,), jnp.int32)])
    assert [(part.name, part.count, part.known) for part in (*body.parts, body.parts[0].parts[0])] == [
        ("positive", 5, False),
        ("counted", 5, False),
        ("first", 1, False),
    ]

    def loop(x_ref, o_ref):
        @pl.loop(0, x_ref[0, 0].astype(jnp.int32))
        def chunk(n):
            add_one(o_ref)

    with pytest.raises(grid_steps.UnknownStepsError, match="loaded data decides how often the loop"):
        body_of(loop, (5,))


def test_axes_that_vmap_added_are_not_the_kernels():
    def kernel(x_ref, o_ref):
        @pl.when(pl.program_id(0) == 2)
        def third():
            add_one(o_ref)

    body = body_of(kernel, (4,), batch=3)
    assert (body.count, counts(body)) == (12, {"third": 3})


def test_pipeline_inside_a_kernel_is_counted_as_its_loop():
    def step(x_ref, o_ref):
        @pl.when(pl.program_id(0) % 4 == 0)
        def every_fourth():
            o_ref[...] = x_ref[...]

    rows = pl.BlockSpec((8, 128), lambda n: (n, 0))

    def kernel(x_hbm, o_hbm):
        pltpu.emit_pipeline(step, grid=(32,), in_specs=[rows], out_specs=[rows])(x_hbm, o_hbm)

    in_hbm = pl.BlockSpec(memory_space=pl.ANY)
    shape = jax.ShapeDtypeStruct((256, 128), jnp.float32)
    call = pl.pallas_call(kernel, out_shape=shape, in_specs=[in_hbm], out_specs=in_hbm)
    with jax.sharding.use_abstract_mesh(traced_kernels.abstract_mesh(V6E)):
        (found,) = block_transfers.kernel_calls(jax.make_jaxpr(call)(shape), {})
    assert block_transfers.moved_blocks(found) == []
    body = grid_steps.run_grid(found)
    (loop,) = [part for part in body.parts if part.loop]
    assert (body.count, loop.count) == (1, 32)
    assert [part.count for part in loop.parts if part.name == "every_fourth"] == [8]


def traced(op: str, spec: str, implementation: str) -> list[tuple[str, block_transfers.KernelCall, Part]]:
    """The kernels of a forward and backward program, the first way to spread rows, with their counted bodies."""
    calls = next(iter(traced_kernels.calls_by_skew(Case(op, spec, implementation, "bfloat16", "both"), V6E).values()))
    return [(call.name.rpartition("/")[2], call, grid_steps.run_grid(call)) for call in calls]


@pytest.mark.parametrize(
    "spec",
    [
        "aot d64 window, gate",
        "aot d128 causal",
        "aot odd lengths",
        "aot tpu d128 4k causal",
        "aot tpu d128 32k window 1024",
        "aot tpu d256 32k causal",
    ],
)
@pytest.mark.sampled(4)
def test_attention_takes_its_branches_as_its_schedule_of_blocks_says(spec):
    workload = workloads.get("attention", spec)
    config, heads = attention_bundles.pallas_config(workload, V6E)
    forward, *backward = traced("attention", spec, "pallas")
    expected = [attention_bundles.pallas_forward(config.block_schedule(), config, heads)]
    expected += [attention_bundles.pallas_backward(each.schedule, config, heads) for each in common.kv_spans(config)]
    assert len(backward) == len(expected) - 1
    bodies = [forward[2], *(body for _, _, body in backward)]
    by_steps = lambda pairs: sorted(pairs, key=str)
    assert by_steps((body.count, tuple(part.count for part in body.parts)) for body in bodies) == by_steps(
        (steps.steps, steps.taken) for steps in expected
    )
    mask_loops = [loop for part in bodies[0].parts for loop in part.parts if loop.loop]
    assert all(loop.count == expected[0].taken[2] * expected[0].trips for loop in mask_loops)


@pytest.mark.parametrize(
    ("spec", "implementation"),
    [
        ("aot tpu d128 4k causal", "splash"),
        ("aot tpu d128 4k causal", "splash_fused"),
        ("aot tpu d128 4k window 1024", "splash_512"),
    ],
)
@pytest.mark.sampled(2)
def test_splash_takes_its_branches_as_its_mask_says(spec, implementation):
    pytest.importorskip("jax.experimental.pallas.ops.tpu.splash_attention")
    workload = workloads.get("attention", spec)
    for name, _, body in traced("attention", spec, implementation):
        steps = attention_bundles.splash(workload, name, implementation)
        assert (body.count, tuple(part.count for part in body.parts)) == (steps.steps, steps.taken)


@pytest.mark.parametrize(
    "spec",
    [
        "aot E=8 uniform",
        *(pytest.param(spec, marks=pytest.mark.slow) for spec in ("Qwen3-30B-A3B zipf", "Mixtral-8x7B uniform")),
    ],
)
def test_grouped_matmul_takes_its_branches_as_its_visits_say(spec):
    workload = workloads.get("grouped_matmul", spec)
    sizes = products.with_skews(workload)["uniform"].integer_inputs()["group_sizes"]
    checked = 0
    for name, _, body in traced("grouped_matmul", spec, "pallas"):
        for steps in gmm_bundles.gmm_candidates(workload, "pallas", name, V6E, sizes):
            assert body.count == steps.steps
            check_branches(body.parts, steps.branches)
            checked += 1
    assert checked >= 2


def experts_steps(workload: workloads.MoE, name: str, sizes: np.ndarray) -> gmm_bundles.KernelSteps:
    """The steps of a kernel of our mixture of experts, which is a grouped matmul with other operands."""
    K, J = (workload.M, workload.F) if name in ("up", "dh", "dw_up") else (workload.F, workload.M)
    common = {field: getattr(workload, field) for field in ("name", "suites", "devices", "dtypes", "E")}
    grouped = workloads.GroupedMatmul(N=workload.N * workload.k, M=K, F=J, **common)
    operands = gmm_bundles.EXPERTS[name]
    product = "dw" if name.startswith("dw") else "dx" if operands.transposed else "y"
    operands = operands._replace(num_matrices=3) if name == "up" else operands  # it writes gate and up too
    device = Device(V6E.platform, V6E.kind)
    (steps,) = gmm_bundles.pallas_candidates(product, device, grouped, K, J, sizes, operands)
    return steps


@pytest.mark.parametrize("spec", ["aot top 2 of 8", pytest.param("Qwen3-30B-A3B decode", marks=pytest.mark.slow)])
def test_experts_take_their_branches_as_their_visits_say(spec):
    workload = products.with_skews(workloads.get("moe_mlp", spec))["uniform"]
    sizes = np.bincount(workload.integer_inputs()["expert_ids"].ravel(), minlength=workload.E)
    names = set()
    for kernel, _, body in traced("moe_mlp", spec, "pallas"):
        name = products.product_of("moe_mlp", kernel)
        steps = experts_steps(workload, name, sizes)
        assert body.count == steps.steps
        check_branches(body.parts, steps.branches)
        names.add(name)
    assert names == set(gmm_bundles.EXPERTS)


def check_branches(parts: list[Part], branches) -> None:
    """Compare parts with the branches that `gmm_bundles` expects."""
    assert [part.count for part in parts] == [branch.taken for branch in branches]
    for part, branch in zip(parts, branches):
        if branch.inner:
            check_branches(part.parts, branch.inner)
            continue
        trips, inner = [], part.parts
        while inner:
            trips += [each.count for each in inner if each.loop]
            inner = inner[0].parts
        assert tuple(trips) == tuple(branch.trips)
