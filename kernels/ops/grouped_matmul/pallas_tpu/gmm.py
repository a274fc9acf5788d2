"""Grouped matmul on Mosaic TPU: every row times its own group's matrix.

Math      sums = x w_e, or x w_e^T with the matrices read as they lie; several of them, or their sum; then an epilogue
          on the sums while they are on the chip: y = epilogue(sums, what else there is of these rows)
Tiling    grid (column tiles, visits, steps of the contraction); a visit is a tile of rows for one group, see
          `group_metadata.py`. The columns are outermost: through one pass over the rows a group's matrix stays where it
          is.

              columns ->    tile 0     tile 1            w_0 ╲
              rows  tile 0  ██ 0       ██ 0              w_1  ╲ one of them at a time
                    tile 1  ██ 0 ▒ 1   ██ 0 ▒ 1          w_2   ╲
                    tile 2  ▒▒ 1       ▒▒ 1         ▒ next group: the tile is visited again, the old rows stay
                    tile 3  ░░         ░░           ░ nobody's: zeros are written, nothing is multiplied

          A visit multiplies the chunks of rows that it has a row of, all of a tile or some of them in one stream of
          products: a stream takes some 260 bundles to fill the matrix unit and to empty it. A visit writes
          whole chunks: rows of later groups are written again by their own visit, rows of earlier ones are
          saved before and put back after. So the stream of products has no mask in it, and registers suffice.
State     float32 sums of one tile, where the contraction takes several steps; else none at all. Where the products of
          one step are taken part by part (`Tiles.part`, `Tiles.lead`), their sums wait in memory of their own.
Traffic   reads x once for each column tile, each busy group's matrix once; with several steps of the contraction, a
          matrix once a visit. Writes y once. 2 N K J FLOPs; intensity as of a dense matmul where groups have more than
          some 500 rows, below that the matrices bind.
Limits    float32, bfloat16, float16; any N, K, J, E. ValueError comes from `dantinox.kernels.grouped_matmul`.
Source    Gale et al., MegaBlocks (arXiv:2211.15841); jax's megablox for the grid of (tile, group) pairs.
"""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dantinox.kernels.cost import Cost
from dantinox.kernels.dispatch import Device
from dantinox.kernels.ops.grouped_matmul.group_metadata import make_group_metadata
from dantinox.kernels.ops.grouped_matmul.pallas_tpu import block_sizes
from dantinox.kernels.ops.grouped_matmul.pallas_tpu.gmm_kernel import Epilogue, Static, Step
from dantinox.kernels.ops.grouped_matmul.pallas_tpu.vmem import pieces

Array = jax.Array


def product(
    xs: Sequence[Array],
    ws: Sequence[Array],
    group_sizes: Array,
    here: Device,
    *,
    transposed: bool = False,
    add: bool = False,
    epilogue: Epilogue | None = None,
    wide: Sequence[Array] = (),
    thin: Sequence[Array] = (),
    outs: Sequence[str] = ("wide",),
    name: str,
) -> list[Array]:
    """The outputs of `epilogue(*sums, *wide, *thin)`, zeros in rows that are nobody's.

    Args:
        xs: [N, K], as many as matrices, or one for all.
        ws: [E, K, J], or [E, J, K] where `transposed`.
        add: the products are summed, and the epilogue gets that; else it gets one after the other.
        epilogue: gets float32 [rows, J] and the same rows of the other arrays, of thin ones a column that broadcasts;
            None: the sum itself.
        wide: [N, J]. thin: [1, N].
        outs: of each output "wide", [N, J] in x's dtype, or "thin", [1, N] in float32: what the epilogue gives,
            [rows, J], summed over columns.
    """
    (N, K), E, J = xs[0].shape, ws[0].shape[0], ws[0].shape[1 if transposed else 2]
    dtype = xs[0].dtype
    n_wide = len(wide) + sum(kind == "wide" for kind in outs)
    sizes = {"xs": len(xs), "ws": len(ws), "wide": n_wide, "transposed": transposed, "itemsize": dtype.itemsize}
    chosen = block_sizes.product(here, N, E, K, J, plain=epilogue is None, **sizes)
    plan = make_group_metadata(group_sizes, N, chosen.rows)
    across, steps = -(-J // chosen.columns), -(-K // chosen.inner)
    # The scalar unit counts the axes that there are, also those of one step.
    grid, at = (across, plan.count, steps), lambda index: index
    if across == steps == 1:
        grid, at = (plan.count,), lambda index: lambda v, *tables: index(0, v, 0, *tables)
    tables, operands = plan.forward_tables(chosen.rows, chosen.chunk, E), [*xs, *ws, *wide, *thin]
    counts = tuple(map(len, (xs, ws, wide, thin, outs)))

    block = pl.BlockSpec
    x_spec = block((chosen.rows, chosen.inner), at(lambda j, v, k, g, r, *_: (r[v], k)))
    if transposed:
        w_spec = block((1, chosen.columns, chosen.inner), at(lambda j, v, k, g, *_: (g[v], j, k)))
    else:
        w_spec = block((1, chosen.inner, chosen.columns), at(lambda j, v, k, g, *_: (g[v], k, j)))
    wide_out = block((chosen.rows, chosen.columns), at(lambda j, v, k, g, r, *_: (r[v], j)))
    thin_in = block((1, chosen.rows), at(lambda j, v, k, g, r, *_: (0, r[v])))
    thin_out = block((1, 1, chosen.rows), at(lambda j, v, k, g, r, *_: (j, 0, r[v])))
    in_specs = [x_spec] * len(xs) + [w_spec] * len(ws) + [wide_out] * len(wide) + [thin_in] * len(thin)

    n_sums = 0 if steps == 1 else 1 if add else len(ws)
    waits = []
    if chosen.lead:
        waits = [pltpu.VMEM((chosen.rows, min(chosen.width, chosen.strip)), jnp.float32)]
    elif chosen.part and steps == 1 and (add or len(ws) == 1):
        sides = itertools.product(pieces(chosen.strip, chosen.width), pieces(chosen.rows, chosen.height))
        waits = [pltpu.VMEM((height, width), jnp.float32) for (_, width), (_, height) in sides]
    static = Static(chosen, K, J, transposed, add, epilogue, tuple(outs), counts, len(waits), len(grid))
    wide_shape, thin_shape = jax.ShapeDtypeStruct((N, J), dtype), jax.ShapeDtypeStruct((across, 1, N), jnp.float32)
    moved = dtype.itemsize * (sum(x.size for x in xs) + sum(w.size for w in ws) + n_wide * N * J)
    found = pl.pallas_call(
        lambda *refs: Step(static, *refs).run(),
        out_shape=[wide_shape if kind == "wide" else thin_shape for kind in outs],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(tables),
            grid=grid,
            in_specs=in_specs,
            out_specs=[wide_out if kind == "wide" else thin_out for kind in outs],
            scratch_shapes=[pltpu.VMEM((chosen.rows, chosen.columns), jnp.float32)] * n_sums
            + [pltpu.VMEM((chosen.rows, chosen.columns), dtype)] * sum(kind == "wide" for kind in outs)
            + waits
            + [pltpu.VMEM((chosen.rows, 128), jnp.float32)] * len(thin),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary") if len(grid) == 3 else ("arbitrary",),
            vmem_limit_bytes=chosen.vmem,
            disable_bounds_checks=True,  # 45 bundles a step; the tables have no block that is not there
        ),
        cost_estimate=Cost(2 * N * K * J * len(ws), moved).to_pallas(),
        name=name,
    )(*tables, *operands)
    return [x if kind == "wide" else jnp.sum(x, axis=0) for x, kind in zip(found, outs, strict=True)]
