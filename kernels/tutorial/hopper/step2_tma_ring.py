"""Step 2, TMA ring: loads run ahead of the multiplications, in a ring buffer of four stages.

Math      as step 1
Tiling    as step 1. Step k of the contraction uses stage k mod 4; its load starts when step k - 4 has been multiplied:

              stage 0   load k=0 ░░░░░░░░ multiply │ load k=4 ░░░░░░░░░░░░░ multiply       ░ the copy is under way
              stage 1   load k=1 ░░░░░░░░░░░░░░░░░ multiply │ load k=5 ░░░░░░░░░░░░░ ...
              stage 2   load k=2 ░░░░░░░░░░░░░░░░░░░░░░░░░░ multiply │ load k=6 ░░░ ...
              stage 3   load k=3 ░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░ multiply │ load k=7

State     as step 1; each stage has a full barrier, which completes when both copies of the stage have arrived.
Traffic   51 FLOPs per byte, as step 1. Three loads are under way while the tensor cores multiply, and one product is
          queued while the one before it ends. One thread block fills the shared memory of an SM.
Limits    as step 1.
Source    NVIDIA, CUTLASS: efficient GEMM, the multistage pipeline; Pallas: `emit_pipeline`.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dantinox.kernels.tutorial.hopper import common
from dantinox.kernels.tutorial.hopper.common import COLUMNS, DEPTH, ROWS, STAGES, Ref

Array = jax.Array


def matmul(x: Array, w: Array, **unsupported: None) -> Array:
    """[N, F]: x [N, M] times w [M, F]."""
    x, (N, M, F) = common.check(x, w, **unsupported)
    if 0 in (N, M, F):
        return jnp.zeros((N, F), x.dtype)

    k_steps = M // DEPTH

    def kernel(x_gmem: Ref, w_gmem: Ref, y_gmem: Ref, x_smem: Ref, w_smem: Ref, y_smem: Ref, full: Ref) -> None:
        row, column = lax.axis_index("row") * ROWS, lax.axis_index("column") * COLUMNS

        def load(k: Array) -> None:
            depth, slot = pl.ds(k * DEPTH, DEPTH), k & (STAGES - 1)
            plgpu.copy_gmem_to_smem(x_gmem.at[pl.ds(row, ROWS), depth], x_smem.at[slot], full.at[slot])
            plgpu.copy_gmem_to_smem(w_gmem.at[depth, pl.ds(column, COLUMNS)], w_smem.at[slot], full.at[slot])

        def multiply(acc: Ref) -> Array:
            @pl.loop(0, k_steps)
            def step(k: Array) -> None:
                slot = k & (STAGES - 1)
                plgpu.barrier_wait(full.at[slot])
                plgpu.wgmma(acc, x_smem.at[slot], w_smem.at[slot])
                plgpu.wgmma_wait(1)  # until the product of step k - 1 has ended: its stage is free

                @pl.when((k > 0) & (k - 1 + STAGES < k_steps))
                def refill() -> None:
                    load(k - 1 + STAGES)

            return acc[...]

        pl.loop(0, min(STAGES, k_steps))(load)
        y = pl.run_scoped(multiply, plgpu.ACC((ROWS, COLUMNS)))
        common.store_tile(y, y_smem.at[0], y_gmem, row, column)
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((N, F), x.dtype),
        scratch_types=(
            common.wgmma_smem((STAGES, ROWS, DEPTH), x.dtype),
            common.wgmma_smem((STAGES, DEPTH, COLUMNS), x.dtype),
            common.store_smem(x.dtype),
            plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        ),
        grid=(pl.cdiv(N, ROWS), pl.cdiv(F, COLUMNS)),
        grid_names=("row", "column"),
        interpret=common.interpret(),
        kernel_name="tma_ring",
    )(x, w)
