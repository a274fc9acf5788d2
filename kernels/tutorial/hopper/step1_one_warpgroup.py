"""Step 1, one warpgroup: it loads, waits and multiplies, in turns.

Math      y = x w, 64 of the contraction at a time: acc = acc + x[:, k] w[k, :]
Tiling    grid (N / 64, F / 256). A thread block computes one tile of y, from a row of tiles of x and a column of w:

                           w  k ░░░▓░░░          time ->
                              k ░░░▓░░░          load k=0  wait  multiply  load k=1  wait  multiply
              x  k k k        y ░░░▓░░░
                 ▓ ▓ ▓          ░░░█░░░          █ the tile

State     64 x 256 accumulators in float32, 128 registers of each of the 128 threads.
Traffic   a tile reads 64 rows of x and 256 columns of w, through L2: 51 FLOPs per byte. Neither the tensor cores nor
          the memory work while the other does, apart from other thread blocks on the same SM.
Limits    bfloat16, float16; any N, where x is padded to a multiple of 8 rows; M and F multiples of 64.
          NotImplementedError: other dtypes and sizes. ValueError: other shapes.
Source    NVIDIA, PTX ISA: wgmma, cp.async.bulk.tensor (TMA) and mbarrier; JAX, Pallas: Mosaic GPU reference.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dantinox.kernels.tutorial.hopper import common
from dantinox.kernels.tutorial.hopper.common import COLUMNS, DEPTH, ROWS, Ref

Array = jax.Array


def matmul(x: Array, w: Array, **unsupported: None) -> Array:
    """[N, F]: x [N, M] times w [M, F]."""
    x, (N, M, F) = common.check(x, w, **unsupported)
    if 0 in (N, M, F):
        return jnp.zeros((N, F), x.dtype)

    def kernel(x_gmem: Ref, w_gmem: Ref, y_gmem: Ref, x_smem: Ref, w_smem: Ref, y_smem: Ref, full: Ref) -> None:
        row, column = lax.axis_index("row") * ROWS, lax.axis_index("column") * COLUMNS

        def load(k: Array) -> None:
            depth = pl.ds(k * DEPTH, DEPTH)
            plgpu.copy_gmem_to_smem(x_gmem.at[pl.ds(row, ROWS), depth], x_smem, full)
            plgpu.copy_gmem_to_smem(w_gmem.at[depth, pl.ds(column, COLUMNS)], w_smem, full)

        def multiply(acc: Ref) -> Array:
            @pl.loop(0, M // DEPTH)
            def step(k: Array) -> None:
                load(k)
                plgpu.barrier_wait(full)  # until both copies have arrived
                plgpu.wgmma(acc, x_smem, w_smem)
                plgpu.wgmma_wait(0)  # until it has read its operands: the next load overwrites them

            return acc[...]

        y = pl.run_scoped(multiply, plgpu.ACC((ROWS, COLUMNS)))
        common.store_tile(y, y_smem.at[0], y_gmem, row, column)
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((N, F), x.dtype),
        scratch_types=(
            common.wgmma_smem((ROWS, DEPTH), x.dtype),
            common.wgmma_smem((DEPTH, COLUMNS), x.dtype),
            common.store_smem(x.dtype),
            plgpu.Barrier(num_arrivals=2),  # two copies
        ),
        grid=(pl.cdiv(N, ROWS), pl.cdiv(F, COLUMNS)),
        grid_names=("row", "column"),
        interpret=common.interpret(),
        kernel_name="one_warpgroup",
    )(x, w)
