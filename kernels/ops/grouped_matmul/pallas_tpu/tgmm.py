"""The gradient of the grouped weights on Mosaic TPU (transposed grouped matmul): one sum over the rows of each group.

Math      dw_e = sum of x_n^T dy_n over the rows n of group e; several dy against one x
Tiling    grid (column blocks of x, those of dy, visits); a visit is a tile of rows for one group, see
          `group_metadata.py`.

              rows ->          tile 0     tile 1     tile 2
              dw of group 0    ██         █░                     █ rows of the group
              dw of group 1               ░█         ██          ░ masked: rows of the tile's other group
              dw of group 2    one visit without rows: zeros

          A visit first copies its rows of dy, masked. It transposes and masks x in strips of columns, into one of two
          buffers while the other is multiplied: the transpose unit works in parallel with the matrix unit.
State     float32 [columns of x, columns of dy] of one group, written out after the group's last visit.
Traffic   reads x once per column block of dy and dy once per column block of x, writes dw once. 2 N M F FLOPs. x is
          transposed tile by tile in VMEM, never in HBM.
Limits    those of the forward kernel. Values in unassigned rows do not affect the result.
Source    that of the forward kernel.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dantinox.kernels.cost import Cost
from dantinox.kernels.dispatch import Device
from dantinox.kernels.mosaic_tpu import in_32_bits
from dantinox.kernels.ops.grouped_matmul.common import dot_f32, mask_to_zero
from dantinox.kernels.ops.grouped_matmul.group_metadata import ReductionTables, TileTask, make_group_metadata
from dantinox.kernels.ops.grouped_matmul.pallas_tpu import block_sizes
from dantinox.kernels.ops.grouped_matmul.pallas_tpu.vmem import for_each_row_chunk, split_range
from dantinox.kernels.vma import varying_shape

Array = jax.Array
Ref = Any


class TgmmScratch(NamedTuple):
    """Shapes or references in VMEM: per dy the float32 sums and its masked rows; two buffers for transposed x."""

    acc: Sequence[Any]
    masked_dys: Sequence[Any]
    x_transposed: Sequence[Any]


@in_32_bits
def tgmm(x: Array, dys: Sequence[Array], group_sizes: Array, device: Device, *, name: str) -> list[Array]:
    """Sum x_n^T dy_n over the rows n of each group, for x [N, M] and each dy [N, F]: [E, M, F] in x's dtype."""
    (N, M), F, E, dtype = x.shape, dys[0].shape[1], group_sizes.shape[0], x.dtype
    sizes = block_sizes.tgmm_block_sizes(device, N, E, M, F, num_dy=len(dys), itemsize=dtype.itemsize)
    block_m, block_k, block_n = sizes.block_m, sizes.block_k, sizes.block_n
    metadata = make_group_metadata(group_sizes, N, block_m, visit_empty_groups=True)
    tables = metadata.reduction_tables(block_m)
    grid, index_map = _grid(-(-M // block_k), -(-F // block_n), metadata.count)
    x_spec = pl.BlockSpec((block_m, block_k), index_map(lambda m, f, v, tables: (tables.tile[v], m)))
    dy_spec = pl.BlockSpec((block_m, block_n), index_map(lambda m, f, v, tables: (tables.tile[v], f)))
    dw_spec = pl.BlockSpec((1, block_k, block_n), index_map(lambda m, f, v, tables: (tables.group[v], m, f)))
    scratch = TgmmScratch(
        acc=[pltpu.VMEM((block_k, block_n), jnp.float32)] * len(dys),
        masked_dys=[pltpu.VMEM((block_m, block_n), dtype)] * len(dys),
        x_transposed=[pltpu.VMEM((sizes.mxu_m, block_m), dtype)] * 2,
    )
    moved = dtype.itemsize * (x.size + len(dys) * (N * F + E * M * F))
    (dws,) = pl.pallas_call(
        functools.partial(tgmm_kernel, sizes=sizes, visit_axis=len(grid) - 1),
        out_shape=([varying_shape((E, M, F), dtype, x)] * len(dys),),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=(x_spec, [dy_spec] * len(dys)),
            out_specs=([dw_spec] * len(dys),),
            scratch_shapes=(scratch,),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")[-len(grid) :],
            vmem_limit_bytes=sizes.vmem_bytes,
            disable_bounds_checks=True,  # as in the forward kernel
        ),
        cost_estimate=Cost(2 * N * M * F * len(dys), moved).to_pallas(),
        name=name,
    )(tables, x, list(dys))
    return dws


def tgmm_kernel(
    tables: ReductionTables,
    x_ref: Ref,
    dy_refs: Sequence[Ref],
    dw_refs: Sequence[Ref],
    scratch: TgmmScratch,
    *,
    sizes: block_sizes.GmmBlockSizes,
    visit_axis: int,
) -> None:
    """Add one tile of rows to the sums of its group."""
    v = pl.program_id(visit_axis)
    is_group_start, task = tables.is_group_start[v] == 1, TileTask.load(tables, v, sizes.block_m)
    has_rows = task.row_start < task.row_end

    @pl.when(has_rows)
    def copy_masked_dys() -> None:
        for r, height in split_range(sizes.block_m, 128):
            row_mask = task.row_mask((height, 1), 0, r)
            for masked_ref, dy_ref in zip(scratch.masked_dys, dy_refs, strict=True):
                masked_ref[pl.ds(r, height)] = mask_to_zero(dy_ref[pl.ds(r, height)], row_mask)

    # A separate branch: otherwise libtpu interleaves the products with the copies and runs out of registers.
    @pl.when(has_rows & (task.row > -1))
    def multiply() -> None:
        for i, (m, width) in enumerate(split_range(sizes.block_k, sizes.mxu_m)):
            # Two buffers in turn: one is written while the other is multiplied.
            x_t, strip = scratch.x_transposed[i % 2], pl.ds(0, width)
            for r, height in split_range(sizes.block_m, 128):
                x = x_ref[pl.ds(r, height), pl.ds(m, width)]
                x_t[strip, pl.ds(r, height)] = mask_to_zero(x.T, task.row_mask((1, height), 1, r))
            for dw_ref, acc_ref, dy_ref in zip(dw_refs, scratch.acc, scratch.masked_dys, strict=True):
                for f, num_columns in split_range(sizes.block_n, sizes.mxu_n):
                    index = pl.ds(m, width), pl.ds(f, num_columns)
                    # Clearing and writing use free slots of this stream; loops of their own took as long.
                    product = dot_f32(x_t[strip], dy_ref[:, index[1]], (1, 0))
                    total = product + jnp.where(is_group_start, 0, acc_ref[index])
                    acc_ref[index], dw_ref[0, *index] = total, total.astype(dw_ref.dtype)

    @pl.when(~has_rows)
    def write_zeros() -> None:
        def zero_rows(rows: Any, _: Any) -> None:
            for dw_ref in dw_refs:
                dw_ref[0, rows] = jnp.zeros_like(dw_ref[0, rows])

        for_each_row_chunk(sizes.block_k, zero_rows)


def _grid(x_blocks: int, dy_blocks: int, count: Array) -> tuple[tuple[Any, ...], Callable[..., Any]]:
    """Return (grid, adapter of three-axis index maps to it).

    The scalar unit spends time on every grid axis, so column axes of size 1 are dropped.
    """
    if x_blocks * dy_blocks > 1:
        return (x_blocks, dy_blocks, count), lambda index: index
    return (count,), lambda index: lambda v, tables: index(0, 0, v, tables)
