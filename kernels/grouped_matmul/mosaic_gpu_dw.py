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
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.grouped_matmul.mosaic_gpu import (
    CHUNK,
    COLUMNS,
    COMPUTE_REGISTERS,
    INNER,
    MEMORY_REGISTERS,
    ROWS,
    SIDE,
    WARPGROUPS,
    drain,
    every,
    fill,
    place,
    shared,
    total,
    write,
)

Array = jax.Array


def summed(
    x: Array,
    dy: Array,
    group_sizes: Array,
    *,
    cores: int,
    interpret: plgpu.InterpretGPUParams | None = None,
    name: str = "grouped_matmul_dw",
) -> Array:
    """[E, M, F] in x's dtype.

    Args:
        x: [N, M]; dy: [N, F]; M and F multiples of 64, rows sorted by group.
        cores, interpret: as `mosaic_gpu.product`.
    """
    (N, M), F, E = x.shape, dy.shape[1], group_sizes.shape[0]
    down, across = pl.cdiv(M, WARPGROUPS * ROWS), pl.cdiv(F, COLUMNS)
    ends = jnp.cumsum(group_sizes.astype(jnp.int32))
    table = jnp.stack([ends - group_sizes, ends], axis=1)

    def body(x, dy, table, dw, *, x_ring, w_ring, staged, here, free, clear) -> None:
        warpgroup = lax.axis_index("warpgroup")

        def each(run: Callable[..., None]) -> Array:
            def one(n: Array, used: Array) -> Array:
                e = lax.div(n, jnp.int32(down * across))
                row, column = place(n - e * (down * across), down, across)
                start, end = table[e, 0], table[e, 1]
                first = start & -SIDE
                pieces = jnp.where(end > start, lax.div(end - first + (INNER - 1), jnp.int32(INNER)), 0)
                run(e, row * (WARPGROUPS * ROWS), column * COLUMNS, start, end, used, pieces)
                return used + pieces

            return every(E * down * across, one)

        def load(e: Array, row: Array, column: Array, start: Array, end: Array, used: Array, pieces: Array) -> None:
            @pl.loop(0, pieces)
            def _(k: Array) -> None:
                rows = pl.ds(pl.multiple_of((start & -SIDE) + k * INNER, SIDE), INNER)

                def copy(stage: Array) -> None:
                    for half in range(WARPGROUPS):
                        columns = pl.ds(row + half * ROWS, ROWS)
                        plgpu.copy_gmem_to_smem(x.at[rows, columns], x_ring.at[stage, half], here.at[stage])
                    plgpu.copy_gmem_to_smem(dy.at[rows, pl.ds(column, COLUMNS)], w_ring.at[stage], here.at[stage])

                fill(free, used + k, copy)

        def compute(e: Array, row: Array, column: Array, start: Array, end: Array, used: Array, pieces: Array) -> None:
            def operands(k: Array, stage: Array) -> tuple[Any, Any]:
                low = start - (start & -SIDE) - k * INNER
                high = end - (start & -SIDE) - k * INNER

                @pl.when((low > 0) | (high < INNER))
                def _() -> None:
                    half = COLUMNS // WARPGROUPS
                    own = [w_ring.at[stage, :, pl.ds(warpgroup * half + n, CHUNK)] for n in range(0, half, CHUNK)]
                    for piece in (x_ring.at[stage, warpgroup], *own):
                        n = plgpu.broadcasted_iota(jnp.int32, (INNER, CHUNK), 0, layout=plgpu.Layout.WGMMA)
                        value = plgpu.load(piece, layout=plgpu.Layout.WGMMA)
                        piece[...] = jnp.where((n >= low) & (n < high), value, jnp.zeros_like(value))
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(clear)
                    plgpu.barrier_wait(clear)

                return x_ring.at[stage, warpgroup].transpose((1, 0)), w_ring.at[stage]

            sums = total(pieces, used, here, free, operands)
            rows = pl.ds(row + warpgroup * ROWS, ROWS)

            def send(piece: Any, across: int) -> None:
                target = dw.at[e, rows, pl.ds(column + across, CHUNK)]
                plgpu.copy_smem_to_gmem(piece, target, commit_group=False)

            columns = COLUMNS if F % COLUMNS == 0 else F - column
            leave = lambda: write(sums, staged.at[warpgroup], columns, send)
            leave() if M % (WARPGROUPS * ROWS) == 0 else pl.when(row + warpgroup * ROWS < M)(leave)

        @pl.when(warpgroup < WARPGROUPS)
        def _() -> None:
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            each(compute)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == WARPGROUPS)
        def _() -> None:
            plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")
            drain(free, each(load))

    whole = lambda x: jnp.pad(x, ((0, -N % SIDE), (0, 0)))
    scratch = shared((WARPGROUPS, INNER, ROWS), (INNER, COLUMNS), x.dtype, copies=WARPGROUPS + 1)
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((E, M, F), x.dtype),
        scratch_types=scratch | {"clear": plgpu.Barrier(num_arrivals=WARPGROUPS)},
        grid=(cores,),
        grid_names=("block",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret or False,
        kernel_name=name,
    )(whole(x), whole(dy), table)
