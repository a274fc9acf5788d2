"""The Pallas grouped matmul from inside: its visits and tiles, and that each of its forms gives the rows."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dantinox import kernels
from dantinox.kernels.dispatch import Device, target_device
from dantinox.kernels.ops.grouped_matmul.group_metadata import make_group_metadata
from dantinox.kernels.ops.grouped_matmul.pallas_cpu import gmm
from dantinox.kernels.ops.grouped_matmul.pallas_tpu import block_sizes
from dantinox.kernels.ops.grouped_matmul.pallas_tpu.vmem import contraction, total
from dantinox.kernels.ops.moe import pallas_cpu
from tests import numpy_interpreter
from tests.helpers import tolerance
from tests.helpers.jaxpr_walk import largest

SIZES = ([5], [0], [3, 4], [0, 7, 0, 1], [4, 4, 0], [0, 0, 0], [1, 1, 1, 1, 9], [16, 0, 3])


@pytest.mark.parametrize("sums", [False, True])
def test_every_row_is_visited_once_by_its_group(sums):
    for sizes, spare, rows in itertools.product(SIZES, (0, 6), (1, 4, 8)):
        N, E = sum(sizes) + spare, len(sizes)
        if N == 0:
            continue
        plan = functools.partial(make_group_metadata, N=N, rows=rows, visit_empty_groups=sums)
        found = numpy_interpreter.run(lambda sizes, plan=plan: plan(sizes), np.int32(sizes))
        table = np.stack([np.asarray(each)[: int(found.count)] for each in found[1:]], axis=1)
        assert int(found.count) <= len(found.group) == -(-N // rows) + E
        owners = [[] for _ in range(N)]
        for group, row, low, high in table:
            assert 0 <= row < N and row % rows == 0
            for n in range(max(row, low), min(row + rows, high, N)):
                owners[n].append(group)
        whose = np.repeat(np.arange(E + 1), [*sizes, spare])
        assert owners == [[] if sums and e == E else [e] for e in whose], (sizes, spare, rows)
        groups = table[:, 0].tolist()
        assert groups == sorted(groups)
        assert set(groups) == (set(range(E)) if sums else set(whose))


@pytest.mark.parametrize("large_full", [True, False])
@pytest.mark.parametrize("sizes", [(8, 4, 1), (8, 2), (6, 5, 4, 3), (3,), (16, 8, 4), (1,)])
def test_interpreted_every_row_of_a_group_is_in_one_tile(monkeypatch, sizes, large_full):
    monkeypatch.setattr(gmm, "TURN", 1)
    N = 17

    def rows(start: jax.Array, end: jax.Array) -> tuple[jax.Array, jax.Array]:
        """How often each row is a tile's own, and how many rows all tiles have."""

        def count(rows, mine, carry):
            seen, multiplied = carry
            mine = jnp.ones(rows.size, bool) if mine is None else mine
            return seen.at[rows.start + jnp.arange(rows.size)].add(mine.astype(jnp.int32)), multiplied + rows.size

        return gmm.walk(N, start, end, sizes, count, (jnp.zeros(N, jnp.int32), 0), large_full=large_full)

    for start, end in itertools.combinations_with_replacement(range(N + 1), 2):
        seen, multiplied = numpy_interpreter.run(rows, np.int32(start), np.int32(end))
        assert seen.tolist() == [int(start <= n < end) for n in range(N)], (start, end)
        # One tile at most is not full, and of two sizes the cheaper: never more than the next larger one.
        largest = sizes[1] if large_full and len(sizes) > 1 else sizes[0]
        assert end - start <= multiplied < end - start + largest


def test_interpreted_tiles_are_about_as_large_as_groups():
    for N, E in itertools.product((1, 7, 15, 16, 100, 4096, 10**6), (1, 8, 64, 256)):
        found = gmm.sizes(N, E)
        assert list(found) == sorted(set(found), reverse=True)
        most = N if E == 1 else (N + 1) // 2  # one of all rows would be multiplied for every group
        assert found[0] == min(most, gmm.LARGEST)
        assert min(most, gmm.SMALLEST) <= found[-1]
        if N >= gmm.SMALLEST * E:
            assert any(size <= N / E < 2 * size or size == gmm.LARGEST for size in found)


def arrays(N: int, M: int, F: int, E: int) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    return jnp.array(rng.standard_normal((N, M)), jnp.float32), jnp.array(rng.standard_normal((E, M, F)), jnp.float32)


def output_and_gradients(x: jax.Array, w: jax.Array, sizes: jax.Array, name: str) -> tuple[jax.Array, ...]:
    y, pull = jax.vjp(lambda x, w: kernels.grouped_matmul(x, w, sizes, implementation=name), x, w)
    return y, *pull(jnp.cos(y))


@pytest.mark.parametrize("rows", [1, 3, 8, 37])
def test_no_tile_size_changes_the_result(monkeypatch, rows):
    (x, w), sizes = arrays(37, 6, 5, 4), jnp.array([9, 0, 13, 8])
    expected = output_and_gradients(x, w, sizes, "reference")
    monkeypatch.setattr(gmm, "sizes", lambda *_: (rows,))
    for mine, other in zip(output_and_gradients(x, w, sizes, "pallas"), expected, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-5)


def mixture(name: str, x: jax.Array, w: jax.Array, ids: jax.Array, weights: jax.Array) -> tuple[jax.Array, ...]:
    """Its output and its five gradients."""
    down = jnp.swapaxes(w, 1, 2) / 7
    run = lambda x, gate, up, down, p: kernels.moe_mlp(x, gate, up, down, ids, p, implementation=name)
    y, pull = jax.vjp(run, x, w, w[::-1] / 5, down, weights)
    return y, *pull(jnp.cos(y))


@pytest.mark.parametrize("sizes", [(1,), (3,), (64,), (64, 20), (8, 1), (32, 8, 3)])
def test_no_tile_size_changes_the_mixture(monkeypatch, sizes):
    """One expert has no rows, and some rows are of an expert that is not there."""
    (x, w), rng = arrays(37, 6, 5, 4), np.random.default_rng(1)
    args = x, w, jnp.array(rng.choice([0, 2, 3, 4], (37, 2))), jnp.array(rng.random((37, 2)), jnp.float32)
    monkeypatch.setattr(pallas_cpu, "SIZES", sizes)
    for mine, other in zip(mixture("pallas", *args), mixture("reference", *args), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-5 * float(jnp.abs(other).max()))


def test_one_program_serves_any_sizes():
    (x, w), seen = arrays(40, 6, 5, 8), []

    @jax.jit
    def run(sizes: jax.Array) -> tuple[jax.Array, ...]:
        seen.append(1)
        return output_and_gradients(x, w, sizes, "pallas")

    for sizes in ([5] * 8, [40] + [0] * 7, [0] * 8, [0] * 7 + [39]):
        mine, expected = run(jnp.array(sizes)), output_and_gradients(x, w, jnp.array(sizes), "reference")
        for a, b in zip(mine, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert len(seen) == 1


MAPPED = {"ids": (0, 0, None, 0), "experts": (0, None, 0, 0), "all but the ids": (None, None, 0, None),
          "all but the weights": (None, None, None, 0)}  # fmt: skip


@pytest.mark.parametrize("name", ["xla", "pallas"])
@pytest.mark.parametrize("shared", MAPPED)
def test_mapped_over_an_axis_it_is_a_loop(name, shared):
    """With gradients, of what is kept and of what is recomputed, where some inputs are the same along the axis."""
    (x, w), rng, axes = arrays(20, 6, 5, 4), np.random.default_rng(1), MAPPED[shared]
    ids, weights = jnp.array(rng.integers(0, 4, (2, 20, 2))), jnp.array(rng.random((2, 20, 2)), jnp.float32)
    args = jnp.stack([x, 2 * x]), jnp.stack([w, w[::-1]]), ids, weights
    args = [each if axis == 0 else each[0] for each, axis in zip(args, axes, strict=True)]

    def run(*args: jax.Array) -> tuple[jax.Array, ...]:
        def recomputed(x: jax.Array) -> jax.Array:
            down = jnp.swapaxes(args[1], 1, 2)
            return kernels.moe_mlp(x, args[1], args[1] / 5, down, *args[2:], implementation=name)

        return *mixture(name, *args), jax.grad(lambda x: jnp.sum(jax.checkpoint(recomputed)(x)))(args[0])

    one, all_ = tolerance.quick(run), tolerance.quick(jax.vmap(run, axes))
    loop = [one(*[a[n] if axis == 0 else a for a, axis in zip(args, axes, strict=True)]) for n in range(2)]
    for mine, *ones in zip(all_(*args), *loop, strict=True):
        np.testing.assert_allclose(mine, jnp.stack(ones), rtol=1e-5, atol=1e-5 * float(jnp.abs(mine).max()))


def test_many_experts_few_tokens():
    rng = np.random.default_rng(0)
    x, w_gate, w_up, w_down = (jnp.array(rng.standard_normal(s), jnp.float32) for s in ((1, 4), *[(256, 4, 4)] * 3))
    ids, weights = jnp.array(rng.permutation(256)[None, :8]), jnp.array(rng.random((1, 8)), jnp.float32)
    run = lambda name: kernels.moe_mlp(x, w_gate, w_up, w_down, ids, weights, implementation=name)
    np.testing.assert_allclose(run("pallas"), run("reference"), rtol=1e-4, atol=1e-4)


def test_matrices_are_not_expanded():
    """No array has rows times groups elements, forward or backward."""
    (x, w), sizes = arrays(64, 8, 16, 32), jnp.full((32,), 2)
    jaxpr = jax.make_jaxpr(lambda x, w: output_and_gradients(x, w, sizes, "pallas"))(x, w)
    assert largest(jaxpr.jaxpr) <= max(w.size, 64 * 33)


def test_float64_is_refused_by_name():
    with jax.enable_x64(True):
        x, w = jnp.ones((4, 3)), jnp.ones((2, 3, 5))
        assert x.dtype == jnp.float64
        with pytest.raises(NotImplementedError, match="float64"):
            kernels.grouped_matmul(x, w, jnp.array([2, 2]), implementation="pallas")
        assert kernels.grouped_matmul(x, w, jnp.array([2, 2])).dtype == jnp.float64


def test_tiles_fit_and_divide():
    for kind, (N, M, F, E) in itertools.product(
        ("TPU v5 lite", "TPU v6 lite", "TPU7x"),
        ((8192, 4096, 14336, 8), (8192, 14336, 4096, 8), (65536, 2048, 768, 128), (256, 2048, 768, 128)),
    ):
        here = Device("tpu", kind)
        found = block_sizes.product(here, N, E, M, F, xs=1, ws=2, wide=3, transposed=False, itemsize=2)
        assert found.rows % found.chunk == found.columns % found.strip == 0
        assert found.part is None or found.chunk % found.height == 0
        assert M % found.inner == 0 and F % found.columns == 0
        blocks = found.rows * found.inner + 2 * found.inner * found.columns + 3 * found.rows * found.columns
        sums = 0 if found.inner == M else 2 * 4 * found.rows * found.columns
        assert 2 * 2 * blocks + sums < found.vmem <= {"TPU7x": 64}.get(kind, 128) * 2**20
        # More than the rule only where it saves reading x again: the rest of VMEM is XLA's.
        assert found.vmem == block_sizes.VMEM_BYTES or (kind != "TPU7x" and N == 8192)


CUTS = {
    "whole": {"part": None},
    "a tile of products larger than a chunk": {"part": None, "height": 16},
    "cut": {"inner": 16, "columns": 16, "strip": 16, "width": 8},
    "strips": {"columns": 24, "strip": 8, "width": 8},
    "parts": {"part": 8},
    "a lead": {"part": None, "lead": 8},
    "cut, parts": {"inner": 16, "columns": 16, "strip": 16, "width": 8, "part": 8},
    "many sizes": {"chunks": 3},
    "parts of two matrices": {"part": 16},
}


def test_a_part_of_two_matrices_has_the_end_of_one_and_the_start_of_the_next():
    spans = lambda *sizes: [[(n, at.start, at.size) for n, at in term] for term in contraction(*sizes)]
    halves = [(0, 512, 256), (1, 0, 256)]
    assert spans(2, 768, 512) == [[(0, 0, 512)], halves, [(1, 256, 512)]]
    assert spans(1, 768, 512) == [[(0, 0, 512)], [(0, 512, 256)]]
    assert spans(2, 512, 512) == [[(0, 0, 512)], [(1, 0, 512)]]


@pytest.mark.parametrize("width", [40, 128, 200, 384])
def test_the_total_of_each_row(width):
    x = jnp.asarray(np.random.default_rng(0).integers(-9, 9, (16, width)), jnp.float32)
    np.testing.assert_array_equal(total(x), jnp.sum(x, axis=1)[None])


@pytest.mark.parametrize("sides", CUTS.values(), ids=CUTS)
def test_the_compiled_form_is_the_formula(monkeypatch, sides):
    """The body that is compiled for a TPU, with NaN in all memory that nobody wrote."""
    monkeypatch.setattr(block_sizes, "rows", lambda *_, **__: (32 if "chunks" in sides else 16, 8))

    def cut(choose: Callable[..., block_sizes.Tiles], *args: Any, **sizes: Any) -> block_sizes.Tiles:
        # Only a product of one matrix, without an epilogue, is given a lead.
        alone = {} if sizes.get("plain") and sizes.get("ws") == 1 else {"lead": None}
        return choose(*args, **sizes)._replace(**{"height": 8} | sides | alone)

    for name in ("product", "summed"):
        monkeypatch.setattr(block_sizes, name, functools.partial(cut, getattr(block_sizes, name)))
    (x, w), sizes = arrays(37, 24, 40, 4), jnp.array([9, 0, 13, 8])
    ids, weights = jnp.array(np.random.default_rng(1).integers(0, 3, (37, 2))), jnp.linspace(0, 1, 74).reshape(37, 2)

    def both(name: str, x: jax.Array, w: jax.Array, weights: jax.Array) -> tuple[jax.Array, ...]:
        return *output_and_gradients(x, w, sizes, name), *mixture(name, x, w / 5, ids, weights)

    expected = both("reference", x, w, weights)
    with target_device("tpu", "TPU v6 lite"):
        mine = numpy_interpreter.run(functools.partial(both, "pallas"), x, w, weights)
    for a, b in zip(mine, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(b).max()))
