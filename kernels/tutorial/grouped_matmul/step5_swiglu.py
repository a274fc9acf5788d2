"""Step 5, SwiGLU: two products of the same rows, and silu(gate) * up while both are on the chip.

Math      y[n] = silu(gate) * up,  gate = x[n] w[e],  up = x[n] w_up[e] for row n of group e;  silu(z) = z / (1 + e^-z)
          without w_up  y[n] = gate
Tiling    grid (tasks,), as in step 4; a task multiplies its tile with both weights of its group:

              rows          ├──── 0 ───┼─ 1 ─┼──── 3 ────┤ unassigned
              tile i        [  0  ][  1  ][  2  ][  3  ][  4  ]
              tasks of 0    █      ▞
                       1           ▞      ▞                     █ interior, all rows of one group: no mask
                       3                  ▞      █      ▞       ▞ edge: computed, its own rows written
              unassigned                                ░       ░ zeros written, nothing multiplied

State     y, in its output block, from the first task of a tile to its last.
Traffic   the minimum: x and y once, both weights of each group with rows once. Two calls of step 4 read x twice, write
          gate and up, and XLA reads both: 4 N F elements more. 4 M F FLOPs and F exponentials per row of each task.
Limits    float32, bfloat16; float16 only interpreted. Any N, E, and M, F whose two weights fit. ValueError: other
          shapes and dtypes; tiles that are not multiples of 16.
Source    Shazeer, GLU Variants Improve Transformer (arXiv:2002.05202); epilogues in CUTLASS.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dantinox.kernels.tutorial.grouped_matmul.common import (
    call_options,
    check,
    check_second_weight,
    dot,
    find_group,
    group_offsets,
    row_index,
)

Array = jax.Array


class Tasks(NamedTuple):
    """Four tables in scalar memory: the group of each task, E for unassigned rows; its tile; the rows of its group."""

    group: Array
    tile: Array
    start: Array
    end: Array


def grouped_matmul(x: Array, w: Array, group_sizes: Array, *, w_up: Array | None = None, row_tile: int = 128) -> Array:
    """[N, F], as `dantinox.kernels.grouped_matmul`: x [N, M], w and w_up [E, M, F], group_sizes [E]."""
    group_sizes = check(x, w, group_sizes, row_tile)
    weights = check_second_weight(w, w_up)
    N, (E, M, F) = x.shape[0], w.shape
    if 0 in (x.size, w.size):
        return jnp.zeros((N, F), x.dtype)
    count, tasks = list_tasks(group_sizes, N, row_tile)
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(count,),
        in_specs=[
            pl.BlockSpec((row_tile, M), lambda t, tasks: (tasks.tile[t], 0)),
            # Unassigned rows name the weights of the last group, which are there already unless it is empty.
            *[pl.BlockSpec((None, M, F), lambda t, tasks: (jnp.minimum(tasks.group[t], E - 1), 0, 0))] * len(weights),
        ],
        out_specs=pl.BlockSpec((row_tile, F), lambda t, tasks: (tasks.tile[t], 0)),
    )
    kernel = pl.pallas_call(
        functools.partial(_kernel, E=E),
        out_shape=jax.ShapeDtypeStruct((N, F), x.dtype),
        grid_spec=grid_spec,
        **call_options(),
        name="swiglu",
    )
    return kernel(tasks, x, *weights)


def list_tasks(group_sizes: Array, N: int, row_tile: int) -> tuple[Array, Tasks]:
    """Number of tasks, and tables of as many as any group sizes may need. In the order of rows, as of groups."""
    E, offsets = group_sizes.shape[0], jnp.append(group_offsets(group_sizes), N)
    start, end = offsets[:-1], offsets[1:]  # of the E groups and of the unassigned rows
    first_tile = start // row_tile
    tiles = jnp.where(start < end, pl.cdiv(end, row_tile) - first_tile, 0)
    task_ends = jnp.cumsum(tiles)
    t = jnp.arange(pl.cdiv(N, row_tile) + E, dtype=jnp.int32)
    group = jnp.minimum(find_group(task_ends, t), E)
    tile = jnp.minimum(first_tile[group] + t - (task_ends - tiles)[group], (N - 1) // row_tile)
    return task_ends[-1], Tasks(group, tile, start[group], end[group])


def _kernel(tasks: Tasks, x_ref: Any, *refs: Any, E: int) -> None:
    *w_refs, y_ref = refs
    t, row_tile = pl.program_id(0), y_ref.shape[0]
    first, start, end = tasks.tile[t] * row_tile, tasks.start[t], tasks.end[t]
    assigned, interior = tasks.group[t] < E, (start <= first) & (first + row_tile <= end)

    def epilogue(gate: Array, up: Array | None = None) -> Array:
        return gate if up is None else gate * jax.nn.sigmoid(gate) * up  # both float32

    def write(masked: bool, zero: bool = False) -> None:
        y = jnp.zeros(y_ref.shape, y_ref.dtype)
        if not zero:
            y = epilogue(*(dot(x_ref[...], w_ref[...]) for w_ref in w_refs)).astype(y_ref.dtype)
        if masked:
            n = row_index(first, row_tile)
            y = jnp.where((start <= n) & (n < end), y, y_ref[...])
        y_ref[...] = y

    pl.when(assigned & interior)(functools.partial(write, masked=False))
    pl.when(assigned & ~interior)(functools.partial(write, masked=True))
    pl.when(~assigned)(functools.partial(write, masked=True, zero=True))
