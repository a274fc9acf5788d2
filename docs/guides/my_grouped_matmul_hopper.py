"""Grouped matmul for Hopper GPUs in Pallas, simulated on a CPU: one warpgroup per tile of the result.

Math      y[n] = x[n] w[e] for the rows n of group e, and 0 for the rows past the last group. The backward pass is that
          of plain XLA: right, but not yet fast.
Tiling    grid (tiles of 128 columns, tiles of 64 rows). Tiles of rows lie where TMA loads them, at multiples of 64, and
          may hold rows of several groups. Each group of a tile multiplies all of its rows and keeps its own:

              groups    |    0    | 1 |  2 (empty)  |    3    |   past    |
              tiles     |    0    |    1    |    2    |    3    |
              products       0      0 1 3        3       none: zeros

          A step loads [64, 64] of x and [64, 128] of w by TMA, waits, and multiplies; nothing overlaps yet.
State     64 x 128 float32 sums of the tile and of one product, in the registers of the warpgroup: 128 per thread.
Traffic   a product reads 64 rows of x and 128 columns of w: 43 FLOPs per byte, from L2. Writes y once.
Limits    bfloat16, float16; M a multiple of 64 and F of 128. Rows past the sum and rows of other groups only enter
          rows of a product that are not kept, so NaN in them reaches nothing. Matrices of empty groups are not read.
Source    NVIDIA's CUTLASS for wgmma fed by TMA; kernels/ops/grouped_matmul/pallas_sm90/ overlaps the steps.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dantinox.kernels.dispatch import current_device, on_hopper
from dantinox.kernels.ops.grouped_matmul import xla
from dantinox.kernels.vma import call_invariant, varying_shape

ROWS, COLUMNS, DEPTH = 64, 128, 64  # wgmma multiplies 64 rows
MATRIX = plgpu.Layout.WGMMA  # how the registers of a warpgroup hold a tile


def grouped_matmul(x, w, group_sizes):
    """See `dantinox.kernels.grouped_matmul`, which has checked the arguments."""
    platform, kind = current_device()
    if platform not in ("cpu", "gpu") or (platform == "gpu" and not on_hopper()):
        raise NotImplementedError(f"my Hopper grouped matmul runs on Hopper, and simulated on a CPU; this is {kind}")
    if x.dtype not in (jnp.bfloat16, jnp.float16) or x.shape[1] % DEPTH or w.shape[2] % COLUMNS:
        raise NotImplementedError(
            f"my Hopper grouped matmul takes bfloat16 and float16, M in multiples of {DEPTH} and F of {COLUMNS}"
        )
    return product(x, w, group_sizes)


@jax.custom_vjp
def product(x, w, group_sizes):
    """Grouped matmul with a derivative."""
    return call_invariant(multiply, x, w, group_sizes)


def product_forward(x, w, group_sizes):
    """The backward pass needs the inputs only."""
    return product(x, w, group_sizes), (x, w, group_sizes)


def product_backward(inputs, dy):
    """The gradients of plain XLA."""
    x, w, group_sizes = inputs
    dx, dw = jax.vjp(lambda x, w: xla.grouped_matmul(x, w, group_sizes), x, w)[1](dy)
    return dx, dw, None


product.defvjp(product_forward, product_backward)


def multiply(x, w, group_sizes):
    """y[n] = x[n] w[group of n], and zero past the last group."""
    (N, M), (E, _, F) = x.shape, w.shape
    x = jnp.pad(x, ((0, -N % ROWS), (0, 0)))
    # Tables: the ends of the groups, and the first and the last group of each tile of rows.
    ends = jnp.cumsum(group_sizes).astype(jnp.int32)
    first_row = jnp.arange(0, x.shape[0], ROWS, dtype=jnp.int32)
    first = jnp.sum(ends <= first_row[:, None], axis=1, dtype=jnp.int32)
    last = jnp.sum(ends < first_row[:, None] + ROWS, axis=1, dtype=jnp.int32)

    def kernel(x_gmem, w_gmem, ends_gmem, first_gmem, last_gmem, y_gmem, x_smem, w_smem, y_smem, full):
        tile, column = lax.axis_index("tile"), lax.axis_index("column") * COLUMNS
        rows, columns = pl.ds(tile * ROWS, ROWS), pl.ds(column, COLUMNS)
        row = tile * ROWS + plgpu.broadcasted_iota(jnp.int32, (ROWS, COLUMNS), 0, layout=MATRIX)

        def add_group(e, acc):
            end = ends_gmem[e]
            start = jnp.where(e == 0, 0, ends_gmem[lax.max(e - 1, 0)])

            def multiply_group(product_ref):
                def step(m, _):
                    contracted = pl.ds(m * DEPTH, DEPTH)
                    plgpu.copy_gmem_to_smem(x_gmem.at[rows, contracted], x_smem, full)
                    plgpu.copy_gmem_to_smem(w_gmem.at[e, contracted, columns], w_smem, full)
                    plgpu.barrier_wait(full)
                    plgpu.wgmma(product_ref, x_smem, w_smem)
                    plgpu.wgmma_wait(0)  # the next copies write over what it reads

                lax.fori_loop(0, jnp.where(start < end, M // DEPTH, 0), step, None)
                return product_ref[...]

            product = pl.run_scoped(multiply_group, plgpu.ACC((ROWS, COLUMNS), jnp.float32))
            return jnp.where((start <= row) & (row < end), product, acc)

        zeros = plgpu.layout_cast(jnp.zeros((ROWS, COLUMNS), jnp.float32), MATRIX)
        groups = lax.min(last_gmem[tile] + 1, E)
        y_smem[...] = lax.fori_loop(first_gmem[tile], groups, add_group, zeros).astype(y_smem.dtype)
        plgpu.commit_smem()  # makes the write visible to the copy
        plgpu.copy_smem_to_gmem(y_smem, y_gmem.at[rows, columns])
        plgpu.wait_smem_to_gmem(0)

    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # the layout that wgmma reads
    y = plgpu.kernel(
        kernel,
        out_type=varying_shape((x.shape[0], F), x.dtype),
        scratch_types=(
            *[
                plgpu.SMEM(shape, x.dtype, transforms=transforms)
                for shape in ((ROWS, DEPTH), (DEPTH, COLUMNS), (ROWS, COLUMNS))
            ],
            plgpu.Barrier(num_arrivals=2),  # of the two copies
        ),
        grid=(F // COLUMNS, x.shape[0] // ROWS),
        grid_names=("column", "tile"),
        interpret=plgpu.InterpretGPUParams() if current_device().platform == "cpu" else False,
        kernel_name="my_grouped_matmul_hopper",
    )(x, w, ends, first, last)
    return y[:N]
