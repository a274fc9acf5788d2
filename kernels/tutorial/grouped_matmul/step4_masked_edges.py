"""Step 4, masked edges: rows stay where they are. A tile that two groups share has two tasks, each writes its rows.

Math      as step 1, for each task, a tile of rows and a group with rows in it:  y = x w[e] where start <= n < end
Tiling    grid (tasks,), as many as the group sizes need. Unassigned rows are a group without weights:

              rows          ├──── 0 ───┼─ 1 ─┼──── 3 ────┤ unassigned
              tile i        [  0  ][  1  ][  2  ][  3  ][  4  ]
              tasks of 0    █      ▞
                       1           ▞      ▞                     █ interior, all rows of one group: no mask
                       3                  ▞      █      ▞       ▞ edge: computed, its own rows written
              unassigned                                ░       ░ zeros written, nothing multiplied

State     y, in its output block, from the first task of a tile to its last: they follow each other.
Traffic   the minimum: x and y once, the weights of each group with rows once. 2 M F FLOPs per row of each task: a tile
          with n groups is multiplied n times, at most E - 1 more tiles than N / row_tile.
Limits    float32, bfloat16; float16 only interpreted. Any N, E, and M, F whose weights fit. NotImplementedError: w_up.
          ValueError: other shapes and dtypes; tiles that are not multiples of 16.
Source    The (tile, group) grid of JAX's megablox, after Gale et al., MegaBlocks (arXiv:2211.15841).
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


def grouped_matmul(x: Array, w: Array, group_sizes: Array, *, row_tile: int = 128, **unsupported: None) -> Array:
    """[N, F], as `dantinox.kernels.grouped_matmul`: x [N, M], w [E, M, F], group_sizes [E]."""
    group_sizes = check(x, w, group_sizes, row_tile, **unsupported)
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
            pl.BlockSpec((None, M, F), lambda t, tasks: (jnp.minimum(tasks.group[t], E - 1), 0, 0)),
        ],
        out_specs=pl.BlockSpec((row_tile, F), lambda t, tasks: (tasks.tile[t], 0)),
    )
    kernel = pl.pallas_call(
        functools.partial(_kernel, E=E),
        out_shape=jax.ShapeDtypeStruct((N, F), x.dtype),
        grid_spec=grid_spec,
        **call_options(),
        name="masked_edges",
    )
    return kernel(tasks, x, w)


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


def _kernel(tasks: Tasks, x_ref: Any, w_ref: Any, y_ref: Any, *, E: int) -> None:
    t, row_tile = pl.program_id(0), y_ref.shape[0]
    first, start, end = tasks.tile[t] * row_tile, tasks.start[t], tasks.end[t]
    assigned, interior = tasks.group[t] < E, (start <= first) & (first + row_tile <= end)

    def write(masked: bool, zero: bool = False) -> None:
        y = jnp.zeros(y_ref.shape, y_ref.dtype)
        if not zero:
            y = dot(x_ref[...], w_ref[...]).astype(y_ref.dtype)
        if masked:
            n = row_index(first, row_tile)
            y = jnp.where((start <= n) & (n < end), y, y_ref[...])
        y_ref[...] = y

    pl.when(assigned & interior)(functools.partial(write, masked=False))
    pl.when(assigned & ~interior)(functools.partial(write, masked=True))
    pl.when(~assigned)(functools.partial(write, masked=True, zero=True))
