"""The Pallas grouped matmul: its visits and tiles, and each form of the kernel against the reference."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import numpy_interpreter
from bench.verification.fast_compile import jit_fast_compile
from dantinox import kernels
from dantinox.kernels.dispatch import Device, target_device
from dantinox.kernels.ops.grouped_matmul.group_metadata import make_group_metadata
from dantinox.kernels.ops.grouped_matmul.pallas_cpu import gmm
from dantinox.kernels.ops.grouped_matmul.pallas_tpu import block_sizes
from dantinox.kernels.ops.grouped_matmul.pallas_tpu.vmem import row_sums, split_contraction
from dantinox.kernels.ops.moe import pallas_cpu
from tests.helpers.jaxpr_walk import largest_intermediate

SIZES = ([5], [0], [3, 4], [0, 7, 0, 1], [4, 4, 0], [0, 0, 0], [1, 1, 1, 1, 9], [16, 0, 3])


@pytest.mark.parametrize("visit_empty_groups", [False, True], ids=["skip empty groups", "visit empty groups"])
def test_each_row_is_visited_once_by_its_group(visit_empty_groups):
    for sizes, spare, rows in itertools.product(SIZES, (0, 6), (1, 4, 8)):
        N, E = sum(sizes) + spare, len(sizes)
        if N == 0:
            continue
        make_metadata = functools.partial(make_group_metadata, N=N, block_m=rows, visit_empty_groups=visit_empty_groups)
        metadata = numpy_interpreter.run(lambda sizes, make=make_metadata: make(sizes), np.int32(sizes))
        table = np.stack([np.asarray(field)[: int(metadata.count)] for field in metadata[1:]], axis=1)
        assert int(metadata.count) <= len(metadata.group) == -(-N // rows) + E
        owners = [[] for _ in range(N)]
        for group, row, low, high in table:
            assert 0 <= row < N and row % rows == 0
            for n in range(max(row, low), min(row + rows, high, N)):
                owners[n].append(group)
        whose = np.repeat(np.arange(E + 1), [*sizes, spare])
        assert owners == [[] if visit_empty_groups and e == E else [e] for e in whose], (sizes, spare, rows)
        groups = table[:, 0].tolist()
        assert groups == sorted(groups)
        assert set(groups) == (set(range(E)) if visit_empty_groups else set(whose))


@pytest.mark.parametrize("full_large_tiles", [True, False], ids=["full large tiles", "partial large tiles"])
@pytest.mark.parametrize("sizes", [(8, 4, 1), (8, 2), (6, 5, 4, 3), (3,), (16, 8, 4), (1,)], ids=str)
@pytest.mark.sampled(6)
def test_cpu_tiles_cover_each_row_of_a_group_once(monkeypatch, sizes, full_large_tiles):
    monkeypatch.setattr(gmm, "EXTRA_TILE_COST_ROWS", 1)
    N = 17

    def rows(start: jax.Array, end: jax.Array) -> tuple[jax.Array, jax.Array]:
        """How often each row is a tile's own, and how many rows all tiles have."""

        def count(rows, row_mask, carry):
            seen, multiplied = carry
            row_mask = jnp.ones(rows.size, bool) if row_mask is None else row_mask
            return seen.at[rows.start + jnp.arange(rows.size)].add(row_mask.astype(jnp.int32)), multiplied + rows.size

        return gmm.for_each_row_tile(
            N, start, end, sizes, count, (jnp.zeros(N, jnp.int32), 0), full_large_tiles=full_large_tiles
        )

    for start, end in itertools.combinations_with_replacement(range(N + 1), 2):
        seen, multiplied = numpy_interpreter.run(rows, np.int32(start), np.int32(end))
        assert seen.tolist() == [int(start <= n < end) for n in range(N)], (start, end)
        # One tile at most is not full, and of two sizes the cheaper: never more than the next larger one.
        largest = sizes[1] if full_large_tiles and len(sizes) > 1 else sizes[0]
        assert end - start <= multiplied < end - start + largest


def test_cpu_tile_sizes_follow_group_sizes():
    for N, E in itertools.product((1, 7, 15, 16, 100, 4096, 10**6), (1, 8, 64, 256)):
        sizes = gmm.tile_sizes(N, E)
        assert list(sizes) == sorted(set(sizes), reverse=True)
        most = N if E == 1 else (N + 1) // 2  # one of all rows would be multiplied for every group
        assert sizes[0] == min(most, gmm.MAX_TILE_ROWS)
        assert min(most, gmm.MIN_TILE_ROWS) <= sizes[-1]
        if N >= gmm.MIN_TILE_ROWS * E:
            assert any(size <= N / E < 2 * size or size == gmm.MAX_TILE_ROWS for size in sizes)


def arrays(N: int, M: int, F: int, E: int) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    return jnp.array(rng.standard_normal((N, M)), jnp.float32), jnp.array(rng.standard_normal((E, M, F)), jnp.float32)


def output_and_gradients(x: jax.Array, w: jax.Array, sizes: jax.Array, name: str) -> tuple[jax.Array, ...]:
    y, pull = jax.vjp(lambda x, w: kernels.grouped_matmul(x, w, sizes, implementation=name), x, w)
    return y, *pull(jnp.cos(y))


@pytest.mark.parametrize("rows", [1, 3, 8, 37], ids="rows={}".format)
@pytest.mark.sampled(8)
def test_cpu_tile_size_does_not_change_grouped_matmul(monkeypatch, rows):
    (x, w), sizes = arrays(37, 6, 5, 4), jnp.array([9, 0, 13, 8])
    expected = output_and_gradients(x, w, sizes, "reference")
    monkeypatch.setattr(gmm, "tile_sizes", lambda *_: (rows,))
    for actual, reference_value in zip(output_and_gradients(x, w, sizes, "pallas"), expected, strict=True):
        np.testing.assert_allclose(actual, reference_value, rtol=1e-5, atol=1e-5)


def mixture(name: str, x: jax.Array, w: jax.Array, ids: jax.Array, weights: jax.Array) -> tuple[jax.Array, ...]:
    """Its output and its five gradients."""
    down = jnp.swapaxes(w, 1, 2) / 7
    run = lambda x, gate, up, down, p: kernels.moe_mlp(x, gate, up, down, ids, p, implementation=name)
    y, pull = jax.vjp(run, x, w, w[::-1] / 5, down, weights)
    return y, *pull(jnp.cos(y))


@pytest.mark.parametrize("sizes", [(1,), (3,), (64,), (64, 20), (8, 1), (32, 8, 3)], ids=str)
@pytest.mark.sampled(6)
def test_cpu_tile_sizes_do_not_change_moe_mlp(monkeypatch, sizes):
    """One expert has no rows, and some rows are of an expert that is not there."""
    (x, w), rng = arrays(37, 6, 5, 4), np.random.default_rng(1)
    args = x, w, jnp.array(rng.choice([0, 2, 3, 4], (37, 2))), jnp.array(rng.random((37, 2)), jnp.float32)
    monkeypatch.setattr(pallas_cpu, "TILE_SIZES", sizes)
    for actual, reference_value in zip(mixture("pallas", *args), mixture("reference", *args), strict=True):
        np.testing.assert_allclose(
            actual, reference_value, rtol=1e-4, atol=1e-5 * float(jnp.abs(reference_value).max())
        )


def test_one_compiled_program_serves_any_group_sizes():
    (x, w), seen = arrays(40, 6, 5, 8), []

    @jax.jit
    def run(sizes: jax.Array) -> tuple[jax.Array, ...]:
        seen.append(1)
        return output_and_gradients(x, w, sizes, "pallas")

    for sizes in ([5] * 8, [40] + [0] * 7, [0] * 8, [0] * 7 + [39]):
        actual, expected = run(jnp.array(sizes)), output_and_gradients(x, w, jnp.array(sizes), "reference")
        for a, b in zip(actual, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert len(seen) == 1


MAPPED = {"ids": (0, 0, None, 0), "experts": (0, None, 0, 0), "all but the ids": (None, None, 0, None),
          "all but the weights": (None, None, None, 0)}  # fmt: skip


@pytest.mark.parametrize("name", ["xla", "pallas"])
@pytest.mark.parametrize("shared", MAPPED)
@pytest.mark.sampled(20)
def test_vmap_equals_a_loop(name, shared):
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

    single, mapped = jit_fast_compile(run), jit_fast_compile(jax.vmap(run, axes))
    loop = [single(*[a[n] if axis == 0 else a for a, axis in zip(args, axes, strict=True)]) for n in range(2)]
    for actual, *looped in zip(mapped(*args), *loop, strict=True):
        np.testing.assert_allclose(actual, jnp.stack(looped), rtol=1e-5, atol=1e-5 * float(jnp.abs(actual).max()))


@pytest.mark.slow
def test_many_experts_with_few_tokens_match_reference():
    rng = np.random.default_rng(0)
    x, w_gate, w_up, w_down = (jnp.array(rng.standard_normal(s), jnp.float32) for s in ((1, 4), *[(256, 4, 4)] * 3))
    ids, weights = jnp.array(rng.permutation(256)[None, :8]), jnp.array(rng.random((1, 8)), jnp.float32)
    run = lambda name: kernels.moe_mlp(x, w_gate, w_up, w_down, ids, weights, implementation=name)
    np.testing.assert_allclose(run("pallas"), run("reference"), rtol=1e-4, atol=1e-4)


def test_expert_matrices_are_not_expanded_per_row():
    """No array has rows times groups elements, forward or backward."""
    (x, w), sizes = arrays(64, 8, 16, 32), jnp.full((32,), 2)
    jaxpr = jax.make_jaxpr(lambda x, w: output_and_gradients(x, w, sizes, "pallas"))(x, w)
    assert largest_intermediate(jaxpr.jaxpr) <= max(w.size, 64 * 33)


def test_float64_raises_with_its_name():
    with jax.enable_x64(True):
        x, w = jnp.ones((4, 3)), jnp.ones((2, 3, 5))
        assert x.dtype == jnp.float64
        with pytest.raises(NotImplementedError, match="float64"):
            kernels.grouped_matmul(x, w, jnp.array([2, 2]), implementation="pallas")
        assert kernels.grouped_matmul(x, w, jnp.array([2, 2])).dtype == jnp.float64


def test_block_sizes_fit_vmem_and_divide_shapes():
    for kind, (N, M, F, E) in itertools.product(
        ("TPU v5 lite", "TPU v6 lite", "TPU7x"),
        ((8192, 4096, 14336, 8), (8192, 14336, 4096, 8), (65536, 2048, 768, 128), (256, 2048, 768, 128)),
    ):
        device, counts = Device("tpu", kind), {"num_x": 1, "num_w": 2, "num_matrices": 3}
        sizes = block_sizes.gmm_block_sizes(device, N, E, M, F, **counts, transposed=False, itemsize=2)
        block_m, block_k, block_n = sizes.block_m, sizes.block_k, sizes.block_n
        assert block_m % sizes.block_m_sub == block_n % sizes.block_n_sub == 0
        assert sizes.block_k_sub is None or sizes.block_m_sub % sizes.mxu_m == 0
        assert M % block_k == 0 and F % block_n == 0
        blocks = block_m * block_k + 2 * block_k * block_n + 3 * block_m * block_n
        sums = 0 if block_k == M else 2 * 4 * block_m * block_n
        assert 2 * 2 * blocks + sums < sizes.vmem_bytes <= {"TPU7x": 64}.get(kind, 128) * 2**20
        # More than the default only where it saves reading x again: XLA uses the rest of VMEM.
        assert sizes.vmem_bytes == block_sizes.VMEM_BYTES or (kind != "TPU7x" and N == 8192)


CUTS = {
    "full contraction": {"block_k_sub": None},
    "mxu tile larger than a chunk": {"block_k_sub": None, "mxu_m": 16},
    "split k and n": {"block_k": 16, "block_n": 16, "block_n_sub": 16, "mxu_n": 8},
    "strips": {"block_n": 24, "block_n_sub": 8, "mxu_n": 8},
    "k slices": {"block_k_sub": 8},
    "leading k": {"block_k_sub": None, "leading_k": 8},
    "leading k, several columns": {"block_k_sub": None, "leading_k": 8, "mxu_n": 16},
    "split k and n, k slices": {"block_k": 16, "block_n": 16, "block_n_sub": 16, "mxu_n": 8, "block_k_sub": 8},
    "few chunk sizes": {"max_chunks": 3},
    "slices of two matrices": {"block_k_sub": 16},
}


def test_contraction_slice_spans_two_matrices():
    spans = lambda *sizes: [[(n, at.start, at.size) for n, at in term] for term in split_contraction(*sizes)]
    halves = [(0, 512, 256), (1, 0, 256)]
    assert spans(2, 768, 512) == [[(0, 0, 512)], halves, [(1, 256, 512)]]
    assert spans(1, 768, 512) == [[(0, 0, 512)], [(0, 512, 256)]]
    assert spans(2, 512, 512) == [[(0, 0, 512)], [(1, 0, 512)]]


@pytest.mark.parametrize("width", [40, 128, 200, 384], ids="width={}".format)
def test_row_sums_equal_jnp_sum(width):
    x = jnp.asarray(np.random.default_rng(0).integers(-9, 9, (16, width)), jnp.float32)
    np.testing.assert_array_equal(row_sums(x), jnp.sum(x, axis=1)[None])


@pytest.mark.parametrize("sides", CUTS.values(), ids=CUTS)
@pytest.mark.sampled(32)
def test_tpu_kernels_match_reference_with_each_block_size(monkeypatch, sides):
    """The body that is compiled for a TPU, with NaN in all memory that was never written."""
    monkeypatch.setattr(block_sizes, "choose_block_m", lambda *_, **__: (32 if "max_chunks" in sides else 16, 8))

    def cut(choose: Callable[..., block_sizes.GmmBlockSizes], *args: Any, **sizes: Any) -> block_sizes.GmmBlockSizes:
        # Only one product without an epilogue multiplies a leading part first.
        can_lead = not sizes.get("has_epilogue", True) and sizes.get("num_w") == 1
        return choose(*args, **sizes)._replace(**{"mxu_m": 8} | sides | ({} if can_lead else {"leading_k": None}))

    for name in ("gmm_block_sizes", "tgmm_block_sizes"):
        monkeypatch.setattr(block_sizes, name, functools.partial(cut, getattr(block_sizes, name)))
    (x, w), sizes = arrays(37, 24, 40, 4), jnp.array([9, 0, 13, 8])
    ids, weights = jnp.array(np.random.default_rng(1).integers(0, 3, (37, 2))), jnp.linspace(0, 1, 74).reshape(37, 2)

    def both(name: str, x: jax.Array, w: jax.Array, weights: jax.Array) -> tuple[jax.Array, ...]:
        return *output_and_gradients(x, w, sizes, name), *mixture(name, x, w / 5, ids, weights)

    expected = both("reference", x, w, weights)
    with target_device("tpu", "TPU v6 lite"):
        actual = numpy_interpreter.run(functools.partial(both, "pallas"), x, w, weights)
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(b).max()))
