"""The gradient of grouped matrices on Mosaic TPU: one sum over the rows of each group.

Math      dw_e = sum of x_n^T dy_n over the rows n of group e; several dy against one x
Tiling  grid (column tiles of x, those of dy, visits); a visit is a tile of rows for one group, see `group_metadata.py`.

              rows ->          tile 0     tile 1     tile 2
              dw of group 0    ██         █░                     █ rows of the group
              dw of group 1               ░█         ██          ░ masked: of the tile's other group
              dw of group 2    one visit without rows: zeros
          A visit first copies its rows of dy, masked. Those of x are transposed and masked some columns at a
          time, into one of two places while the other is multiplied: the transpose unit works beside the matrix unit.

State     float32 [columns of x, columns of dy] of one group; it leaves the chip when the group's last visit is done.
Traffic   reads x once for each column tile of dy and dy once for each of x, writes dw once. 2 N M F FLOPs. x is
          transposed tile by tile on the chip, never in memory.
Limits    as the forward kernel. What rows of nobody hold reaches nobody.
Source    as the forward kernel.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dantinox.kernels.cost import Cost
from dantinox.kernels.dispatch import Device
from dantinox.kernels.ops.grouped_matmul.common import clear, dot
from dantinox.kernels.ops.grouped_matmul.group_metadata import TileTask, make_group_metadata
from dantinox.kernels.ops.grouped_matmul.pallas_tpu import block_sizes
from dantinox.kernels.ops.grouped_matmul.pallas_tpu.vmem import loop, pieces

Array = jax.Array


def summed(x: Array, dys: Sequence[Array], group_sizes: Array, here: Device, *, name: str) -> list[Array]:
    """[E, M, F] in x's dtype for x [N, M] and each dy [N, F]."""
    (N, M), F, E, dtype = x.shape, dys[0].shape[1], group_sizes.shape[0], x.dtype
    chosen = block_sizes.summed(here, N, E, M, F, dys=len(dys), itemsize=dtype.itemsize)
    plan = make_group_metadata(group_sizes, N, chosen.rows, visit_empty_groups=True)
    tables, operands = plan.reduction_tables(chosen.rows), [x, *dys]
    grid, at = steps(-(-M // chosen.inner), -(-F // chosen.columns), plan.count)
    x_spec = pl.BlockSpec((chosen.rows, chosen.inner), at(lambda m, f, v, g, r, *_: (r[v], m)))
    dy_spec = pl.BlockSpec((chosen.rows, chosen.columns), at(lambda m, f, v, g, r, *_: (r[v], f)))
    out_spec = pl.BlockSpec((1, chosen.inner, chosen.columns), at(lambda m, f, v, g, *_: (g[v], m, f)))
    scratch = [((chosen.inner, chosen.columns), jnp.float32)] * len(dys)
    scratch += [((chosen.rows, chosen.columns), dtype)] * len(dys) + [((chosen.height, chosen.rows), dtype)] * 2
    moved = dtype.itemsize * (x.size + len(dys) * (N * F + E * M * F))
    return pl.pallas_call(
        functools.partial(_kernel, chosen, len(dys), len(grid) - 1),
        out_shape=[jax.ShapeDtypeStruct((E, M, F), dtype)] * len(dys),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(tables),
            grid=grid,
            in_specs=[x_spec] + [dy_spec] * len(dys),
            out_specs=[out_spec] * len(dys),
            scratch_shapes=[pltpu.VMEM(*each) for each in scratch],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")[-len(grid) :],
            vmem_limit_bytes=chosen.vmem,
            disable_bounds_checks=True,  # as in the forward kernel
        ),
        cost_estimate=Cost(2 * N * M * F * len(dys), moved).to_pallas(),
        name=name,
    )(*tables, *operands)


def _kernel(chosen: block_sizes.Tiles, n: int, axis: int, *refs: Any) -> None:
    tables, (x_ref, *rest) = refs[:5], refs[5:]
    dy_refs, outs, sums, down, turned = (
        rest[:n],
        rest[n : 2 * n],
        rest[2 * n : 3 * n],
        rest[3 * n : 4 * n],
        rest[4 * n :],
    )
    v = pl.program_id(axis)
    fresh, visit = tables[4][v] == 1, TileTask.read(tables, v, chosen.rows)
    some = visit.row_start < visit.row_end

    @pl.when(some)
    def _():
        for r, height in pieces(chosen.rows, 128):
            mine = visit.row_mask((height, 1), 0, r)
            for ref, dy_ref in zip(down, dy_refs, strict=True):
                ref[pl.ds(r, height)] = clear(dy_ref[pl.ds(r, height)], mine)

    @pl.when(some & (visit.row > -1))  # apart from the copies: libtpu would mix them and run out of registers
    def _():
        for i, (m, width) in enumerate(pieces(chosen.inner, chosen.height)):
            # Two by turns: one is written while the other is multiplied.
            x_t, part = turned[i % 2], pl.ds(0, width)
            for r, height in pieces(chosen.rows, 128):
                x = x_ref[pl.ds(r, height), pl.ds(m, width)]
                x_t[part, pl.ds(r, height)] = clear(x.T, visit.row_mask((1, height), 1, r))
            for out, ref, dy_ref in zip(outs, sums, down, strict=True):
                for f, columns in pieces(chosen.columns, chosen.width):
                    at = pl.ds(m, width), pl.ds(f, columns)
                    # Zeros and what leaves are of this stream, which has slots free: loops of their own took as long.
                    found = dot(x_t[part], dy_ref[:, at[1]], (1, 0)) + jnp.where(fresh, 0, ref[at])
                    ref[at], out[0, *at] = found, found.astype(out.dtype)

    @pl.when(~some)
    def _():
        def nothing(rows: Any, _: Any) -> None:
            for out in outs:
                out[0, rows] = jnp.zeros_like(out[0, rows])

        loop(chosen.inner, nothing)


def steps(across: int, down: int, count: Array) -> tuple[tuple[Any, ...], Callable[..., Any]]:
    """(grid, how an index map of three axes is one of the grid's): the scalar unit counts what axes there are."""
    if across * down > 1:
        return (across, down, count), lambda index: index
    return (count,), lambda index: lambda v, *tables: index(0, 0, v, *tables)
