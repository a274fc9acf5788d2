"""Transposed grouped matmul on Hopper, the gradient of the matrices: a sum over the rows of each group.

Math      dw_e = sum of x_n^T dy_n over the rows n of group e; zero for empty groups
Tiling    one persistent thread block per SM takes tile after tile of 128 x 256 of one group's matrix, all of a group
          before those of the next, so its rows of x and dy are read from L2. A stage has 64 rows of a group, from its
          first on, rounded down to a multiple of 8.

              rows ->          stage 0    1      2      3
              dw of group 0    ██         ██     █░                   █ rows of the group
              dw of group 1                      ░█     ██     █░     ░ rows of others in a first or last stage:
              dw of group 2    no stage: zeros                          zeroed in SMEM, in x and in dy

          The two consumer warpgroups each zero half of dy, which both read, and their own 64 columns of x.
State     64 x 256 accumulators per warpgroup in float32 registers.
Traffic   a tile reads 128 columns of x and 256 of dy, 85 FLOPs per byte, from L2; writes dw once. 2 N M F FLOPs. The
          tensor core transposes x as it reads it; memory never holds the transpose.
Limits    as the forward kernel, with M and F for K and J. Unassigned rows do not change the result.
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


class TgmmTask(NamedTuple):
    """A tile of a group's gradient: first row and column, range of the rows that it sums, first filling, fillings."""

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
    tile = block_sizes.choose_tgmm_tile(N, E, M, F, static.cores, widths=static.among(*WIDTHS))
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
        def walk(run: Callable[[TgmmTask], None]) -> Array:
            def run_tile(n: Array, used: Array) -> Array:
                e = lax.div(n, jnp.int32(down * across))
                row, column = warp_specialized.snake_order(n - e * (down * across), down, across)
                start, end = table[e, 0], table[e, 1]
                first = start & -SIDE
                fillings = jnp.where(end > start, lax.div(end - first + (INNER - 1), jnp.int32(INNER)), 0)
                run(TgmmTask(e, row * HEIGHT, column * columns, start, end, used, fillings))
                return used + fillings

            return warp_specialized.for_each_persistent_tile(E * down * across, run_tile)

        def load(task: TgmmTask) -> None:
            @pl.loop(0, task.fillings)
            def load_stage(k: Array) -> None:
                rows = pl.ds(pl.multiple_of((task.start & -SIDE) + k * INNER, SIDE), INNER)

                def copy(stage: Array) -> None:
                    full = ring.here.at[stage]
                    for half in range(WARPGROUPS):
                        source = x.at[rows, pl.ds(task.row + half * ROWS, ROWS)]
                        plgpu.copy_gmem_to_smem(source, x_ring.at[stage, half], full)
                    plgpu.copy_gmem_to_smem(dy.at[rows, pl.ds(task.column, columns)], dy_ring.at[stage], full)

                ring.fill(task.used + k, copy)

        def compute(task: TgmmTask) -> None:
            def operands(k: Array, stage: Array) -> list[tuple[Any, Any]]:
                low = task.start - (task.start & -SIDE) - k * INNER
                high = task.end - (task.start & -SIDE) - k * INNER
                pl.when((low > 0) | (high < INNER))(lambda: zero_other_groups(stage, low, high))
                return [(x_ring.at[stage, warpgroup].transpose((1, 0)), dy_ring.at[stage])]

            def zero_other_groups(stage: Array, low: Array, high: Array) -> None:
                half = columns // WARPGROUPS
                dy_half = [dy_ring.at[stage, :, pl.ds(warpgroup * half + n, CHUNK)] for n in range(0, half, CHUNK)]
                for chunk in (x_ring.at[stage, warpgroup], *dy_half):
                    n = plgpu.broadcasted_iota(jnp.int32, chunk.shape, 0, layout=plgpu.Layout.WGMMA)
                    value = plgpu.load(chunk, layout=plgpu.Layout.WGMMA)
                    chunk[...] = jnp.where((n >= low) & (n < high), value, jnp.zeros_like(value))
                plgpu.commit_smem()
                plgpu.barrier_arrive(clear)
                plgpu.barrier_wait(clear)

            (sums,) = warp_specialized.wgmma_reduce(ring, task.used, task.fillings, operands, columns)
            rows = pl.ds(task.row + warpgroup * ROWS, ROWS)

            def store_chunk(n: int) -> None:
                target = dw.at[task.group, rows, pl.ds(task.column + n, CHUNK)]

                def send(chunk: Any) -> None:
                    plgpu.copy_smem_to_gmem(chunk, target, commit_group=False)

                warp_specialized.leave(staged, n // CHUNK, sums[:, n : n + CHUNK], send)

            def store_tile() -> None:
                remaining = columns if F % columns == 0 else F - task.column
                warp_specialized.chunks(columns, remaining, store_chunk)

            store_tile() if M % HEIGHT == 0 else pl.when(task.row + warpgroup * ROWS < M)(store_tile)

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
