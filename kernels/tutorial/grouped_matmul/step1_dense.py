"""Step 1, dense: every row times the weights of every group; a mask keeps one product per row.

Math      y[n] = x[n] w[e] for row n of group e: for each e  y = x w[e] where offsets[e] <= n < offsets[e + 1], else y
Tiling    grid (E,). All rows are one tile, and none is skipped:

              groups ->    w[0]   w[1]   w[2]   w[3]
              N rows        ▞      ▞      ▞      ▞      ▞ computed, then masked

State     y, in its output block: the block is the same for all steps, so it stays on the chip until the last.
Traffic   x and y once, each group's weights once, of groups without rows too. This is the minimum if all groups have
          rows. 2 E N M F FLOPs, E times what is needed. The chip holds x, y and the weights of two groups.
Limits    float32, bfloat16; float16 only interpreted. Any N, M, F, E whose x and y fit; compiled, the program is
          unrolled over N M F. NotImplementedError: w_up. ValueError: other shapes and dtypes.
Source    XLA's `lax.ragged_dot` multiplies every row with the weights of every group too, on a CPU.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dantinox.kernels.tutorial.grouped_matmul.common import call_options, check, dot, group_offsets, row_index

Array = jax.Array


def grouped_matmul(x: Array, w: Array, group_sizes: Array, **unsupported: None) -> Array:
    """[N, F], as `dantinox.kernels.grouped_matmul`: x [N, M], w [E, M, F], group_sizes [E]."""
    group_sizes = check(x, w, group_sizes, **unsupported)
    N, (E, M, F) = x.shape[0], w.shape
    if 0 in (x.size, w.size):
        return jnp.zeros((N, F), x.dtype)
    # None: the kernel does not see this axis; each step takes one index of it.
    kernel = pl.pallas_call(
        _kernel,
        out_shape=jax.ShapeDtypeStruct((N, F), x.dtype),
        grid=(E,),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),  # scalars: the offsets are read as numbers, not as vectors
            pl.BlockSpec((N, M), lambda e: (0, 0)),
            pl.BlockSpec((None, M, F), lambda e: (e, 0, 0)),
        ],
        out_specs=pl.BlockSpec((N, F), lambda e: (0, 0)),
        **call_options(),
        name="dense",
    )
    return kernel(group_offsets(group_sizes), x, w)


def _kernel(offsets_ref: Any, x_ref: Any, w_ref: Any, y_ref: Any) -> None:
    e = pl.program_id(0)

    @pl.when(e == 0)
    def init_output() -> None:
        y_ref[...] = jnp.zeros(y_ref.shape, y_ref.dtype)  # unassigned rows keep it

    n = row_index(0, y_ref.shape[0])
    in_group = (offsets_ref[e] <= n) & (n < offsets_ref[e + 1])
    # A selection, not a product with the mask: 0 * NaN would be NaN.
    y_ref[...] = jnp.where(in_group, dot(x_ref[...], w_ref[...]).astype(y_ref.dtype), y_ref[...])
