"""Step 3, warp specialized: a producer warpgroup loads, two consumer warpgroups multiply.

Math      as step 1
Tiling    grid (N / 128, F / 256). Each consumer computes 64 rows of a tile of 128 x 256; both read the same w:

              warpgroup 2   load k=0  load k=1  load k=2  load k=3 │ load k=4 │ load k=5         producer
                               │ full                        empty │
              warpgroup 0      multiply k=0  multiply k=1  multiply k=2  multiply k=3  ...       rows 0 to 63
              warpgroup 1       multiply k=0  multiply k=1  multiply k=2  multiply k=3  ...      rows 64 to 127

State     as step 1, per consumer. The producer gives registers back and the consumers take them: 24 and 240 per thread
          fit where three warpgroups alike have 168. Each stage has a full barrier, which the two copies complete, and
          an empty barrier, which the two consumers complete.
Traffic   128 rows of x and 256 columns of w per tile: 85 FLOPs per byte. A consumer issues nothing but products; the
          wait for an empty stage is the producer's.
Limits    as step 1.
Source    Bauer et al., CudaDMA (SC 2011), for the idea; NVIDIA, CUTLASS: warp-specialized kernels.
"""

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


def matmul(x: Array, w: Array, **unsupported: None) -> Array:
    """[N, F]: x [N, M] times w [M, F]."""
    x, (N, M, F) = common.check(x, w, **unsupported)
    if 0 in (N, M, F):
        return jnp.zeros((N, F), x.dtype)
    k_steps = M // DEPTH

    def kernel(x_gmem: Ref, w_gmem: Ref, y_gmem: Ref, x_smem: Ref, w_smem: Ref, y_smem: Ref, full: Ref, empty: Ref):
        row, column = lax.axis_index("row") * TILE_ROWS, lax.axis_index("column") * COLUMNS
        warpgroup = lax.axis_index("warpgroup")

        def load(k: Array) -> None:
            depth, slot = pl.ds(k * DEPTH, DEPTH), k & (STAGES - 1)

            @pl.when(k >= STAGES)
            def wait_until_empty() -> None:
                plgpu.barrier_wait(empty.at[slot])

            plgpu.copy_gmem_to_smem(x_gmem.at[pl.ds(row, TILE_ROWS), depth], x_smem.at[slot], full.at[slot])
            plgpu.copy_gmem_to_smem(w_gmem.at[depth, pl.ds(column, COLUMNS)], w_smem.at[slot], full.at[slot])

        def multiply(acc: Ref) -> Array:
            @pl.loop(0, k_steps)
            def step(k: Array) -> None:
                slot = k & (STAGES - 1)
                plgpu.barrier_wait(full.at[slot])
                plgpu.wgmma(acc, x_smem.at[slot, pl.ds(warpgroup * ROWS, ROWS)], w_smem.at[slot])
                plgpu.wgmma_wait(1)  # until the product of step k - 1 has ended: its stage is free

                @pl.when((k > 0) & (k - 1 + STAGES < k_steps))
                def release() -> None:
                    plgpu.barrier_arrive(empty.at[(k - 1) & (STAGES - 1)])

            return acc[...]

        @pl.when(warpgroup == CONSUMERS)
        def producer() -> None:
            plgpu.set_max_registers(24, action="decrease")
            pl.loop(0, k_steps)(load)

        @pl.when(warpgroup < CONSUMERS)
        def consumer() -> None:
            plgpu.set_max_registers(240, action="increase")
            y = pl.run_scoped(multiply, plgpu.ACC((ROWS, COLUMNS)))
            common.store_tile(y, y_smem.at[warpgroup], y_gmem, row + warpgroup * ROWS, column)
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
        grid=(pl.cdiv(N, TILE_ROWS), pl.cdiv(F, COLUMNS)),
        grid_names=("row", "column"),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        interpret=common.interpret(),
        kernel_name="warp_specialized",
    )(x, w)
