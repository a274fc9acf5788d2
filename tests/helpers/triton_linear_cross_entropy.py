"""Checks of the Triton linear cross-entropy in Triton's interpreter: needs Triton, no GPU.

`python -m tests.helpers.triton_linear_cross_entropy NAME...` runs the named checks, or all, and prints one line for
each; it fails at the first that does not hold. The cases of single features and of pairs are those of `bench.judge`.
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
from dantinox import kernels
from dantinox.kernels.ops.linear_cross_entropy import common as shared
from dantinox.kernels.ops.linear_cross_entropy.triton import block_sizes, common

Array = jax.Array
NAMES = ("loss", "dh", "dw")


def draw(N: int, M: int, V: int, *, absent: int = 5, dtype: str = "float32") -> tuple[Array, Array, Array, Array]:
    """Return h, w, targets (none in one of `absent` rows) and the losses' cotangent."""
    rng = np.random.default_rng(N + 1000 * V)
    h, w, dloss = rng.standard_normal((N, M)), rng.standard_normal((V, M)), rng.standard_normal(N)
    targets = np.where(np.arange(N) % absent == 1, -1, rng.integers(0, V, N))
    return (
        jnp.asarray(h, dtype),
        jnp.asarray(w, dtype),
        jnp.asarray(targets, jnp.int32),
        jnp.asarray(dloss, jnp.float32),
    )


def with_gradients(implementation: str, **options: Any) -> Callable[..., Any]:
    """Return a function of the arrays of `draw` that returns the losses and the gradients."""

    def run(h: Array, w: Array, targets: Array, dloss: Array) -> tuple[Array, Array, Array]:
        def losses(h: Array, w: Array) -> Array:
            return kernels.linear_cross_entropy(h, w, targets, implementation=implementation, **options)

        loss, vjp = jax.vjp(losses, h, w)
        return loss, *vjp(dloss)

    return run


def expected(arrays: tuple[Array, ...], **options: Any) -> tuple[Array, Array, Array]:
    """Return the reference's results, computed in float32."""
    h, w, targets, dloss = arrays
    run = jax.jit(with_gradients("reference", **options))
    return run(h.astype(jnp.float32), w.astype(jnp.float32), targets, dloss)


def assert_right(arrays: tuple[Array, ...], limit: float = 5e-6, **options: Any) -> tuple[Array, ...]:
    """Compare with the reference; return the results."""
    actual = interpret(with_gradients("triton", **options), *arrays)
    for name, a, b in zip(NAMES, actual, expected(arrays, **options), strict=True):
        assert error(a, b) < limit, (arrays[0].shape, arrays[1].shape, options, name, error(a, b))
    return actual


@contextlib.contextmanager
def small_blocks() -> Iterator[None]:
    """Let small problems have several tiles, splits of several tiles, chunks and groups, with rests of each."""
    sizes = block_sizes.TritonBlockSizes(16, 16, 16, 4, 1)
    wide = sizes._replace(block_v=32)
    tables = {"FWD": sizes, "FWD_CAPPED": sizes, "BWD": wide, "BWD_CAPPED": wide}
    kinds = [(8, kind) for kind in ("16 bits", "tf32", "tf32x3")]
    with (
        mock.patch.multiple(block_sizes, **{name: dict.fromkeys(kinds, x) for name, x in tables.items()}),
        mock.patch.multiple(shared, MAX_CHUNK_LOGITS=70 * 64, MIN_CHUNK=32),
        mock.patch.multiple(block_sizes, MIN_PROGRAMS=3, MIN_SPLITS=3),
        mock.patch.object(common, "GROUP", 2),
    ):
        yield


def check_features() -> None:
    """Every feature, with gradients, on as few rows and words as give several blocks of every kind."""
    with small_blocks():
        assert_right(draw(70, 40, 200), softcap=3.0, z_loss=0.1)
        assert_right(draw(20, 32, 90), z_loss=0.2)
        h, w, targets, dloss = arrays = draw(37, 16, 70)
        kept = assert_right(arrays, softcap=2.0**41)
        absent = targets < 0
        poisoned = jnp.where(absent[:, None], jnp.nan, h), w, targets, jnp.where(absent, jnp.nan, dloss)
        again = interpret(with_gradients("triton", softcap=2.0**41), *poisoned)
        assert jax.tree.all(jax.tree.map(np.array_equal, again, kept)), "rows that take no part have an effect"
        assert not np.any(kept[0][absent]) and not np.any(kept[1][absent])
        # The largest logits are in the first tile of the second split. Their exponentials overflow, and so do those of
        # their difference to the maximum of another tile or split.
        w = jnp.linspace(-1, 1, 71).at[32].set(120)
        assert_right((jnp.float32([[100], [-100], [3]]), w[:, None], jnp.int32([32, 0, 3]), jnp.ones(3)))


def check_sizes() -> None:
    """Sizes of one row, of one tile and of one more, and no row that takes part, in the tiles of a GPU too."""
    for V in (1, 7, 127, 129, 1000):
        for N in (1, 7, 129):
            with small_blocks():
                assert_right(draw(N, 24, V), z_loss=0.1)
    assert_right(draw(129, 65, 1000), softcap=5.0)
    with small_blocks():
        h, w, _, dloss = draw(40, 24, 70)
        found = interpret(with_gradients("triton", z_loss=0.1), h * jnp.nan, w, jnp.full(40, -1), dloss)
        assert not any(np.any(x) for x in found)


def check_tilings() -> None:
    """Splits have whole tiles and none is empty; a chunk has whole tiles, and is no larger than it may be."""
    sizes = block_sizes.FWD[8, "16 bits"]
    for N in (1, 129, 4096, 65536, 10**6):
        for V in (1, 129, 32000, 151936):
            split, chunk = (f(N, V, x) for f, x in ((block_sizes.split_size, sizes), (shared.chunk_size, 128)))
            assert split % sizes.block_v == 0 and -(-V // split) >= min(-(-V // sizes.block_v), 9), (N, V, split)
            assert chunk == V or chunk % 128 == 0, (N, V, chunk)
            assert N * chunk <= max(shared.MAX_CHUNK_LOGITS, N * shared.MIN_CHUNK), (N, V, chunk)
    assert shared.chunk_size(8192, 151936, 256) == 2048 and shared.chunk_size(1024, 16384, 128) == 16384


def check_dtypes() -> None:
    """The products of 16 bits, and gradients of float16 logits below its range."""
    with small_blocks():
        for dtype, limit in (("bfloat16", 2.0**-6), ("float16", 2.0**-9)):
            actual = assert_right(draw(50, 40, 100, dtype=dtype), limit, softcap=4.0)
            assert [x.dtype for x in actual] == [jnp.float32, dtype, dtype]
            assert error(actual[0], expected(draw(50, 40, 100, dtype=dtype), softcap=4.0)[0]) < 1e-6
        h, w, targets, _ = draw(16, 8, 500, dtype="float16")
        w = jnp.abs(w) + 1
        dloss = jnp.full(16, 2.0**-14, jnp.float32)
        _, dh, _ = interpret(with_gradients("triton"), h, w, targets, dloss)
        np.testing.assert_allclose(np.float32(dh), expected((h, w, targets, dloss))[1], rtol=2e-3, atol=2.0**-24)


def check_tf32() -> None:
    """By default float32 is rounded to TF32: as exact as rounding, not as cutting off, and exact where asked for."""
    arrays = draw(64, 64, 130)
    right, f = expected(arrays), with_gradients("triton")
    with mock.patch.object(triton_interpreter, "_dot", dot_of_tensor_cores):
        rounded = interpret(f, *arrays, precision="default")
    exact = interpret(f, *arrays, precision="high")

    def relative_rms(actual: Any) -> dict[str, float]:
        squares = zip(NAMES, actual, right, strict=True)
        return {name: float(np.sqrt(np.mean(np.square(a - b)) / np.mean(np.square(b)))) for name, a, b in squares}

    rms, exact_rms = relative_rms(rounded), relative_rms(exact)
    for name, limit in {"loss": 2.5e-4, "dh": 4.2e-4, "dw": 4.3e-4}.items():
        assert 1e-4 < rms[name] < limit and exact_rms[name] < 2e-6, (name, rms, exact_rms)


def check_vmap() -> None:
    """A batch over any of the arrays, also of batches, and of gradients."""
    h, w, targets, dloss = draw(9, 12, 40)
    hs, ws = jnp.stack([h, 2 * h, -h]), jnp.stack([w, -w, w / 2])
    f, reference = with_gradients("triton", z_loss=0.1), with_gradients("reference", z_loss=0.1)
    with small_blocks():
        for axes in ((0, 0, None, None), (0, None, None, 0), (None, 0, 0, None)):
            batch = [x if axis is None else jnp.stack([x, x + 1, x]) for x, axis in zip((h, w, targets, dloss), axes)]
            batch[0], batch[1] = hs if axes[0] == 0 else h, ws if axes[1] == 0 else w
            batched = interpret(jax.vmap(f, in_axes=axes), *batch)
            assert error(batched, jax.jit(jax.vmap(reference, in_axes=axes))(*batch)) < 5e-6, axes
        twice = jax.vmap(jax.vmap(f, in_axes=(0, None, None, None)), in_axes=(None, 0, None, None))
        nested = interpret(twice, hs, ws, targets, dloss)
        assert error(jax.tree.map(lambda x: x[2, 1], nested), reference(hs[1], ws[2], targets, dloss)) < 5e-6


def check_shard_map() -> None:
    """Two devices, each with half of the rows, under `shard_map` with its default check; all words on both."""
    arrays = draw(34, 12, 70)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, everywhere = PartitionSpec("data"), PartitionSpec()
    in_specs, out_specs = (rows, everywhere, rows, rows), (rows, rows, everywhere)
    with small_blocks():
        sharded = jax.shard_map(with_gradients("triton"), mesh=mesh, in_specs=in_specs, out_specs=out_specs)
        assert error(interpret(sharded, *arrays), expected(arrays)) < 5e-6


def check_remat_and_scan() -> None:
    """Rematerialization, a scan and x64, with ranks that do not promote."""
    h, w, targets, _ = draw(33, 12, 70)

    def loss(implementation: str, w: Array) -> Array:
        @jax.checkpoint
        def part(total: Array, scale: Array) -> tuple[Array, None]:
            f = functools.partial(kernels.linear_cross_entropy, implementation=implementation, softcap=4.0)
            return total + jnp.mean(f(h * scale, w, targets)), None

        return jax.lax.scan(part, jnp.float32(0), jnp.float32([1, 2]))[0]

    right = jax.grad(lambda w: loss("reference", w))(w)
    with small_blocks():
        assert error(interpret(jax.grad(lambda w: loss("triton", w)), w), right) < 5e-6
        with jax.enable_x64(True), jax.numpy_rank_promotion("raise"):
            assert error(interpret(jax.grad(lambda w: loss("triton", w)), w), right) < 5e-6


def check_determinism() -> None:
    """Two runs are bit-equal."""
    arrays = draw(100, 40, 300, dtype="bfloat16")
    with small_blocks():
        first, second = (interpret(with_gradients("triton"), *arrays) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def check_second_derivative() -> None:
    """It is refused by one sentence."""
    h, w, targets, dloss = draw(8, 8, 16)

    def dh(h: Array, dloss: Array) -> Array:
        f = functools.partial(kernels.linear_cross_entropy, targets=targets, implementation="triton")
        return jax.vjp(lambda h: f(h, w), h)[1](dloss)[0]

    for argument in (0, 1):
        try:
            interpret(jax.grad(lambda h, dloss: jnp.sum(dh(h, dloss)), argument), h, dloss)
        except NotImplementedError as refusal:
            assert "'triton' has no second derivative" in str(refusal)
        else:
            raise AssertionError("a second derivative came out")


if __name__ == "__main__":
    sys.exit(run_checks(globals(), sys.argv[1:]))
