"""dq on Hopper, and what it shares with dk and dv: what is visible, and how operands get to the products."""

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
    OWN,
    ROW,
    ROWS,
    TILES,
    WARPGROUPS,
    Shared,
    Static,
    add,
    drain,
    keys_of,
    masked,
    staged,
    tiled,
    weights,
)

Array = jax.Array


def dq(q, k, v, do, lse, delta, ids, static: Static) -> Array:
    """dq; arguments as `bwd.backward` pads them."""
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
