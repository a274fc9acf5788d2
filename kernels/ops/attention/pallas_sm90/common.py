"""What Hopper's attention kernels share: sizes, tiles, masks, the soft cap and the copies of tiles."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


class Static(NamedTuple):
    """Sizes and options that shape the code of a kernel. Hashable: `vjp.py` hands it to custom_vjp as it is."""

    T: int
    S: int
    G: int  # query heads a key head serves
    causal: bool
    window: int | None
    scale: float
    softcap: float | None
    interpret: plgpu.InterpretGPUParams | None = None  # None compiles; the parameters interpret the kernel on the CPU


LOG2E = 1.4426950408889634


def capped(products: jax.Array, static: Static) -> jax.Array:
    """tanh(scale q k^T / softcap) in float32 of products q k^T; a score is softcap times as large.

    The hardware's own tanh takes one instruction for these two and is good to 2^-11 of a score: enough for an output,
    but weights made of the exact scores and of a log-sum-exp of such scores do not add up to one. In float16, at a cap
    of 50 and scores near it, that moves gradients further than the rule of the tests allows.
    """
    # Large products: 2^x is infinite, and the quotient 0.
    return 1.0 - 2.0 / (jnp.exp2(products * (2 * LOG2E * static.scale / static.softcap)) + 1.0)


class Span(NamedTuple):
    """Key tiles of a range of queries: all in [start, stop), those without a mask in [left, right)."""

    start: Any
    left: Any
    right: Any
    stop: Any

    def within(self, other: "Span") -> "Span":
        """What lies in both."""
        start = lax.max(self.start, other.start)
        stop = lax.max(start, lax.min(self.stop, other.stop))
        left = lax.clamp(start, lax.max(self.left, other.left), stop)
        return Span(start, left, lax.max(left, lax.min(lax.min(self.right, other.right), stop)), stop)


def span(first: Any, rows: int, k: int, static: Static) -> Span:
    """The key tiles that queries first .. first + rows see; those past T see none."""
    offset = static.S - static.T
    past = lax.min(first + rows, jnp.int32(static.T))
    tile = lambda key: lax.div(lax.max(key, jnp.int32(0)), jnp.int32(k))
    high, right = jnp.int32(static.S), jnp.int32(static.S // k)
    if static.causal:
        high, right = lax.min(high, past + offset), lax.min(right, tile(first + offset + 1))
    start = left = jnp.int32(0)
    if static.window is not None:
        start = tile(first + offset - static.window + 1)
        left = tile(past + offset - static.window + k - 1)
    stop = jnp.where(first < static.T, lax.max(start, tile(high + k - 1)), start)
    left = lax.max(start, lax.min(left, stop))
    return Span(start, left, lax.max(left, lax.min(right, stop)), stop)


Array = jax.Array
Ref = Any
Segments = tuple[Array, Array]
FAR = 2**24  # tokens; more than any tile has
ROWS = 64  # of a warpgroup's product
WARPGROUPS = 2  # that compute
OWN = ROWS * WARPGROUPS  # queries or keys that a block owns
ROW, COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)  # a number a row; a number a column
COMPUTE_REGISTERS, MEMORY_REGISTERS = 240, 24


class Tiles(NamedTuple):
    """How far each loop steps, and how many steps are loaded ahead."""

    keys: int  # of dq's loop
    k_stages: int
    v_stages: int  # v is done with before k is
    queries: int  # of the loop of dk and dv
    q_stages: int


TILES = {
    64: Tiles(keys=128, k_stages=2, v_stages=2, queries=64, q_stages=3),
    128: Tiles(keys=64, k_stages=2, v_stages=2, queries=64, q_stages=2),
    256: Tiles(keys=64, k_stages=2, v_stages=1, queries=64, q_stages=2),
}


def keys_of(first: Array, static: Static, tile: int) -> tuple[Array, Array]:
    """The first key tile that some of the queries [first, first + OWN) sees, and how many."""
    S, shift = static.S, static.S - static.T
    low, high = jnp.int32(0), jnp.int32(pl.cdiv(S, tile))
    if static.causal:
        end = jnp.clip(jnp.minimum(first + OWN, static.T) + shift, 0, S)
        high = _over(end + (tile - 1), tile)
    if static.window is not None:
        low = _over(jnp.maximum(first + (shift - static.window + 1), 0), tile)
    return low, jnp.maximum(high - low, 0)


def queries_of(first: Array, own: int, static: Static, tile: int) -> tuple[Array, Array]:
    """The first query tile that sees some of the keys [first, first + own), and how many."""
    T, shift = static.T, static.S - static.T
    low, high = jnp.int32(0), jnp.int32(pl.cdiv(T, tile))
    if static.causal:
        low = _over(jnp.maximum(first - shift, 0), tile)
    if static.window is not None:
        end = jnp.clip(jnp.minimum(first + own, static.S) + (static.window - 1 - shift), 0, T)
        high = _over(end + (tile - 1), tile)
    return low, jnp.maximum(high - low, 0)


def _over(x: Array, tile: int) -> Array:
    return lax.div(x, jnp.int32(tile))


class Shared(NamedTuple):
    """The tiles that may share a segment with a block's tokens, [start, stop); [left, right) are of that alone."""

    start: Array
    left: Array
    right: Array
    stop: Array

    @classmethod
    def of(cls, table: Ref, b: Array, tile: Array) -> "Shared":
        """Of a block, from what `segment_ids.spans` found."""
        return cls(*(table[b, tile, n] for n in range(4)))

    def cut(self, low: Array, steps: Array) -> tuple[Array, Array]:
        """What is left of so many tiles from `low` on. Where nothing is, the first is one of these, or `low`."""
        start = lax.clamp(low, self.start, jnp.maximum(low + steps - 1, low))
        return start, jnp.minimum(low + steps, self.stop) - start

    def alike(self, tile: Array) -> Array:
        """A tile is in [left, right)."""
        return (tile >= self.left) & (tile < self.right)


def masked(
    *ps: Array,
    query: Array,
    key: Array,
    static: Static,
    axis: int,
    ids: Callable[[], tuple[Array, Array]] | None,
    alike: Array | None,
) -> list[Array]:
    """Each of ps, or zero where the pair is not visible. Queries from `query` on run along `axis`, keys from `key` on
    along the other; ids are those of the rows and of the columns, unless the tile is `alike`: of one segment. A tile
    that is visible as a whole applies no mask."""
    shape = ps[0].shape
    queries, keys = shape[axis], shape[1 - axis]
    distance = query + (static.S - static.T) - key  # from the first key to the first query
    inside = []  # of a tile: all of it is visible
    if static.causal:
        inside.append(distance >= keys - 1)
    if static.window is not None:
        inside.append(distance + (queries - 1) < static.window)
    if axis == 0 and not static.causal and static.S % keys:
        # Past the last key, k and v are zeros and p = 2^-lse: finite, it adds nothing. In dk and dv it is never stored.
        ps = [jnp.minimum(p, 1.0) for p in ps]
    if ids is not None:
        inside.append(alike)
    if not inside:
        return [*ps]

    def apply() -> list[Array]:
        # Eight columns are compared: in the next eight, what a thread has differs by a constant, which goes into the
        # comparison. Numbers of all columns would stay in registers from tile to tile.
        iota = lambda n, layout: plgpu.broadcasted_iota(jnp.int32, (n,), 0, layout=layout)
        down = lambda x, columns=shape[1]: lax.broadcast_in_dim(x, (shape[0], columns), [0])
        along = lambda x: lax.broadcast_in_dim(x, (shape[0], x.shape[0]), [1])
        row, seen = iota(shape[0], ROW), []
        if static.causal:
            eight = along(iota(8, COLUMN))
            away = down(row + distance, 8) - eight if axis == 0 else eight - down(row - distance, 8)
            later = range(0, shape[1], 8) if axis == 0 else range(0, -shape[1], -8)
            seen.append(jnp.concatenate([away >= n for n in later], axis=1))
            if static.window is not None:
                seen.append(jnp.concatenate([away < static.window + n for n in later], axis=1))
        if ids is not None:
            if not static.causal:  # always true: without numbers made here Mosaic finds no layout for the ids
                seen.append(along(iota(shape[1], COLUMN)) <= down(row + FAR))
            of_row, of_column = ids()
            seen.append(down(of_row) == along(of_column))
        visible = _all(seen)
        return [jnp.where(visible, p, jnp.zeros_like(p)) for p in ps]

    return lax.cond(_all(inside), lambda: [*ps], apply)


def _all(conditions: list[Array]) -> Array:
    first, *rest = conditions
    for other in rest:
        first = first & other
    return first


def weights(products: Array, lse: Array, static: Static) -> tuple[Array, Array | None]:
    """(p, 1 - (s / softcap)^2 or None) of q k^T; lse has its shape."""
    if static.softcap is None:
        return jnp.exp2(products * (static.scale * LOG2E) - lse), None
    t = capped(products, static)
    return jnp.exp2(t * (static.softcap * LOG2E) - lse), 1.0 - t * t


def tiled(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory in the layout that wgmma reads."""
    wide = 128 // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, wide)), plgpu.SwizzleTransform(128)))


def staged(keys: int, width: int, dtype: Any, static: Static) -> Any:
    """Interpreted, a product takes no operand from registers: it goes by way of shared memory."""
    return None if static.interpret is None else tiled((WARPGROUPS, keys, width), dtype)


def add(total: Ref, a: Array, b: Ref, stage: Ref | None) -> None:
    """total += a b, begun."""
    if stage is None:
        plgpu.wgmma(total, a, b)
    else:
        stage[...] = a
        plgpu.commit_smem()
        plgpu.wgmma(total, stage, b)


def drain(steps: Array, stages: int, free: Callable[[Array], Ref]) -> None:
    """Wait for the last stages to be free, so that no barrier is left half used."""

    @pl.loop(jnp.maximum(steps - stages, 0), steps)
    def _(step: Array) -> None:
        plgpu.barrier_wait(free(lax.rem(step, jnp.int32(stages))))
