"""Grouped matmul on Mosaic TPU: every row times the weights of its group.

Math      sums = x w_e, or x w_e^T with the weights read in their own layout; several products, or their sum; then an
          epilogue on the sums while they are on the chip: y = epilogue(sums, other arrays of the same rows)
Tiling    grid (column blocks, visits, steps of the contraction); a visit is a tile of rows for one group, see
          `group_metadata.py`. The columns are the outermost axis: the weights of a group stay in VMEM during one pass
          over the rows.

              columns ->    block 0    block 1           w_0 ╲
              rows  tile 0  ██ 0       ██ 0              w_1  ╲ one of them at a time
                    tile 1  ██ 0 ▒ 1   ██ 0 ▒ 1          w_2   ╲
                    tile 2  ▒▒ 1       ▒▒ 1         ▒ next group: the tile is visited again, earlier rows are restored
                    tile 3  ░░         ░░           ░ unassigned: zeros are written, nothing is multiplied

          A visit multiplies only the chunks of a tile that have rows of its group, several of them in one stream of
          products, because a stream takes some 260 bundles to fill and drain the matrix unit. A visit writes whole
          chunks: later visits overwrite the rows of later groups, and rows of earlier groups are saved before and
          restored after. So the stream of products needs no mask and fits in registers.
State     float32 sums of one tile, if the contraction takes several steps; else none. If the products of one step are
          split along the contraction (`block_k_sub`, `leading_k`), their partial sums have scratch of their own.
Traffic   reads x once per column block and the weights of each non-empty group once; with several steps of the
          contraction, the weights once per visit. Writes y once. 2 N K J FLOPs; the arithmetic intensity of a dense
          matmul if groups have more than some 500 rows; below that, reading weights is the bottleneck.
Limits    float32, bfloat16, and float16, which is computed in float32; any N, K, J, E that `limits.py` does not
          refuse. `dantinox.kernels.grouped_matmul` raises the ValueErrors.
Source    Gale et al., MegaBlocks (arXiv:2211.15841); jax's megablox for the grid of (tile, group) pairs.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dantinox.kernels.cost import Cost
from dantinox.kernels.dispatch import Device
from dantinox.kernels.mosaic_tpu import in_32_bits
from dantinox.kernels.ops.grouped_matmul.group_metadata import make_group_metadata
from dantinox.kernels.ops.grouped_matmul.pallas_tpu import block_sizes
from dantinox.kernels.ops.grouped_matmul.pallas_tpu.gmm_kernel import (
    Epilogue,
    GmmConfig,
    GmmInputs,
    GmmScratch,
    gmm_kernel,
)
from dantinox.kernels.ops.grouped_matmul.pallas_tpu.vmem import split_range
from dantinox.kernels.vma import varying_shape

Array = jax.Array


@in_32_bits
def gmm(
    xs: Sequence[Array],
    ws: Sequence[Array],
    group_sizes: Array,
    device: Device,
    *,
    transposed: bool = False,
    sum_products: bool = False,
    epilogue: Epilogue | None = None,
    matrices: Sequence[Array] = (),
    row_vectors: Sequence[Array] = (),
    group_vectors: Sequence[Array] = (),
    out_kinds: Sequence[str] = ("matrix",),
    name: str,
) -> list[Array]:
    """Return the outputs of `epilogue(*sums, *matrices, *row_vectors, *group_vectors)`; zeros in unassigned rows.

    Args:
        xs: [N, K], one per weight array, or one for all.
        ws: [E, K, J]; [E, J, K] if `transposed`.
        group_sizes: [E] int32.
        device: the chip to choose block sizes for.
        transposed: see `ws`.
        sum_products: pass the sum of the products to the epilogue, not one after the other.
        epilogue: takes float32 [rows, J], the same rows of the matrices, a column of each row vector and a row of each
            group vector, which broadcasts; None: the output is the sum itself.
        matrices: [N, J].
        row_vectors: [1, N].
        group_vectors: [E, J] float32; the epilogue gets that of the rows' group.
        out_kinds: per output "matrix", [N, J] in x's dtype, or "row_sum", [1, N] in float32: the epilogue's
            [rows, J] summed over columns.
        name: name of the kernel.
    """
    (N, K), E, J = xs[0].shape, ws[0].shape[0], ws[0].shape[1 if transposed else 2]
    dtype, num_matrix_outs = xs[0].dtype, sum(kind == "matrix" for kind in out_kinds)
    num_matrices = len(matrices) + num_matrix_outs
    sizes = block_sizes.gmm_block_sizes(
        device,
        N,
        E,
        K,
        J,
        num_x=len(xs),
        num_w=len(ws),
        num_matrices=num_matrices,
        transposed=transposed,
        itemsize=dtype.itemsize,
        has_epilogue=epilogue is not None,
    )
    block_m, block_k, block_n = sizes.block_m, sizes.block_k, sizes.block_n
    metadata = make_group_metadata(group_sizes, N, block_m)
    column_blocks, k_steps = -(-J // block_n), -(-K // block_k)
    # The scalar unit spends time on every grid axis, even on one of size 1.
    grid, index_map = (column_blocks, metadata.count, k_steps), lambda index: index
    if column_blocks == k_steps == 1:
        grid, index_map = (metadata.count,), lambda index: lambda v, tables: index(0, v, 0, tables)
    tables = metadata.forward_tables(block_m, sizes.block_m_sub, E)

    x_spec = pl.BlockSpec((block_m, block_k), index_map(lambda j, v, k, tables: (tables.tile[v], k)))
    if transposed:
        w_spec = pl.BlockSpec((1, block_n, block_k), index_map(lambda j, v, k, tables: (tables.group[v], j, k)))
    else:
        w_spec = pl.BlockSpec((1, block_k, block_n), index_map(lambda j, v, k, tables: (tables.group[v], k, j)))
    matrix_spec = pl.BlockSpec((block_m, block_n), index_map(lambda j, v, k, tables: (tables.tile[v], j)))
    row_vector_spec = pl.BlockSpec((1, block_m), index_map(lambda j, v, k, tables: (0, tables.tile[v])))
    group_vector_spec = pl.BlockSpec((1, 1, block_n), index_map(lambda j, v, k, tables: (tables.group[v], 0, j)))
    row_sum_spec = pl.BlockSpec((1, 1, block_m), index_map(lambda j, v, k, tables: (j, 0, tables.tile[v])))
    in_specs = GmmInputs(
        [x_spec] * len(xs),
        [w_spec] * len(ws),
        [matrix_spec] * len(matrices),
        [row_vector_spec] * len(row_vectors),
        [group_vector_spec] * len(group_vectors),
    )
    out_shapes = {
        "matrix": varying_shape((N, J), dtype, xs[0]),
        "row_sum": varying_shape((column_blocks, 1, N), jnp.float32, xs[0]),
    }
    out_specs = {"matrix": matrix_spec, "row_sum": row_sum_spec}
    num_acc = 0 if k_steps == 1 else 1 if sum_products else len(ws)
    scratch = GmmScratch(
        acc=[pltpu.VMEM((block_m, block_n), jnp.float32)] * num_acc,
        saved_rows=[pltpu.VMEM((block_m, block_n), dtype)] * num_matrix_outs,
        partial_sums=_partial_sums_scratch(sizes, one_result=k_steps == 1 and (sum_products or len(ws) == 1)),
        lanes=[pltpu.VMEM((block_m, 128), jnp.float32)] * len(row_vectors),
    )
    config = GmmConfig(sizes, K, J, transposed, sum_products, epilogue, tuple(out_kinds), len(grid))
    moved = dtype.itemsize * (sum(x.size for x in xs) + sum(w.size for w in ws) + num_matrices * N * J)
    (outs,) = pl.pallas_call(
        functools.partial(gmm_kernel, config=config),
        out_shape=([out_shapes[kind] for kind in out_kinds],),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=(in_specs,),
            out_specs=([out_specs[kind] for kind in out_kinds],),
            scratch_shapes=(scratch,),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary") if len(grid) == 3 else ("arbitrary",),
            vmem_limit_bytes=sizes.vmem_bytes,
            disable_bounds_checks=True,  # they cost 45 bundles per step; the tables only name blocks that exist
        ),
        cost_estimate=Cost(2 * N * K * J * len(ws), moved).to_pallas(),
        name=name,
    )(tables, GmmInputs(list(xs), list(ws), list(matrices), list(row_vectors), [b[:, None] for b in group_vectors]))
    return [x if kind == "matrix" else jnp.sum(x, axis=0) for x, kind in zip(outs, out_kinds, strict=True)]


def _partial_sums_scratch(sizes: block_sizes.GmmBlockSizes, *, one_result: bool) -> list[Any]:
    """Return the scratch memory of sums over a part of the contraction."""
    if sizes.leading_k:
        return [pltpu.VMEM((sizes.block_m, min(sizes.mxu_n, sizes.block_n_sub)), jnp.float32)]
    if not (sizes.block_k_sub and one_result):
        return []
    ranges = itertools.product(split_range(sizes.block_n_sub, sizes.mxu_n), split_range(sizes.block_m, sizes.mxu_m))
    return [pltpu.VMEM((height, width), jnp.float32) for (_, width), (_, height) in ranges]
