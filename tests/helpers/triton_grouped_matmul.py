"""Checks of the Triton grouped matmul in Triton's interpreter: needs Triton, no GPU.

`python -m tests.helpers.triton_grouped_matmul NAME...` runs the named checks, or all, and prints one line for each; it
fails at the first that does not hold. `random_shapes=N` draws N problems. The cases of single features and of pairs are
those of `bench.judge`.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from tests.helpers.triton_attention import dot_of_tensor_cores, error, interpret, run_checks  # isort: skip (sets the environment)

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from bench.judge import triton_interpreter
from bench.verification.error_bound import bound_violations
from bench.verification.fast_compile import jit_fast_compile
from dantinox import kernels
from dantinox.kernels import workloads
from dantinox.kernels.ops.grouped_matmul.triton import block_sizes, common
from dantinox.kernels.workloads.types import SKEWS, spread

Array = jax.Array
Arrays = tuple[Array, Array, Array, Array]
NAMES = ("y", "dx", "dw")
KINDS = [(8, kind) for kind in ("16 bits", "16 bits, unaligned", "tf32", "tf32x3")]
SMALL = block_sizes.TritonBlockSizes(16, 16, 16, 4, 1)


def draw(sizes: Any, N: int, M: int, F: int, *, dtype: Any = "float32", seed: int = 0) -> Arrays:
    """Return x, w, the sizes and the cotangent of y."""
    rng = np.random.default_rng([seed, N, M, F])
    x, w, dy = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((N, M), (len(sizes), M, F), (N, F)))
    return x, w, jnp.asarray(sizes, jnp.int32), dy


def with_gradients(implementation: str) -> Callable[..., tuple[Array, Array, Array]]:
    """Return a function of the arrays of `draw` that returns y, dx and dw."""

    def run(x: Array, w: Array, group_sizes: Array, dy: Array) -> tuple[Array, Array, Array]:
        f = functools.partial(kernels.grouped_matmul, group_sizes=group_sizes, implementation=implementation)
        y, vjp = jax.vjp(f, x, w)
        return y, *vjp(dy)

    return run


def expected(arrays: Arrays) -> tuple[Array, Array, Array]:
    """Return the reference's results, computed in float32."""
    x, w, group_sizes, dy = arrays
    x, w, dy = (array.astype(jnp.float32) for array in (x, w, dy))
    return jax.jit(with_gradients("reference"))(x, w, group_sizes, dy)


def assert_right(arrays: Arrays, limit: float = 5e-6) -> tuple[Array, Array, Array]:
    """Compare with the reference; return the results."""
    actual = interpret(with_gradients("triton"), *arrays)
    shapes = [array.shape for array in arrays]
    for name, a, b in zip(NAMES, actual, expected(arrays), strict=True):
        assert a.shape == b.shape and error(a, b) < limit, (shapes, arrays[2], name, error(a, b))
    return actual


REFERENCE = jit_fast_compile(with_gradients("reference"))


def pad(x: Any, *shape: int) -> np.ndarray:
    """Return x in the corner of an array of zeros of a shape."""
    return np.pad(np.asarray(x), [(0, size - n) for size, n in zip(shape, x.shape, strict=True)])


def assert_within_bound(arrays: Arrays, what: Any, largest: tuple[int, int, int, int] | None = None) -> None:
    """Compare with the reference in float64 by the error rule, and unassigned rows and empty groups with zero.

    Args:
        arrays: those of `draw`.
        what: names the problem.
        largest: the largest N, E, M and F of the caller's problems: zeros fill the reference's arrays up to them, so
            that it compiles once.
    """
    x, w, group_sizes, dy = arrays
    actual = interpret(with_gradients("triton"), *arrays)
    N, E, M, F = largest or (*x.shape[:1], *w.shape)
    padded = pad(x, N, M), pad(w, E, M, F), pad(group_sizes, E), pad(dy, N, F)
    plain = REFERENCE(*padded)
    with jax.enable_x64(True):
        oracle = REFERENCE(*(a if a.dtype == np.int32 else a.astype(np.float64) for a in padded))
    plain, oracle = (
        [r[tuple(map(slice, a.shape))] for r, a in zip(each, actual, strict=True)] for each in (plain, oracle)
    )
    results = [dict(zip(("o", "dx", "dw"), each, strict=True)) for each in (actual, plain, oracle)]
    assert [a.dtype for a in actual] == [x.dtype] * 3
    assert not (wrong := bound_violations(*results, x.dtype)), (what, wrong)
    used = int(group_sizes.sum())
    assert not np.any(np.float32(actual[0][used:])) and not np.any(np.float32(actual[1][used:])), what
    assert not np.any(np.float32(actual[2][np.asarray(group_sizes) == 0])), what


@contextlib.contextmanager
def small_blocks() -> Iterator[None]:
    """Let small problems have several tiles of every kind, with rests of each."""
    tables = ("MANY_ROWS", "MANY_ROWS_OF_TWO", "MANY_ROWS_OF_FIVE", "FEW_ROWS", "FEW_ROWS_OF_TWO", "SUM_OVER_ROWS")
    with (
        mock.patch.multiple(block_sizes, MIN_BLOCK=16, **dict.fromkeys(tables, dict.fromkeys(KINDS, SMALL))),
        mock.patch.object(common, "GROUP", 2),
    ):
        yield


def check_features() -> None:
    """Every kind of group, and NaN in what must not matter, on as few rows as give several tiles of every kind."""
    with small_blocks():
        assert_right(draw((20, 0, 36, 1, 17), 74, 33, 50))
        x, w, sizes, dy = arrays = draw((18, 0, 25, 13), 70, 20, 35)
        kept = assert_right(arrays)
        unassigned = (jnp.arange(70) >= 56)[:, None]
        empty = jnp.arange(4)[:, None, None] == 1
        poisoned = jnp.where(unassigned, jnp.nan, x), jnp.where(empty, jnp.nan, w), sizes, dy.at[56:].set(jnp.nan)
        again = interpret(with_gradients("triton"), *poisoned)
        assert all(map(np.array_equal, again, kept)), "unassigned rows or the matrix of an empty group have an effect"
        assert not any(np.any(rows[56:]) for rows in kept[:2]) and not np.any(kept[2][1])


def check_hidden_values() -> None:
    """NaN of a group reaches its own results only."""
    x, w, sizes, dy = draw((18, 0, 25, 16), 70, 20, 35)
    with small_blocks():
        kept = interpret(with_gradients("triton"), x, w, sizes, dy)
        x, w, dy = x.at[20].set(jnp.nan), w.at[2, 3, 7].set(jnp.nan), dy.at[40, 5].set(jnp.inf)
        y, dx, dw = interpret(with_gradients("triton"), x, w, sizes, dy)
        others, own = np.r_[:18, 43:70], slice(18, 43)
        assert np.array_equal(y[others], kept[0][others]) and np.array_equal(dx[others], kept[1][others])
        assert np.array_equal(dw[[0, 1, 3]], kept[2][[0, 1, 3]])
        assert np.isnan(y[own]).any() and np.isnan(dx[own]).any() and np.isnan(dw[2]).any()


def check_sizes() -> None:
    """Sizes of one row, of one tile and of one more, in the tiles of a GPU too, and many groups."""
    for sizes, N in (((1,), 1), ((0, 1), 1), ((0, 0), 1), ((16,), 16), ((17, 15), 33), ((7, 0, 0), 40)):
        for M, F in ((1, 1), (7, 16), (16, 17), (33, 1)):
            with small_blocks():
                assert_right(draw(sizes, N, M, F))
    assert_right(draw((129, 1, 0, 127), 270, 65, 140))
    assert_right(draw((3, 5, 0, 1), 9, 130, 33))
    rng = np.random.default_rng(0)
    assert_right(draw(rng.multinomial(300, np.full(256, 1 / 256)), 310, 17, 20))


def check_tiles() -> None:
    """Each row is in one tile, whose rows have one group; tiles without rows come last."""
    tiles_of, rng = jax.jit(common.row_tiles, static_argnums=(1, 2)), np.random.default_rng(0)
    for block, E, N in ((16, 1, 1), (16, 40, 300), (32, 7, 129), (128, 5, 700)):
        for _ in range(30):
            sizes = rng.multinomial(rng.integers(N + 1), rng.dirichlet(np.full(E, 0.3)))
            groups, first, end = np.asarray(tiles_of(jnp.asarray(sizes, jnp.int32), N, block))
            assert len(groups) == -(-N // block) + E
            end = np.minimum(end, first + block)
            rows = [row for a, b in zip(first, end, strict=True) for row in range(a, b)]
            assert rows == list(range(N)), (sizes, N)
            group_of_row = np.append(np.repeat(np.arange(E), sizes), np.full(N - sizes.sum(), E))
            for group, a, b in zip(groups, first, end, strict=True):
                assert set(group_of_row[a:b]) <= {group}


def check_workloads() -> None:
    """The parity workloads and every skew, with gradients, within the error rule."""
    for row in workloads.select("grouped_matmul", "parity"):
        for dtype in (*row.dtypes, "float16"):
            assert_within_bound(draw(row.sizes, row.N, row.M, row.F, dtype=dtype), (row.name, dtype))
    for skew in SKEWS:
        for dtype in ("float32", "bfloat16", "float16"):
            with small_blocks():
                assert_within_bound(draw(spread(150, 6, skew), 160, 40, 24, dtype=dtype), (skew, dtype))


def check_random_shapes(examples: int = 10) -> None:
    """Random sizes, groups and dtypes, with NaN in unassigned rows, within the error rule."""
    for seed in range(examples):
        rng = np.random.default_rng(seed)
        E, M, F = (int(rng.integers(1, limit)) for limit in (9, 41, 41))
        N = int(rng.choice([rng.integers(1, 34), rng.integers(1, 81), rng.choice([16, 17, 32, 33, 64, 128, 129])]))
        used = int(rng.choice([N, rng.integers(N + 1)]))
        sizes = rng.multinomial(used, rng.dirichlet(np.full(E, rng.choice([0.1, 1.0, 100.0]))))
        dtype = str(rng.choice(["float32", "bfloat16", "float16"]))
        x, w, sizes, dy = draw(sizes, N, M, F, dtype=dtype, seed=seed)
        arrays = x.at[used:].set(jnp.nan), w, sizes, dy.at[used:].set(jnp.nan)
        with small_blocks() if rng.random() < 0.7 else contextlib.nullcontext():
            assert_within_bound(arrays, (seed, N, M, F, sizes, dtype), (129, 8, 40, 40))


def check_dtypes() -> None:
    """The products of 16 bits, with sums beyond float16 whose result fits."""
    with small_blocks():
        for dtype, limit in (("bfloat16", 2.0**-7), ("float16", 2.0**-10)):
            actual = assert_right(draw((20, 0, 25), 50, 40, 30, dtype=dtype), limit)
            assert [x.dtype for x in actual] == [dtype] * 3
        x, w = jnp.full((3, 40), 200, "float16"), jnp.full((1, 40, 2), 100, "float16")
        assert_right((x, w.at[:, 20:].set(-100), jnp.int32([3]), jnp.ones((3, 2), "float16")), 2.0**-10)


def check_tf32() -> None:
    """By default float32 is rounded to TF32: as exact as rounding, not as cutting off, and exact where asked for."""
    arrays = draw((30, 0, 34), 64, 64, 70)
    right, f = expected(arrays), with_gradients("triton")
    with mock.patch.object(triton_interpreter, "_dot", dot_of_tensor_cores):
        rounded = interpret(f, *arrays, precision="default")
    exact = interpret(f, *arrays, precision="high")

    def relative_rms(actual: Any) -> dict[str, float]:
        squares = zip(NAMES, actual, right, strict=True)
        return {name: float(np.sqrt(np.mean(np.square(a - b)) / np.mean(np.square(b)))) for name, a, b in squares}

    rms, exact_rms = relative_rms(rounded), relative_rms(exact)
    for name in NAMES:
        assert 1e-4 < rms[name] < 4e-4 and exact_rms[name] < 1e-6, (name, rms, exact_rms)


def check_vmap() -> None:
    """A batch over any of the arrays, also of batches, and of gradients."""
    x, w, sizes, dy = draw((4, 0, 7), 12, 20, 18)
    xs, ws, all_sizes = jnp.stack([x, 2 * x, -x]), jnp.stack([w, -w, w / 2]), jnp.int32([[4, 0, 7], [1, 2, 3], [0] * 3])
    f, reference = with_gradients("triton"), with_gradients("reference")
    with small_blocks():
        for axes in ((0, 0, 0, None), (0, None, None, None), (None, 0, None, None), (None, None, 0, None)):
            batch = [many if axis == 0 else one for axis, one, many in zip(axes, (x, w, sizes), (xs, ws, all_sizes))]
            batched = interpret(jax.vmap(f, in_axes=axes), *batch, dy)
            assert error(batched, jax.jit(jax.vmap(reference, in_axes=axes))(*batch, dy)) < 5e-6, axes
        twice = jax.vmap(jax.vmap(f, in_axes=(0, None, None, None)), in_axes=(None, 0, None, None))
        nested = interpret(twice, xs, ws, sizes, dy)
        assert error(jax.tree.map(lambda x: x[2, 1], nested), reference(xs[1], ws[2], sizes, dy)) < 5e-6


def check_shard_map() -> None:
    """Two devices, each with half of the rows, under `shard_map` with its default check; all matrices on both."""
    x, w, _, dy = draw((20, 14), 40, 20, 18)
    sizes = jnp.int32([12, 5, 3, 14])  # of the first device, then of the second
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, everywhere = PartitionSpec("data"), PartitionSpec()
    in_specs, out_specs = (rows, everywhere, rows, rows), (rows, rows, everywhere)
    sharded = jax.shard_map(with_gradients("triton"), mesh=mesh, in_specs=in_specs, out_specs=out_specs)
    with small_blocks():
        y, dx, dw = interpret(sharded, x, w, sizes, dy)
    parts = [expected((x[i : i + 20], w, sizes[j : j + 2], dy[i : i + 20])) for i, j in ((0, 0), (20, 2))]
    for n, rows_of_both in enumerate((y, dx)):
        assert error(rows_of_both, jnp.concatenate([part[n] for part in parts])) < 5e-6
    assert error(dw, parts[0][2] + parts[1][2]) < 5e-6


def check_remat_and_scan() -> None:
    """Rematerialization, a scan and x64, with ranks that do not promote."""
    x, w, sizes, _ = draw((10, 0, 20), 33, 24, 24)

    def loss(implementation: str, w: Array) -> Array:
        @jax.checkpoint
        def layer(x: Array, scale: Array) -> tuple[Array, None]:
            return kernels.grouped_matmul(x * scale, w, sizes, implementation=implementation), None

        return jnp.sum(jax.lax.scan(layer, x, jnp.float32([0.1, 0.2]))[0] ** 2)

    right = jax.grad(lambda w: loss("reference", w))(w)
    with small_blocks():
        assert error(interpret(jax.grad(lambda w: loss("triton", w)), w), right) < 5e-6
        with jax.enable_x64(True), jax.numpy_rank_promotion("raise"):
            assert error(interpret(jax.grad(lambda w: loss("triton", w)), w), right) < 5e-6


def check_determinism() -> None:
    """Two runs are bit-equal."""
    arrays = draw((40, 0, 90, 60), 200, 40, 50, dtype="bfloat16")
    with small_blocks():
        first, second = (interpret(with_gradients("triton"), *arrays) for _ in range(2))
    assert all(map(np.array_equal, first, second))


def check_second_derivative() -> None:
    """It is refused by one sentence."""
    x, w, sizes, dy = draw((8,), 8, 8, 16)

    def dx(x: Array, dy: Array) -> Array:
        f = functools.partial(kernels.grouped_matmul, group_sizes=sizes, implementation="triton")
        return jax.vjp(lambda w: f(x, w), w)[1](dy)[0]

    for argument in (0, 1):
        try:
            interpret(jax.grad(lambda x, dy: jnp.sum(dx(x, dy)), argument), x, dy)
        except NotImplementedError as refusal:
            assert "'triton' has no second derivative" in str(refusal)
        else:
            raise AssertionError("a second derivative came out")


if __name__ == "__main__":
    sys.exit(run_checks(globals(), sys.argv[1:]))
