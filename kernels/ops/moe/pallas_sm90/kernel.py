"""The hidden rows of a mixture of experts on Hopper: both ways up in one pass over x, and the way back through SwiGLU.

Math      up    g = x w_gate_e,  u = x w_up_e,  h = silu(g) u                                 for the rows of expert e
          back  s = dy w_down_e^T;  dg = p s u silu'(g);  du = p s silu(g);  p h;  dp = sum over the features of s h
Tiling    as `grouped_matmul/pallas_sm90/gmm.py`. up: a stage has the rows of x and 128 columns of both matrices.

              x         w_gate      w_up            up: a warpgroup's sums are 64 x 128 of g and 64 x 128 of u
              128 x 64  64 x 128    64 x 128
              dy        w_down                      back: 64 x 256 of s; after the last piece of the contraction
              128 x 64  256 x 64                    four more stages come, 64 columns of g and of u each, in the
              g ▒▒▒▒▒▒  u ▒▒▒▒▒▒ ░░░░░░             places of dy and w_down: the epilogue has no memory of its own

          dp leaves as one number for each row of a visit and tile of columns, so that no two blocks write the same
          place; XLA adds up the tiles, in one order. Visits of nobody's rows are not made in back.
State     128 registers of a thread's 240 for sums either way. The epilogue takes 64 columns at a time: in back that is
          32 registers for g and u and 48 for what leaves, in bfloat16, beside 96 for sums that wait; p and dp: 2 each.
          Between the halves of the 64 columns is a branch: the assembler orders all that lies between two branches as
          it likes, and with 64 columns there it kept up to 8 other numbers in memory, once a tile. Now none.
Traffic   up reads as much for a FLOP as a product of 256 columns does, and x once instead of twice. Only h leaves, 2
          bytes a feature of a row in bfloat16; g and u written, read again and made h would be 10. Those who want
          gradients write g and u too, 4 bytes, and back reads them, 4 bytes: 8 bytes against 4 M FLOPs to multiply
          again, and against tiles that hold three sums instead of one, 64 x 64 of each, which read 1.6 times as much
          from L2 for a FLOP. At 800 TFLOP/s and 3 TB/s keeping them is faster from M = 530 on, before that is counted.
          In back s never leaves: it saves 2 bytes written and 2 read a feature, and dp a pass over s and h.
Limits    as `grouped_matmul/pallas_sm90/gmm.py`, M and F for K and J.
Source    Shazeer, GLU Variants (arXiv:2002.05202), for the formula; else as `grouped_matmul/pallas_sm90/gmm.py`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dantinox.kernels.ops.grouped_matmul.group_metadata import GroupMetadata
from dantinox.kernels.ops.grouped_matmul.pallas_sm90 import block_sizes, gmm, warp_specialized
from dantinox.kernels.ops.grouped_matmul.pallas_sm90.block_sizes import HEIGHT, INNER, ROWS
from dantinox.kernels.ops.grouped_matmul.pallas_sm90.gmm import rows_to, whole
from dantinox.kernels.ops.grouped_matmul.pallas_sm90.warp_specialized import CHUNK, SIDE, WARPGROUPS, Ring, Static, Task

Array = jax.Array
MATRICES = 2
HALF = CHUNK // 2
WIDTHS = (256, 128)  # of a tile, of both matrices together on the way up


def up(
    x: Array, w_gate: Array, w_up: Array, group_sizes: Array, static: Static, *, keep: bool, name: str = "experts_up"
) -> tuple[Array, ...]:
    """(h,), or with `keep` (h, g, u): [N, F] each, in x's dtype, zeros in rows that are nobody's.

    Args:
        x: [N, M], rows sorted by expert; w_gate, w_up: [E, M, F]; M and F multiples of 64.
    """
    (N, M), (E, _, F) = x.shape, w_gate.shape
    tile = block_sizes.hopper(N, E, M, F, static.cores, matrices=MATRICES, widths=static.among(*WIDTHS))
    columns, across, steps = tile.columns, pl.cdiv(F, tile.columns), pl.cdiv(M, INNER)

    def body(
        x: Any,
        w_gate: Any,
        w_up: Any,
        table: Any,
        count: Any,
        *outs: Any,
        warpgroup: Array,
        ring: Ring,
        staged: Any,
        x_ring: Any,
        w_ring: Any,
    ) -> warp_specialized.Roles:
        def load(task: Task) -> None:
            rows, features = pl.ds(pl.multiple_of(task.visit.row, SIDE), HEIGHT), pl.ds(task.column, columns)

            @pl.loop(0, task.fillings)
            def _(k: Array) -> None:
                inner = pl.ds(k * INNER, INNER)

                def copy(stage: Array) -> None:
                    here = ring.here.at[stage]
                    plgpu.copy_gmem_to_smem(x.at[rows, inner], x_ring.at[stage], here)
                    for i, w in enumerate((w_gate, w_up)):
                        plgpu.copy_gmem_to_smem(w.at[task.visit.group, inner, features], w_ring.at[stage, i], here)

                ring.fill(task.used + k, copy)

        def compute(task: Task) -> None:
            first, low, mine = task.rows_for_warpgroup(warpgroup)

            @pl.when(mine > 0)
            def _() -> None:
                def operands(_: Any, stage: Array) -> list[tuple[Any, Any]]:
                    rows = x_ring.at[stage, pl.ds(warpgroup * ROWS, ROWS)]
                    return [(rows, w_ring.at[stage, i]) for i in range(MATRICES)]

                sums = warp_specialized.wgmma_reduce(ring, task.used, task.fillings, operands, columns, columns)

                def one(n: int) -> None:
                    g, u = (each[:, n : n + CHUNK] for each in sums)
                    # One of them, or all: none is waited for that nobody wants.
                    for i, (value, out) in enumerate(zip((g * jax.nn.sigmoid(g) * u, g, u), outs, strict=False)):
                        send = rows_to(out, first, task.column + n, low, mine)
                        warp_specialized.leave(staged, n // CHUNK * len(outs) + i, value, send)

                warp_specialized.chunks(columns, columns if F % columns == 0 else F - task.column, one)

            pl.when(mine == 0)(lambda: ring.skip(task.used, task.fillings))

        return warp_specialized.tasks(table, count[0], E, across, columns, lambda _: steps), load, compute

    out = jax.ShapeDtypeStruct((N, F), x.dtype)
    found = warp_specialized.launch(
        body,
        [whole(x), w_gate, w_up, *warp_specialized.table(warp_specialized.plan(group_sizes, N))],
        [out] * (3 if keep else 1),
        static,
        stages=tile.stages,
        copies=1 + MATRICES,
        rings={"x_ring": (HEIGHT, INNER), "w_ring": (MATRICES, INNER, columns)},
        dtype=x.dtype,
        name=name,
    )
    return tuple(found)


def back(
    dy: Array,
    w_down: Array,
    g: Array,
    u: Array,
    p: Array,
    group_sizes: Array,
    static: Static,
    *,
    name: str = "experts_dh",
) -> tuple[Array, Array, Array, Array]:
    """(dg, du, p h [N, F] in dy's dtype, dp [N] float32), all for the rows of the experts: those of nobody are not set.

    Args:
        dy: [N, M], rows sorted by expert; w_down: [E, F, M]; M and F multiples of 64.
        g, u: [N, F], as `up` kept them; p: [N] float32, the router's weights.
    """
    (N, M), (E, F, _) = dy.shape, w_down.shape
    tile = block_sizes.hopper(N, E, M, F, static.cores, widths=static.among(*WIDTHS))
    columns, across, steps = tile.columns, pl.cdiv(F, tile.columns), pl.cdiv(M, INNER)
    pieces = columns // CHUNK
    plan = warp_specialized.plan(group_sizes, N)

    def body(
        dy: Any,
        w_down: Any,
        g: Any,
        u: Any,
        p: Any,
        table: Any,
        count: Any,
        dg: Any,
        du: Any,
        ph: Any,
        dp: Any,
        *,
        warpgroup: Array,
        ring: Ring,
        staged: Any,
        x_ring: Any,
        w_ring: Any,
        row_sums: Any,
    ) -> warp_specialized.Roles:
        def load(task: Task) -> None:
            gmm.fill(ring, task, task.used, steps, dy, w_down, x_ring, w_ring, columns, True)
            rows = pl.ds(pl.multiple_of(task.visit.row, SIDE), HEIGHT)

            @pl.loop(0, jnp.maximum(task.fillings - steps, 0))
            def _(n: Array) -> None:
                features = pl.ds(task.column + n * CHUNK, CHUNK)

                def copy(stage: Array) -> None:
                    here = ring.here.at[stage]
                    plgpu.copy_gmem_to_smem(g.at[rows, features], x_ring.at[stage], here)
                    plgpu.copy_gmem_to_smem(u.at[rows, features], w_ring.at[stage, pl.ds(0, HEIGHT)], here)

                ring.fill(task.used + steps + n, copy)

        def compute(task: Task) -> None:
            first, low, mine = task.rows_for_warpgroup(warpgroup)
            busy = (mine > 0) & (task.fillings > 0)

            @pl.when(busy)
            def _() -> None:
                weight = plgpu.load(p.at[pl.ds(first, ROWS)], layout=warp_specialized.ROW, optimized=False)
                operands = lambda _, stage: [gmm.pair(x_ring, w_ring, stage, warpgroup, True)]
                (s,) = warp_specialized.wgmma_reduce(ring, task.used, steps, operands, columns)
                total = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), warp_specialized.ROW)
                for n in range(pieces):

                    def one(total: Array, n: int = n) -> Array:
                        part = s[:, n * CHUNK : (n + 1) * CHUNK]
                        values, share = halves(task, part, weight, *kept(task.used + steps + n))
                        for i, (value, out) in enumerate(zip(values, (dg, du, ph), strict=True)):
                            send = rows_to(out, first, task.column + n * CHUNK, low, mine)
                            warp_specialized.leave(staged, 3 * n + i, value, send)
                        return total + share

                    total = lax.cond(task.column + n * CHUNK < F, one, lambda total: total, total)
                # What went there for the last tile left before the first piece of this one.
                row_sums[warpgroup] = total
                plgpu.commit_smem()
                target = dp.at[task.number, lax.div(task.column, columns), pl.ds(warpgroup * ROWS, ROWS)]
                plgpu.copy_smem_to_gmem(row_sums.at[warpgroup], target)

            pl.when(~busy)(lambda: ring.skip(task.used, task.fillings))

        def kept(filling: Array) -> tuple[Array, Array]:
            """64 columns of g and u."""
            ring.wait(filling)
            own = ring.stage(filling), pl.ds(warpgroup * ROWS, ROWS)
            g, u = (plgpu.load(each.at[own], layout=plgpu.Layout.WGMMA) for each in (x_ring, w_ring))
            plgpu.commit_smem()  # TMA writes there next, by another way to memory
            ring.release(filling)
            return g.astype(jnp.float32), u.astype(jnp.float32)

        def halves(task: Task, s: Array, weight: Array, g: Array, u: Array) -> tuple[list[Array], Array]:
            """(dg, du, p h), and the share of dp, of 64 columns."""
            found, shares = [], []
            for n in range(0, CHUNK, HALF):
                given = (each[:, n : n + HALF] for each in (s, g, u))
                # Taken always, which no compiler knows: see State.
                values, share = lax.cond(task.visit.row >= 0, through, nothing, *given, weight)
                found.append(values)
                shares.append(share)
            values = [jnp.concatenate(each, axis=1) for each in zip(*found, strict=True)]
            return values, jnp.sum(functools.reduce(jnp.add, shares), axis=1)

        def through(s: Array, g: Array, u: Array, weight: Array) -> tuple[tuple[Array, ...], Array]:
            across = lax.broadcast_in_dim(weight, s.shape, [0])
            open_ = sigmoid(g)
            silu = g * open_
            h, ps = silu * u, across * s
            values = ps * u * open_ * (1 + g - silu), ps * silu, across * h
            # As what leaves they take half the registers.
            return tuple(each.astype(dy.dtype) for each in values), s * h

        def nothing(s: Array, *_: Array) -> tuple[tuple[Array, ...], Array]:
            return (jnp.zeros_like(s, dy.dtype),) * 3, s

        fillings = lambda column: steps + lax.div(jnp.minimum(columns, F - column), CHUNK)
        return warp_specialized.tasks(table, count[0], E, across, columns, fillings), load, compute

    out = jax.ShapeDtypeStruct((N, F), dy.dtype)
    shares = jax.ShapeDtypeStruct((plan.group.shape[0], across, HEIGHT), jnp.float32)
    weights = jnp.pad(p, (0, -N % SIDE + HEIGHT))
    dg, du, ph, dp = warp_specialized.launch(
        body,
        [whole(dy), w_down, whole(g), whole(u), weights, *warp_specialized.table(plan)],
        [out, out, out, shares],
        static,
        stages=tile.stages,
        copies=2,
        rings={"x_ring": (HEIGHT, INNER), "w_ring": (columns, INNER)},
        dtype=dy.dtype,
        scratch={"row_sums": plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32)},
        name=name,
    )
    return dg, du, ph, of_rows(jnp.sum(dp, axis=1), plan, N, E)


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)): two instructions for the quotient, where a division takes five.

    On the way up they would be saved too, but what is left is assembled with two moves more in the loop of products.
    """
    return jnp.square(lax.rsqrt(1 + jnp.exp(-x)))


def of_rows(shares: Array, plan: GroupMetadata, N: int, E: int) -> Array:
    """[N]: each row's number, of [visits, HEIGHT]; 0 for rows of nobody."""
    there = jnp.arange(plan.group.shape[0]) < plan.count
    ends = jnp.where(there, jnp.minimum(plan.row + HEIGHT, plan.row_end), N)
    n = jnp.arange(N)
    visit = jnp.searchsorted(ends, n, side="right")
    return jnp.where(plan.group[visit] < E, shares[visit, n - plan.row[visit]], 0)
