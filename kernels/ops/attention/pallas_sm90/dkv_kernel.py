"""dk and dv on Hopper: the loop over the queries, of all heads, that see a block of keys."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dantinox.kernels.ops.attention.pallas_sm90.common import (
    COLUMN,
    COMPUTE_REGISTERS,
    MEMORY_REGISTERS,
    ROW,
    ROWS,
    TILES,
    WARPGROUPS,
    Shared,
    Static,
    add,
    drain,
    masked,
    queries_of,
    staged,
    tiled,
    weights,
)

Array = jax.Array


def own(D: int) -> int:
    """Keys that a block owns."""
    return ROWS if D > 128 else ROWS * WARPGROUPS


def dkv(q, k, v, do, lse, delta, ids, static: Static) -> tuple[Array, Array]:
    """(dk, dv); arguments as `bwd.backward` pads them."""
    (B, S, K, D), G = k.shape, static.G
    tiles, dtype = TILES[D], k.dtype
    split = D > 128  # dv is the first warpgroup's, dk the second's
    parts = 1 if split else WARPGROUPS
    shape = (ROWS, tiles.queries)
    Q, DO = 0, 1  # in `qdo` and what is beside it; k and v, in `kv`, are what they are multiplied with

    def kernel(*refs):
        q_gm, k_gm, v_gm, do_gm, lse_gm, delta_gm, *ids_gm, dk_gm, dv_gm = refs[: 8 + len(ids)]
        kv, qdo, numbers, ids_sm, stage, given, which, own, full, free, p_full, p_free = refs[8 + len(ids) :]
        b, g, wg = lax.axis_index("b"), lax.axis_index("g"), lax.axis_index("wg")
        first = lax.axis_index("tile") * (ROWS * parts)
        part = 0 if split else wg
        mine = first + part * ROWS
        rows = pl.ds(mine, ROWS)
        across = lambda x: lax.broadcast_in_dim(x, shape, [1])
        # Read anew where it is needed: what a step holds from its beginning to its end fills the registers.
        shared = lambda tile: Shared.of(ids_gm[2], b, tile)

        def begin(tile):
            low, seen = queries_of(tile * (ROWS * parts), ROWS * parts, static, tiles.queries)
            if ids:
                low, seen = shared(tile).cut(low, seen)
            return low, jnp.maximum(seen * G, 1)  # at least one, as in dq

        def pair_ids(slot):
            of_keys = plgpu.load(ids_gm[1].at[b, rows], layout=ROW, optimized=False)
            return of_keys, plgpu.load(ids_sm.at[slot, Q], layout=COLUMN)

        def visible_weights(s_acc, slot, low, i):
            """(p, what ds multiplies with do v^T - delta) once s is there."""
            lse = plgpu.load(numbers.at[slot, Q], layout=COLUMN)
            p, slope = weights(plgpu.wgmma_accumulator_load(s_acc, wait_n=0 if split else 1), across(lse), static)
            # Rounded before the mask: two arrays in float32 and what a mask takes would be too much for the registers.
            ps = [p] if slope is None else [p * slope, p.astype(dtype)]
            at = low + lax.div(i, jnp.int32(G))
            pair = functools.partial(pair_ids, slot) if ids else None
            alike = shared(lax.axis_index("tile")).alike(at) if ids else None
            ps = masked(*ps, query=at * tiles.queries, key=mine, static=static, axis=1, ids=pair, alike=alike)
            return ps[-1].astype(dtype), ps[0]

        def both():
            low, steps = begin(lax.axis_index("tile"))
            if which is not None:
                which[wg] = wg

            def accumulate(dk_acc, dv_acc):
                def step(i, _):
                    slot = lax.rem(i, jnp.int32(tiles.q_stages))
                    here = wg if which is None else which[wg]
                    mine_staged = None if stage is None else stage.at[wg]

                    def scores(s_acc, dp_acc):
                        plgpu.wgmma(s_acc, kv.at[Q, here], qdo.at[slot, Q].T)
                        plgpu.wgmma(dp_acc, kv.at[DO, here], qdo.at[slot, DO].T)
                        p, sloped = visible_weights(s_acc, slot, low, i)
                        add(dv_acc, p, qdo.at[slot, DO], mine_staged)
                        delta = plgpu.load(numbers.at[slot, DO], layout=COLUMN)
                        return sloped * (plgpu.wgmma_accumulator_load(dp_acc, wait_n=1) - across(delta))

                    # Before the sums are made: a product that begins where its sum is made needs no zeros written.
                    plgpu.barrier_wait(full.at[2 * slot + Q])
                    plgpu.barrier_wait(full.at[2 * slot + DO])
                    ds = pl.run_scoped(scores, plgpu.ACC(shape), plgpu.ACC(shape))
                    add(dk_acc, ds.astype(dtype), qdo.at[slot, Q], mine_staged)
                    plgpu.wgmma_wait(1)
                    plgpu.barrier_arrive(free.at[2 * slot + DO])
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(free.at[2 * slot + Q])

                lax.fori_loop(0, steps, step, None)
                return dk_acc[...], dv_acc[...]

            dk, dv = pl.run_scoped(accumulate, plgpu.ACC((ROWS, D)), plgpu.ACC((ROWS, D)))
            kv.at[Q, wg][...] = (dk * static.scale).astype(dtype)
            kv.at[DO, wg][...] = dv.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(kv.at[Q, wg], dk_gm.at[b, rows, g])
            plgpu.copy_smem_to_gmem(kv.at[DO, wg], dv_gm.at[b, rows, g])
            plgpu.wait_smem_to_gmem(0)

        def one():
            low, steps = begin(lax.axis_index("tile"))
            which[wg] = wg
            makes_p = wg == 0

            def accumulate(acc):
                def step(i, _):
                    slot = lax.rem(i, jnp.int32(tiles.q_stages))
                    here = which[wg]  # read anew, or the addresses of all operands are kept in registers

                    def scores(t_acc):
                        plgpu.wgmma(t_acc, kv.at[here, 0], qdo.at[slot, here].T)

                        def make():
                            p, sloped = visible_weights(t_acc, slot, low, i)
                            plgpu.barrier_wait(p_free)
                            given[...] = sloped
                            plgpu.barrier_arrive(p_full)
                            return p

                        def take():
                            dp = t_acc[...] - across(plgpu.load(numbers.at[slot, DO], layout=COLUMN))
                            plgpu.barrier_wait(p_full)
                            ds = plgpu.load(given, layout=plgpu.Layout.WGMMA) * dp
                            plgpu.barrier_arrive(p_free)
                            return ds.astype(dtype)

                        return lax.cond(makes_p, make, take)

                    plgpu.barrier_wait(full.at[2 * slot + wg])
                    x = pl.run_scoped(scores, plgpu.ACC(shape))
                    plgpu.barrier_arrive(free.at[2 * slot + wg])
                    plgpu.barrier_wait(full.at[2 * slot + (1 - wg)])
                    add(acc, x, qdo.at[slot, 1 - here], None if stage is None else stage.at[wg])
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(free.at[2 * slot + (1 - wg)])

                pl.when(~makes_p)(lambda: plgpu.barrier_arrive(p_free))
                lax.fori_loop(0, steps, step, None)
                pl.when(makes_p)(lambda: plgpu.barrier_wait(p_free))
                return acc[...]

            total = pl.run_scoped(accumulate, plgpu.ACC((ROWS, D)))
            kv.at[wg, 0][...] = (total * jnp.where(makes_p, 1.0, static.scale)).astype(dtype)
            plgpu.commit_smem()
            pl.when(makes_p)(lambda: plgpu.copy_smem_to_gmem(kv.at[0, 0], dv_gm.at[b, rows, g]))
            pl.when(~makes_p)(lambda: plgpu.copy_smem_to_gmem(kv.at[1, 0], dk_gm.at[b, rows, g]))
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg < WARPGROUPS)
        def compute():
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            if split:
                pl.when(wg == 0)(lambda: plgpu.copy_gmem_to_smem(k_gm.at[b, rows, g], kv.at[0, 0], own.at[0]))
                pl.when(wg == 1)(lambda: plgpu.copy_gmem_to_smem(v_gm.at[b, rows, g], kv.at[1, 0], own.at[1]))
            else:
                plgpu.copy_gmem_to_smem(k_gm.at[b, rows, g], kv.at[Q, wg], own.at[wg])
                plgpu.copy_gmem_to_smem(v_gm.at[b, rows, g], kv.at[DO, wg], own.at[wg])
            plgpu.barrier_wait(own.at[wg])
            (one if split else both)()

        @pl.when(wg >= WARPGROUPS)
        def load():
            plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")
            # The sum is the tile. Of that alone the compiler works out what both branches need ahead of the first, and
            # keeps it for the second while the first computes.
            low, steps = begin(lax.axis_index("tile") + (wg - WARPGROUPS))
            sources = ((q_gm, lse_gm), (do_gm, delta_gm))

            def copy(i, slot):
                at = pl.ds((low + lax.div(i, jnp.int32(G))) * tiles.queries, tiles.queries)
                h = g * G + lax.rem(i, jnp.int32(G))
                for part, (wide, number) in enumerate(sources):
                    here = 2 * slot + part
                    pl.when(i >= tiles.q_stages)(functools.partial(plgpu.barrier_wait, free.at[here]))
                    plgpu.copy_gmem_to_smem(wide.at[b, at, h], qdo.at[slot, part], full.at[here])
                    plgpu.copy_gmem_to_smem(number.at[b, h, at], numbers.at[slot, part], full.at[here])
                    if ids:  # both times, for all barriers of an array count to the same number
                        to = ids_sm.at[slot, part]
                        plgpu.copy_gmem_to_smem(ids_gm[0].at[b, at], to, full.at[here])

            @pl.loop(0, steps)
            def _(i):
                copy(i, lax.rem(i, jnp.int32(tiles.q_stages)))

            for part in (Q, DO):
                drain(steps, tiles.q_stages, lambda slot, part=part: free.at[2 * slot + part])

    out = jax.ShapeDtypeStruct(k.shape, dtype)
    stages = tiles.q_stages
    return plgpu.kernel(
        kernel,
        out_type=(out, out),
        grid=(pl.cdiv(S, ROWS * parts), B, K),
        grid_names=("tile", "b", "g"),
        num_threads=WARPGROUPS + 1,
        thread_name="wg",
        scratch_types=[
            tiled((2, parts, ROWS, D), dtype),
            tiled((stages, 2, tiles.queries, D), dtype),
            plgpu.SMEM((stages, 2, tiles.queries), jnp.float32),
            plgpu.SMEM((stages, 2, tiles.queries), jnp.int32) if ids else None,
            staged(ROWS, tiles.queries, dtype, static),
            tiled(shape, jnp.float32) if split else None,
            plgpu.SMEM((WARPGROUPS,), jnp.int32) if D > 64 else None,
            plgpu.Barrier(num_arrivals=1 if split else 2, num_barriers=WARPGROUPS),
            plgpu.Barrier(num_arrivals=3 if ids else 2, num_barriers=2 * stages),
            plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=2 * stages),
            plgpu.Barrier() if split else None,
            plgpu.Barrier() if split else None,
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=static.interpret or False,
        kernel_name="attention_dkv",
    )(q, k, v, do, lse, delta, *ids)
