"""Step 4, persistent: one thread block per SM computes tile after tile, in an order that reuses L2.

Math      as step 1
Tiling    grid (SMs). Block b computes the tiles b, b + SMs, b + 2 SMs, ... in panels of 16 rows of tiles, so that a
          wave, one tile per SM, is nearly a square. The ring continues from tile to tile, and loads overlap a store:

              tiles of y    0  2  4 │           warpgroup 2   load tile 0    load tile 1           load tile 2
              panel 0       1  3  5 │           warpgroup 0      multiply 0    store 0  multiply 1    store 1
                            6  8 10 │           warpgroup 1       multiply 0    store 0  multiply 1    store 1
              panel 1       7  9 11 ▼           (panels of 2)

State     as step 3; steps are numbered over all tiles of a thread block.
Traffic   85 FLOPs per byte through L2, as step 3. From memory, a wave reads the rows and columns of its square once,
          for 132 SMs 16 tiles of 128 rows and 9 of 256 columns; row by row, it reads all columns.
Limits    as step 1.
Source    NVIDIA, CUTLASS: persistent kernels and threadblock swizzle; Tillet, Triton: matrix multiplication tutorial.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dantinox.kernels.tutorial.hopper import common
from dantinox.kernels.tutorial.hopper.common import COLUMNS, DEPTH, ROWS, STAGES, Ref

Array = jax.Array
CONSUMERS = 2  # warpgroups; one more is the producer
TILE_ROWS = CONSUMERS * ROWS
PANEL = 16  # rows of tiles


def matmul(x: Array, w: Array, *, num_blocks: int | None = None, **unsupported: None) -> Array:
    """[N, F]: x [N, M] times w [M, F]."""
    x, (N, M, F) = common.check(x, w, **unsupported)
    if 0 in (N, M, F):
        return jnp.zeros((N, F), x.dtype)
    k_steps = M // DEPTH
    row_tiles, column_tiles = pl.cdiv(N, TILE_ROWS), pl.cdiv(F, COLUMNS)
    blocks = min(num_blocks or common.num_sms(common.current_device().kind), row_tiles * column_tiles)

    def kernel(x_gmem: Ref, w_gmem: Ref, y_gmem: Ref, x_smem: Ref, w_smem: Ref, y_smem: Ref, full: Ref, empty: Ref):
        block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
        num_tiles = lax.div(row_tiles * column_tiles - block + blocks - 1, jnp.int32(blocks))
        steps = num_tiles * k_steps

        def load(n: Array) -> None:
            row, column = panel_order(block + n * blocks, row_tiles, column_tiles)

            @pl.loop(0, k_steps)
            def load_stage(k: Array) -> None:
                step = n * k_steps + k
                depth, slot = pl.ds(k * DEPTH, DEPTH), step & (STAGES - 1)

                @pl.when(step >= STAGES)
                def wait_until_empty() -> None:
                    plgpu.barrier_wait(empty.at[slot])

                plgpu.copy_gmem_to_smem(x_gmem.at[pl.ds(row, TILE_ROWS), depth], x_smem.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(w_gmem.at[depth, pl.ds(column, COLUMNS)], w_smem.at[slot], full.at[slot])

        def multiply(acc: Ref, n: Array) -> Array:
            @pl.loop(n * k_steps, (n + 1) * k_steps)
            def multiply_stage(step: Array) -> None:
                slot = step & (STAGES - 1)
                plgpu.barrier_wait(full.at[slot])
                plgpu.wgmma(acc, x_smem.at[slot, pl.ds(warpgroup * ROWS, ROWS)], w_smem.at[slot])
                plgpu.wgmma_wait(1)  # until the product of the step before has ended: its stage is free

                @pl.when((step > 0) & (step - 1 + STAGES < steps))
                def release() -> None:
                    plgpu.barrier_arrive(empty.at[(step - 1) & (STAGES - 1)])

            return acc[...]

        def multiply_and_store(n: Array) -> None:
            row, column = panel_order(block + n * blocks, row_tiles, column_tiles)
            y = pl.run_scoped(functools.partial(multiply, n=n), plgpu.ACC((ROWS, COLUMNS)))
            common.store_tile(y, y_smem.at[warpgroup], y_gmem, row + warpgroup * ROWS, column)

        @pl.when(warpgroup == CONSUMERS)
        def producer() -> None:
            plgpu.set_max_registers(24, action="decrease")
            pl.loop(0, num_tiles)(load)

        @pl.when(warpgroup < CONSUMERS)
        def consumer() -> None:
            plgpu.set_max_registers(240, action="increase")
            pl.loop(0, num_tiles)(multiply_and_store)
            plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((N, F), x.dtype),
        scratch_types=(
            common.wgmma_smem((STAGES, TILE_ROWS, DEPTH), x.dtype),
            common.wgmma_smem((STAGES, DEPTH, COLUMNS), x.dtype),
            common.store_smem(x.dtype, CONSUMERS),
            plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=STAGES),
        ),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        interpret=common.interpret(),
        kernel_name="persistent",
    )(x, w)


def panel_order(n: Array, row_tiles: int, column_tiles: int) -> tuple[Array, Array]:
    """Return the first (row, column) of the n-th tile: panel by panel, column by column in each."""
    panel = lax.div(n, jnp.int32(PANEL * column_tiles))
    n, height = n - panel * PANEL * column_tiles, jnp.minimum(PANEL, row_tiles - panel * PANEL)
    return (panel * PANEL + lax.rem(n, height)) * TILE_ROWS, lax.div(n, height) * COLUMNS
