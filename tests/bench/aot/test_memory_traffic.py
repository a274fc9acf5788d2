"""Bytes that kernels move, against counts by hand, a simulated pipeline and the committed profiles."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from bench import numpy_interpreter
from bench.aot import hardware, memory_traffic, profile
from bench.aot.cases import Case
from bench.aot.tpu import block_transfers, products
from bench.numpy_interpreter.pallas import _Block
from dantinox import kernels
from dantinox.kernels import workloads
from dantinox.kernels.dispatch import target_device

ROOT = Path(__file__).parents[3]
V6E = hardware.get("v6e")


def counted(f, *args, known: bool = True, dtype=jnp.float32) -> list[int | None]:
    """Count the bytes moved by each kernel of f.

    Args:
        args: the shape of each argument, or its values.
        known: whether the values of the arguments are known to the counter.
    """
    values = {n: x for n, x in enumerate(args) if isinstance(x, np.ndarray)}
    shapes = [
        jax.ShapeDtypeStruct(x.shape, x.dtype) if n in values else jax.ShapeDtypeStruct(x, dtype)
        for n, x in enumerate(args)
    ]
    return [
        block_transfers.bytes_moved(call)
        for call in block_transfers.kernel_calls(jax.make_jaxpr(f)(*shapes), values if known else {})
    ]


def copied(x, grid: tuple[int, ...], block, index, out=None, tables=(), body=None, space=None):
    """x through blocks, to blocks of the same size or of another."""
    block_spec = pl.BlockSpec(block, index) if space is None else pl.BlockSpec(memory_space=space)

    def copy(*refs):
        refs[-1][...] = refs[-2][...]

    return pl.pallas_call(
        body or copy,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(tables),
            grid=grid,
            in_specs=[block_spec],
            out_specs=out or pl.BlockSpec(block, index),
        ),
    )(*tables, x)


def test_block_is_counted_when_its_index_changes():
    columns_outside = lambda x: copied(x, (2, 3), (4, 8), lambda j, i: (i, j))
    assert counted(columns_outside, (12, 16)) == [2 * 4 * 12 * 16]  # all of it, read and written
    whole_rows = lambda x: copied(x, (3, 2), (4, 16), lambda i, j: (i, 0))
    assert counted(whole_rows, (12, 16)) == [2 * 4 * 12 * 16]  # the second step of each finds its block there
    again = lambda x: copied(x, (2, 3), (4, 16), lambda j, i: (i, 0))
    assert counted(again, (12, 16)) == [2 * 2 * 4 * 12 * 16]
    one_result = lambda x: copied(x, (3,), (4, 16), lambda i: (i, 0), out=pl.BlockSpec((4, 16), lambda i: (1, 0)))
    assert counted(one_result, (12, 16)) == [4 * 12 * 16 + 4 * 4 * 16]


def test_partial_block_counts_only_bytes_inside_the_array():
    rows = lambda x: copied(x, (3,), (4, 3), lambda i: (i, 0))
    assert counted(rows, (10, 3), dtype=jnp.bfloat16) == [2 * 2 * 10 * 3]


def test_index_tables_and_grid_size_are_evaluated():
    def run(x, order):
        last = jnp.max(order)  # how many steps: known only by the values
        step = lambda i, order: (order[i], 0)
        return jax.jit(lambda: copied(x, (last,), (4, 8), step, tables=(order // 2,)))()

    order = np.int32([4, 5, 0, 1, 0])  # over 2: blocks 2, 2, 0, 0, 0
    assert counted(run, (12, 8), order) == [2 * 4 * 2 * 4 * 8]
    with pytest.raises(NotImplementedError, match="depends on unknown values"):
        counted(run, (12, 8), order, known=False)


def test_kernel_in_a_branch_counts_when_the_branch_is_known():
    few, many = (lambda x, rows=rows: copied(x, (8 // rows,), (rows, 8), lambda i: (0, 0)) for rows in (4, 8))
    run = lambda x, n: jax.lax.cond(n > 0, many, few, x)
    assert [counted(run, (8, 8), np.array(n, np.int32)) for n in (0, 1)] == [[2 * 4 * 4 * 8], [2 * 4 * 8 * 8]]
    with pytest.raises(NotImplementedError, match="cond"):
        counted(run, (8, 8), np.array(1, np.int32), known=False)


def test_kernel_with_manual_copies_is_not_counted():
    def body(x_ref, o_ref):
        pltpu.sync_copy(x_ref, o_ref)

    run = lambda x: copied(x, (2,), (8, 8), lambda i: (0, 0), body=body, space=pltpu.HBM)
    assert counted(run, (8, 8)) == [None]


M, F = 256, 128


@pytest.mark.parametrize(
    ("sizes", "tiles", "visits"), [((256,), 2, 2), ((0, 256, 0), 2, 2), ((100, 156), 2, 3), ((10, 0, 50, 196), 2, 4)]
)
@pytest.mark.sampled(3)
def test_grouped_matmul_traffic_matches_a_count_by_hand(sizes, tiles, visits):
    """Tiles of 128 rows. Where groups share one, it stays on the chip unless the contraction takes several steps."""
    from jax.experimental.pallas.ops.tpu.megablox import ops

    E, N, busy = len(sizes), 128 * tiles, np.count_nonzero(sizes)
    ours = lambda x, w, sizes: kernels.grouped_matmul(x, w, sizes, implementation="pallas")
    with target_device(V6E.platform, V6E.kind):
        counts = counted(ours, (N, M), (E, M, F), np.int32(sizes), dtype=jnp.bfloat16)
    assert counts == [2 * (N * M + busy * M * F + N * F)]
    two_steps = lambda x, w, sizes: ops.gmm(x, w, sizes, jnp.bfloat16, (128, 128, 128))
    counts = counted(two_steps, (N, M), (E, M, F), np.int32(sizes), dtype=jnp.bfloat16)
    assert counts == [2 * (visits * 128 * M + visits * M * F + N * F)]


def simulated(monkeypatch, f, *args) -> int:
    """Bytes that a simulated pipeline loads and writes while NumPy runs f."""
    total = [0]
    prefetch, leave = _Block.prefetch, _Block.leave

    def loading(self, at):
        before = self.chip
        prefetch(self, at)
        if self.loads and self.ahead[1] is not before:
            total[0] += self.array[self.window(at)[0]].nbytes

    def leaving(self):
        if self.ahead is None or self.ahead[0] != self.at:
            total[0] += self.array[self.window(self.at)[0]].nbytes
        leave(self)

    monkeypatch.setattr(_Block, "prefetch", loading)
    monkeypatch.setattr(_Block, "leave", leaving)
    numpy_interpreter.run(f, *args)
    return total[0]


def cases():
    rows = [*workloads.select("grouped_matmul", "parity"), *workloads.select("moe_mlp", "parity")]
    small = [workload for workload in rows if workload.N <= 580]
    return [
        pytest.param(workload, id=f"{workload.op} {workload.name}")
        for workload in (*small, *workloads.select("decode_attention", "parity"))
    ]


@pytest.mark.parametrize("workload", cases())
@pytest.mark.sampled(40)
def test_traffic_matches_a_simulated_pipeline(monkeypatch, workload):
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in workload.shapes().values()]
    (values,) = workload.integer_inputs().values()
    names, operation = list(workload.shapes()), functools.partial(getattr(kernels, workload.op), **workload.options())

    def both(*args):
        def forward(*inputs):
            return operation(
                **dict(zip(names, inputs)), **dict(zip(workload.integer_inputs(), args[-1:])), implementation="pallas"
            )

        y, pull = jax.vjp(forward, *args[:-1])
        return y, *pull(y)

    def step(*args):
        inputs, rings = args[: len(names)], dict(zip((*workload.cache("float32"), "length"), args[len(names) :]))
        return operation(**dict(zip(names, inputs)), cache=kernels.KVCache(**rings), implementation="pallas")

    run = both
    if workload.op == "decode_attention":
        run = step
        arrays += [np.zeros(shape, dtype) for shape, dtype in workload.cache("float32").values()]
    with target_device(V6E.platform, V6E.kind):
        counts = counted(run, *(x.shape for x in arrays), values)
        assert counts and sum(counts) == simulated(monkeypatch, run, *arrays, values)


def test_minimum_traffic_is_each_array_once():
    for workload in workloads.select("grouped_matmul", "aot", "tpu"):
        y, dx, dw = (products.min_bytes(workload, product) for product in ("y", "dx", "dw"))
        dy_again = workload.itemsize * workload.N * workload.F  # two kernels read it
        assert (y, dx + dw) == (workload.cost().bytes, workload.cost(backward=True).bytes + dy_again), workload.name
    (E, k, N, M, F), i = (8, 2, 1024, 512, 1024), 2
    workload = workloads.get("moe_mlp", "aot top 2 of 8")
    x, h, w = (i * n for n in (k * N * M, k * N * F, E * M * F))
    least = {"up": x + 2 * w + h, "down": h + w + x + 4 * k * N, "dh": x + w + 5 * h + 8 * k * N}
    least |= {"dx": 2 * h + 2 * w + x, "dw_up": x + 2 * h + 2 * w, "dw_down": h + x + w}
    assert {product: products.min_bytes(workload, product) for product in least} == least


@pytest.mark.parametrize("target", products.TPUS)
@pytest.mark.slow
def test_profiles_contain_the_traffic_of_every_kernel(target):
    rows = profile.load(profile.path(ROOT / "profiles/aot", target))["rows"]
    seen = set()
    for key, row in rows.items():
        case = Case(*key.split(" / "))
        if case.op not in products.PRODUCTS or case.implementation not in memory_traffic.IMPLEMENTATIONS:
            continue
        for kernel in row.get("kernels", ()):
            product = products.product_of(case.op, kernel["name"])
            skewed = products.with_skews(workloads.get(case.op, case.spec))
            assert "moved" in kernel, f"{key}: python -m bench.aot.memory_traffic"
            for skew, workload in skewed.items():
                assert kernel["moved"][skew] >= products.min_bytes(workload, product), (key, kernel["name"], skew)
            seen.add((case.op, product))
    assert seen == {(op, product) for op, names in products.PRODUCTS.items() for product in names}


@pytest.mark.parametrize("op", products.PRODUCTS)
@pytest.mark.sampled(4)
def test_profile_traffic_matches_the_current_kernels(op):
    name = {"grouped_matmul": "Mixtral-8x7B uniform", "moe_mlp": "aot top 2 of 8", "decode_attention": "aot ring"}[op]
    case = Case(op, name, "pallas", "bfloat16", "forward" if op == "decode_attention" else "both")
    row = profile.load(profile.path(ROOT / "profiles/aot", V6E.name))["rows"][case.key]
    now = json.loads(json.dumps(row))
    memory_traffic.add(now, case, V6E)
    assert now == row, "`make aot`, or alone and quickly: python -m bench.aot.memory_traffic"
