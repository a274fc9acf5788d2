"""Linear cross-entropy in plain XLA, in tiles of the logits [N, V].

Without gradients, tiles of columns: each reads its rows of w once and updates the running maximum, the sum of
exponentials and the target's logit of every row.

With gradients, tiles of rows: each has all its logits, so that their gradients follow at once.

    s = h w^T                            [block_n, V], the only large array
    ds = softmax(s) - 1[target]          in parts of columns, which stay in the cache
    dh = ds w                            block_n rows of it
    dw += ds^T h                         [V, M] in float32, read and written once per tile

These are three products, 6 N M V FLOPs, as with all logits in memory. The backward pass scales dh by each row's
cotangent, and dw by the common one if all rows that take part have the same, as the mean of a training step has.
Otherwise it computes dw again, by tiles of columns: two more products.

A problem of one tile keeps its logits for the backward pass. Where the number of rows is a symbol, the backward pass
computes both gradients by tiles of columns: four products.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dantinox.kernels import dispatch
from dantinox.kernels.einsum import accumulation_dtype
from dantinox.kernels.ops.linear_cross_entropy.common import gradient_dtype, lse_gradient
from dantinox.kernels.softcap import cap_derivative, cap_scores
from dantinox.kernels.tuning import tunable
from dantinox.kernels.vma import match_vma

Array = jax.Array

MAX_TILE_LOGITS = 2**24
MIN_BLOCK_V, MAX_BLOCK_V = 256, 4096
# A tile of rows reads and writes dw once, for 6 block_n FLOPs per number: enough for a CPU, and for an accelerator.
MIN_BLOCK_N_CPU, MIN_BLOCK_N = 256, 1024


class Options(NamedTuple):
    """The static arguments."""

    softcap: float | None
    z_loss: float


class _RowStats(NamedTuple):
    """Of each row, [N]: maximum, sum of exponentials, and the target's logit.

    The logsumexp stays in two parts: the rounding of one number would scale every p of its row.
    """

    row_max: Array
    total: Array
    target: Array

    @property
    def lse(self) -> Array:
        return self.row_max + jnp.log(self.total)


class _Residuals(NamedTuple):
    """What the backward pass needs: the logits, or the gradients for cotangents of 1, or neither."""

    h: Array
    w: Array
    targets: Array
    stats: _RowStats
    logits: Array | None = None
    unit_gradients: tuple[Array, Array] | None = None


@tunable
def choose_block_v(N: int) -> int:
    """Return the columns of a tile of all rows: a power of two."""
    if not isinstance(N, int):  # the size of an exported program's argument may be a symbol
        return MIN_BLOCK_V
    return max(MIN_BLOCK_V, min(MAX_BLOCK_V, 1 << (MAX_TILE_LOGITS // N).bit_length() - 1))


@tunable
def choose_block_n(V: int) -> int:
    """Return the rows of a tile of all columns: a power of two."""
    accelerated = dispatch.on_gpu() or dispatch.on_tpu()
    fewest = MIN_BLOCK_N if accelerated else MIN_BLOCK_N_CPU
    return max(fewest, 1 << (MAX_TILE_LOGITS // V).bit_length() - 1)


def linear_cross_entropy(h: Array, w: Array, targets: Array, *, softcap: float | None, z_loss: float) -> Array:
    """See `dantinox.kernels.linear_cross_entropy`, which checks the arguments."""
    # Zeroed rows: a NaN in one that takes no part must not reach dw, which sums over rows.
    h = jnp.where((targets >= 0)[:, None], h, 0)
    return _linear_cross_entropy(h, w, targets, Options(softcap, z_loss))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _linear_cross_entropy(h: Array, w: Array, targets: Array, options: Options) -> Array:
    return _loss(_column_tiles_stats(h, w, targets, options), targets, options)


def _linear_cross_entropy_fwd(h: Array, w: Array, targets: Array, options: Options) -> tuple[Array, _Residuals]:
    N, V = h.shape[0], w.shape[0]
    if choose_block_v(N) >= V:
        s = _tile_logits(h, w, options)
        residuals = _Residuals(h, w, targets, _add_logits(_no_stats(h, w, targets), s, targets), logits=s)
    elif not isinstance(N, int):
        residuals = _Residuals(h, w, targets, _column_tiles_stats(h, w, targets, options))
    else:
        stats, gradients = _row_tiles(h, w, targets, options)
        residuals = _Residuals(h, w, targets, stats, unit_gradients=gradients)
    return _loss(residuals.stats, targets, options), residuals


def _linear_cross_entropy_bwd(options: Options, residuals: _Residuals, dloss: Array) -> tuple[Array, Array, None]:
    h, w, targets, stats, logits, unit_gradients = residuals
    takes_part = targets >= 0
    dloss = jnp.where(takes_part, dloss, 0)
    if logits is not None:
        dh, dw = _gradients(logits, h, w, targets, stats, dloss, options)
    elif unit_gradients is None:
        dh, dw = _column_tiles_gradients(h, w, targets, stats, dloss, options)
    else:
        dh, dw = unit_gradients
        dh = dh * dloss[:, None]
        common = dloss[jnp.argmax(takes_part)]
        dw = jax.lax.cond(
            jnp.all(jnp.where(takes_part, dloss == common, True)),
            lambda: dw * common,
            lambda: _column_tiles_gradients(h, w, targets, stats, dloss, options)[1].astype(dw.dtype),
        )
    return dh.astype(h.dtype), dw.astype(w.dtype), None


_linear_cross_entropy.defvjp(_linear_cross_entropy_fwd, _linear_cross_entropy_bwd)


def _loop_tiles(size: int, block: int, body: Callable[[Any, int, Any], Any], carry: Any) -> Any:
    """Run carry = body(start, length, carry) over the tiles of an axis; the last may be smaller."""
    num_full, rest = size // block, size % block
    if num_full:
        # Bounds of 32 bits: targets have as many, with 64-bit defaults too.
        bounds = np.int32(0), np.int32(num_full)
        carry = jax.lax.fori_loop(*bounds, lambda i, carry: body(i * block, block, carry), carry)
    return body(size - rest, rest, carry) if rest else carry


def _slice(x: Array, start: Any, size: int, axis: int = 0) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis)


def _update(x: Array, part: Array, start: Any) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, part, start, 0)


def _dot(a: Array, b: Array, axes: tuple[int, int]) -> Array:
    """Contract axis axes[0] of a with axis axes[1] of b, accumulating in float32 or wider."""
    dims = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=accumulation_dtype(a.dtype))


def _tile_logits(h: Array, w: Array, options: Options) -> Array:
    s = _dot(h, w, (1, 1))
    return s if options.softcap is None else cap_scores(s, scale=1.0, softcap=options.softcap)


def _is_target(targets: Array, size: int) -> Array:
    """Return a mask [N, size]: true at each row's target."""
    return jnp.arange(size, dtype=jnp.int32)[None] == targets[:, None]


def _no_stats(h: Array, w: Array, targets: Array) -> _RowStats:
    N, dtype = h.shape[0], accumulation_dtype(h.dtype)
    start = (jnp.full(N, -jnp.inf, dtype), jnp.zeros(N, dtype), jnp.zeros(N, dtype))
    return _RowStats(*(match_vma(x, h, w, targets) for x in start))


def _add_logits(stats: _RowStats, s: Array, targets: Array) -> _RowStats:
    """Add the logits s [N, columns]; targets are relative to the first column."""
    row_max = jnp.maximum(stats.row_max, jnp.max(s, axis=1))
    total = stats.total * jnp.exp(stats.row_max - row_max) + jnp.sum(jnp.exp(s - row_max[:, None]), axis=1)
    target = jnp.sum(jnp.where(_is_target(targets, s.shape[1]), s, 0), axis=1)
    return _RowStats(row_max, total, stats.target + target)


def _loss(stats: _RowStats, targets: Array, options: Options) -> Array:
    lse = stats.lse
    loss = lse - stats.target + options.z_loss * lse * lse if options.z_loss else lse - stats.target
    return jnp.where(targets >= 0, loss, 0)


def _gradients(
    s: Array, h: Array, w: Array, targets: Array, stats: _RowStats, dloss: Array, options: Options
) -> tuple[Array, Array]:
    """Return the part of dh [N, M] and the rows of dw [columns, M] of the logits s [N, columns].

    w holds the columns' rows; targets are relative to the first column.
    """
    dlse = lse_gradient(dloss, stats.lse, options.z_loss)
    # The logits' gradients need float16's range, and more: those of a mean over many rows are below it.
    product_dtype = gradient_dtype(h.dtype)
    p = jnp.exp(s - stats.row_max[:, None])
    ds = p * (dlse / stats.total)[:, None] - jnp.where(_is_target(targets, s.shape[1]), dloss[:, None], 0)
    if options.softcap is not None:
        ds = ds * cap_derivative(s, softcap=options.softcap)
    ds = ds.astype(product_dtype)
    return _dot(ds, w.astype(product_dtype), (1, 0)), _dot(ds, h.astype(product_dtype), (0, 0))


def _column_tiles_stats(h: Array, w: Array, targets: Array, options: Options) -> _RowStats:
    def add_tile(v: Any, size: int, stats: _RowStats) -> _RowStats:
        return _add_logits(stats, _tile_logits(h, _slice(w, v, size), options), targets - v)

    return _loop_tiles(w.shape[0], choose_block_v(h.shape[0]), add_tile, _no_stats(h, w, targets))


def _column_tiles_gradients(
    h: Array, w: Array, targets: Array, stats: _RowStats, dloss: Array, options: Options
) -> tuple[Array, Array]:
    """Return (dh in float32 or wider, dw), from logits that are computed again."""

    def add_tile(v: Any, size: int, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        dh, dw = carry
        w_tile = _slice(w, v, size)
        s = _tile_logits(h, w_tile, options)
        dh_part, dw_rows = _gradients(s, h, w_tile, targets - v, stats, dloss, options)
        return dh + dh_part, _update(dw, dw_rows.astype(dw.dtype), v)

    start = (jnp.zeros(h.shape, accumulation_dtype(h.dtype)), jnp.zeros(w.shape, w.dtype))
    start = tuple(match_vma(x, h, w, targets, dloss) for x in start)
    return _loop_tiles(w.shape[0], choose_block_v(h.shape[0]), add_tile, start)


def _row_tiles(h: Array, w: Array, targets: Array, options: Options) -> tuple[_RowStats, tuple[Array, Array]]:
    """Return the statistics of all rows, and (dh, dw) in float32 or wider for cotangents of 1."""
    (N, M), V, dtype = h.shape, w.shape[0], accumulation_dtype(h.dtype)

    def add_tile(n: Any, size: int, carry: tuple[_RowStats, Array, Array]) -> tuple[_RowStats, Array, Array]:
        all_stats, dh, dw = carry
        h_tile, targets_tile = _slice(h, n, size), _slice(targets, n, size)
        s = _tile_logits(h_tile, w, options)
        stats = _add_logits(_no_stats(h_tile, w, targets_tile), s, targets_tile)
        dloss = (targets_tile >= 0).astype(dtype)

        def add_columns(v: Any, width: int, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            dh_tile, dw = carry
            columns = _slice(s, v, width, axis=1)
            dh_part, dw_part = _gradients(columns, h_tile, _slice(w, v, width), targets_tile - v, stats, dloss, options)
            return dh_tile + dh_part, _update(dw, _slice(dw, v, width) + dw_part, v)

        zeros = match_vma(jnp.zeros((size, M), dtype), h, w, targets)
        dh_tile, dw = _loop_tiles(V, MAX_BLOCK_V, add_columns, (zeros, dw))
        stats = jax.tree.map(lambda x, part: _update(x, part, n), all_stats, stats)
        return stats, _update(dh, dh_tile, n), dw

    zeros = (match_vma(jnp.zeros(x.shape, dtype), h, w, targets) for x in (h, w))
    stats, *gradients = _loop_tiles(N, choose_block_n(V), add_tile, (_no_stats(h, w, targets), *zeros))
    return stats, tuple(gradients)
