"""The gradient of grouped matrices on Hopper: one sum over the rows of each group, by warpgroups as the forward kernel.

Math      dw_e = sum of x_n^T dy_n over the rows n of group e; zero where there are none
Tiling    as many thread blocks as cores, each takes tile after tile of 128 x 256 of one group's matrix, all of a group
          before those of the next: its rows of x and dy are read from L2. The rows of a group come in pieces of 64,
          from its first on, rounded down to a multiple of 8.

              rows ->          piece 0    1      2      3
              dw of group 0    ██         ██     █░                   █ rows of the group
              dw of group 1                     ░█      ██     █░     ░ foreign ones in a first or last piece:
              dw of group 2    no piece: zeros                          set to zero where they lie, in x and in dy

          The two warpgroups that multiply divide that work in dy, which both read; x is 64 columns for each.
State     64 x 256 sums of a warpgroup in float32 registers.
Traffic   a tile reads 128 columns of x and 256 of dy, 85 FLOPs a byte, from L2; writes dw once. 2 N M F FLOPs. x is
          transposed by the tensor core on its way in, never in memory.
Limits    as the forward kernel, M and F for K and J. What rows of nobody hold reaches nobody.
Source    as the forward kernel.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dantinox.kernels.ops.grouped_matmul.pallas_sm90 import block_sizes, warp_specialized
from dantinox.kernels.ops.grouped_matmul.pallas_sm90.block_sizes import HEIGHT, INNER, ROWS
from dantinox.kernels.ops.grouped_matmul.pallas_sm90.gmm import whole
from dantinox.kernels.ops.grouped_matmul.pallas_sm90.warp_specialized import CHUNK, SIDE, WARPGROUPS, Ring, Static

Array = jax.Array
WIDTHS = (256, 128)  # of a tile


class Piece(NamedTuple):
    """A tile of a group's matrix: its first row and column, whose rows are summed, the first filling, how many."""

    group: Array
    row: Array
    column: Array
    start: Array
    end: Array
    used: Array
    fillings: Array


def summed(x: Array, dy: Array, group_sizes: Array, static: Static, *, name: str = "grouped_matmul_dw") -> Array:
    """[E, M, F] in x's dtype.

    Args:
        x: [N, M]; dy: [N, F]; M and F multiples of 64, rows sorted by group.
    """
    (N, M), F, E = x.shape, dy.shape[1], group_sizes.shape[0]
    tile = block_sizes.hopper_sum(N, E, M, F, static.cores, widths=static.among(*WIDTHS))
    columns, down, across = tile.columns, pl.cdiv(M, HEIGHT), pl.cdiv(F, tile.columns)
    ends = jnp.cumsum(group_sizes.astype(jnp.int32))
    bounds = jnp.stack([ends - group_sizes, ends], axis=1)

    def body(
        x: Any,
        dy: Any,
        table: Any,
        dw: Any,
        *,
        warpgroup: Array,
        ring: Ring,
        staged: Any,
        x_ring: Any,
        dy_ring: Any,
        clear: Any,
    ) -> warp_specialized.Roles:
        def walk(run: Callable[[Piece], None]) -> Array:
            def one(n: Array, used: Array) -> Array:
                e = lax.div(n, jnp.int32(down * across))
                row, column = warp_specialized.place(n - e * (down * across), down, across)
                start, end = table[e, 0], table[e, 1]
                first = start & -SIDE
                pieces = jnp.where(end > start, lax.div(end - first + (INNER - 1), jnp.int32(INNER)), 0)
                run(Piece(e, row * HEIGHT, column * columns, start, end, used, pieces))
                return used + pieces

            return warp_specialized.every(E * down * across, one)

        def load(of: Piece) -> None:
            @pl.loop(0, of.fillings)
            def _(k: Array) -> None:
                rows = pl.ds(pl.multiple_of((of.start & -SIDE) + k * INNER, SIDE), INNER)

                def copy(stage: Array) -> None:
                    here = ring.here.at[stage]
                    for half in range(WARPGROUPS):
                        source = x.at[rows, pl.ds(of.row + half * ROWS, ROWS)]
                        plgpu.copy_gmem_to_smem(source, x_ring.at[stage, half], here)
                    plgpu.copy_gmem_to_smem(dy.at[rows, pl.ds(of.column, columns)], dy_ring.at[stage], here)

                ring.fill(of.used + k, copy)

        def compute(of: Piece) -> None:
            def operands(k: Array, stage: Array) -> list[tuple[Any, Any]]:
                low = of.start - (of.start & -SIDE) - k * INNER
                high = of.end - (of.start & -SIDE) - k * INNER
                pl.when((low > 0) | (high < INNER))(lambda: clear_others(stage, low, high))
                return [(x_ring.at[stage, warpgroup].transpose((1, 0)), dy_ring.at[stage])]

            def clear_others(stage: Array, low: Array, high: Array) -> None:
                half = columns // WARPGROUPS
                own = [dy_ring.at[stage, :, pl.ds(warpgroup * half + n, CHUNK)] for n in range(0, half, CHUNK)]
                for piece in (x_ring.at[stage, warpgroup], *own):
                    n = plgpu.broadcasted_iota(jnp.int32, piece.shape, 0, layout=plgpu.Layout.WGMMA)
                    value = plgpu.load(piece, layout=plgpu.Layout.WGMMA)
                    piece[...] = jnp.where((n >= low) & (n < high), value, jnp.zeros_like(value))
                plgpu.commit_smem()
                plgpu.barrier_arrive(clear)
                plgpu.barrier_wait(clear)

            (sums,) = warp_specialized.wgmma_reduce(ring, of.used, of.fillings, operands, columns)
            rows = pl.ds(of.row + warpgroup * ROWS, ROWS)

            def one(n: int) -> None:
                target = dw.at[of.group, rows, pl.ds(of.column + n, CHUNK)]
                send = lambda piece: plgpu.copy_smem_to_gmem(piece, target, commit_group=False)
                warp_specialized.leave(staged, n // CHUNK, sums[:, n : n + CHUNK], send)

            write = lambda: warp_specialized.chunks(columns, columns if F % columns == 0 else F - of.column, one)
            write() if M % HEIGHT == 0 else pl.when(of.row + warpgroup * ROWS < M)(write)

        return walk, load, compute

    (dw,) = warp_specialized.launch(
        body,
        [whole(x), whole(dy), bounds],
        [jax.ShapeDtypeStruct((E, M, F), x.dtype)],
        static,
        stages=tile.stages,
        copies=WARPGROUPS + 1,
        rings={"x_ring": (WARPGROUPS, INNER, ROWS), "dy_ring": (INNER, columns)},
        dtype=x.dtype,
        scratch={"clear": plgpu.Barrier(num_arrivals=WARPGROUPS)},
        name=name,
    )
    return dw
