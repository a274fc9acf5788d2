"""dq on Hopper, and what it shares with dk and dv: what is visible, and how operands get to the products."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.attention.hopper_softcap import LOG2E, capped
from kernels.attention.hopper_static import Static

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
        """Of a block, from what `segments.spans` found."""
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


def dq(q, k, v, do, lse, delta, ids, static: Static) -> Array:
    """dq; arguments as `mosaic_gpu_backward.backward` pads them."""
    B, T, H, D = q.shape
    tiles, dtype = TILES[D], q.dtype

    def kernel(*refs):
        q_gm, k_gm, v_gm, do_gm, lse_gm, delta_gm, *ids_gm, dq_gm = refs[: 7 + len(ids)]
        q_sm, do_sm, k_sm, v_sm, ids_sm, stage, which, own, k_full, k_free, v_full, v_free = refs[7 + len(ids) :]
        b, h, wg = lax.axis_index("b"), lax.axis_index("h"), lax.axis_index("wg")
        # The last queries see the most keys: they go first.
        first = (pl.cdiv(T, OWN) - 1 - lax.axis_index("tile")) * OWN
        mine = first + wg * ROWS
        rows = pl.ds(mine, ROWS)
        # The values have one stage, and the compiler would keep its address too: where a mask is long, for nothing.
        long_mask = which is not None and (ids or static.window is not None or static.softcap is not None)
        # Read anew where it is needed: what a step holds from its beginning to its end fills the registers.
        shared = lambda: Shared.of(ids_gm[2], b, lax.div(first, jnp.int32(OWN)))

        def bounds() -> tuple[Array, Array]:
            low, steps = keys_of(first, static, tiles.keys)
            if ids:
                low, steps = shared().cut(low, steps)
            # Where a block sees nothing, a tile that is masked as a whole: a loop that may not run at all is entered by
            # way of another branch, and there the compiler writes the zeros that sums begin with in every step.
            return low, jnp.maximum(steps, 1)

        @pl.when(wg < WARPGROUPS)
        def compute():
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            plgpu.copy_gmem_to_smem(q_gm.at[b, rows, h], q_sm.at[wg], own.at[wg])
            plgpu.copy_gmem_to_smem(do_gm.at[b, rows, h], do_sm.at[wg], own.at[wg])
            low, steps = bounds()
            number = lambda ref, *at: plgpu.load(ref.at[(*at, rows)], layout=ROW, optimized=False)
            shape = (ROWS, tiles.keys)
            across = lambda x: lax.broadcast_in_dim(x, shape, [0])
            lse, delta = number(lse_gm, b, h), number(delta_gm, b, h)
            if which is not None:
                which[wg] = wg
                which[WARPGROUPS + wg] = jnp.int32(0)
            plgpu.barrier_wait(own.at[wg])

            def accumulate(dq_acc):
                def step(i, _):
                    k_slot, v_slot = lax.rem(i, jnp.int32(tiles.k_stages)), lax.rem(i, jnp.int32(tiles.v_stages))
                    # Read anew, or the addresses of all operands are kept in registers.
                    here = wg if which is None else which[wg]

                    # Sums are made where their product begins: where a wait lies between, zeros are written first.
                    def scores(s_acc):
                        plgpu.wgmma(s_acc, q_sm.at[here], k_sm.at[k_slot].T)
                        plgpu.barrier_wait(v_full.at[v_slot])
                        return pl.run_scoped(functools.partial(slopes, s_acc), plgpu.ACC(shape))

                    def slopes(s_acc, dp_acc):
                        there = which[WARPGROUPS + wg] if long_mask else v_slot
                        plgpu.wgmma(dp_acc, do_sm.at[here], v_sm.at[there].T)
                        p, slope = weights(plgpu.wgmma_accumulator_load(s_acc, wait_n=1), across(lse), static)
                        p = p if slope is None else p * slope
                        pair = lambda: (number(ids_gm[0], b), plgpu.load(ids_sm.at[k_slot], layout=COLUMN))
                        pair, alike = (pair, shared().alike(low + i)) if ids else (None, None)
                        at = (low + i) * tiles.keys
                        (p,) = masked(p, query=mine, key=at, static=static, axis=0, ids=pair, alike=alike)
                        dp = dp_acc[...]
                        plgpu.barrier_arrive(v_free.at[v_slot])
                        return p * (dp - across(delta))

                    plgpu.barrier_wait(k_full.at[k_slot])
                    ds = pl.run_scoped(scores, plgpu.ACC(shape))
                    add(dq_acc, ds.astype(dtype), k_sm.at[k_slot], None if stage is None else stage.at[wg])
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(k_free.at[k_slot])

                lax.fori_loop(0, steps, step, None)
                return dq_acc[...]

            dq = pl.run_scoped(accumulate, plgpu.ACC((ROWS, D)))
            q_sm.at[wg][...] = (dq * static.scale).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_sm.at[wg], dq_gm.at[b, rows, h])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == WARPGROUPS)
        def load():
            plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")
            low, steps = bounds()
            g = lax.div(h, jnp.int32(static.G))
            sources = (
                (k_gm, k_sm, k_full, k_free, tiles.k_stages),
                (v_gm, v_sm, v_full, v_free, tiles.v_stages),
            )

            @pl.loop(0, steps)
            def _(i):
                keys = pl.ds((low + i) * tiles.keys, tiles.keys)
                for source, to, full, free, stages in sources:
                    slot = lax.rem(i, jnp.int32(stages))
                    pl.when(i >= stages)(functools.partial(plgpu.barrier_wait, free.at[slot]))
                    plgpu.copy_gmem_to_smem(source.at[b, keys, g], to.at[slot], full.at[slot])
                    if ids and source is k_gm:
                        plgpu.copy_gmem_to_smem(ids_gm[1].at[b, keys], ids_sm.at[slot], full.at[slot])

            for *_, free, stages in sources:
                drain(steps, stages, lambda slot, free=free: free.at[slot])

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(q.shape, dtype),
        grid=(pl.cdiv(T, OWN), B, H),
        grid_names=("tile", "b", "h"),
        num_threads=WARPGROUPS + 1,
        thread_name="wg",
        scratch_types=[
            tiled((WARPGROUPS, ROWS, D), dtype),
            tiled((WARPGROUPS, ROWS, D), dtype),
            tiled((tiles.k_stages, tiles.keys, D), dtype),
            tiled((tiles.v_stages, tiles.keys, D), dtype),
            plgpu.SMEM((tiles.k_stages, tiles.keys), jnp.int32) if ids else None,
            staged(ROWS, tiles.keys, dtype, static),
            plgpu.SMEM((2 * WARPGROUPS,), jnp.int32) if tiles.v_stages == 1 else None,
            plgpu.Barrier(num_arrivals=2, num_barriers=WARPGROUPS),
            plgpu.Barrier(num_arrivals=2 if ids else 1, num_barriers=tiles.k_stages),
            plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=tiles.k_stages),
            plgpu.Barrier(num_barriers=tiles.v_stages),
            plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=tiles.v_stages),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=static.interpret or False,
        kernel_name="attention_dq",
    )(q, k, v, do, lse, delta, *ids)
