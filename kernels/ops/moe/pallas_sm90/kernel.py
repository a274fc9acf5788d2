"""The hidden rows of the mixture of experts on Hopper: gate and up projections in one pass over x, and their backward.

Math      up_proj        gate = x w_gate_e,  up = x w_up_e,  h = silu(gate) up                  for the rows of expert e
          down_proj_bwd  dh = dy w_down_e^T;  dgate = p dh up silu'(gate);  dup = p dh silu(gate);  p h;
                         dp = sum over the features of dh h
Tiling    as `grouped_matmul/pallas_sm90/gmm.py`. up_proj: a stage has the rows of x and 128 columns of both weights.

              x         w_gate      w_up            up_proj: a warpgroup's sums are 64 x 128 of gate and 64 x 128
              128 x 64  64 x 128    64 x 128        of up
              dy        w_down                      down_proj_bwd: 64 x 256 of dh; after the last step of the
              128 x 64  256 x 64                    contraction come four more stages, 64 columns of gate and of up
              g ▒▒▒▒▒▒  u ▒▒▒▒▒▒ ░░░░░░             each, in the slots of dy and w_down: the epilogue needs no SMEM

          dp is written as one number per row of a visit and column tile, so that no two thread blocks write the same
          address; XLA sums the tiles in one order. down_proj_bwd makes no visits of unassigned rows.
State     128 of the 240 registers per thread for sums in both kernels. The epilogue takes 64 columns at a time: in
          down_proj_bwd that is 32 registers for gate and up and 48 for its results in bfloat16, beside 96 for the sums
          of the other columns; p and dp: 2 each. A branch separates the halves of the 64 columns: the assembler
          schedules freely between two branches, and over 64 columns it spilled up to 8 numbers, once per tile.
Traffic   up_proj reads as much per FLOP as a product of 256 columns does, and x once instead of twice. Only h is
          written, 2 bytes per feature of a row in bfloat16; gate and up written, read again and turned into h would be
          10. For gradients it writes gate and up too, 4 bytes, and down_proj_bwd reads them, 4 bytes: 8 bytes against
          4 M FLOPs to recompute them, and against tiles with three sums instead of one, 64 x 64 of each, which read
          1.6 times as much from L2 per FLOP. At 800 TFLOP/s and 3 TB/s keeping them is faster from M = 530 on, before
          that is counted. down_proj_bwd never writes dh: it saves 2 bytes written and 2 read per feature, and dp a pass
          over dh and h.
Limits    as `grouped_matmul/pallas_sm90/gmm.py`, M and F for K and J.
Source    Shazeer, GLU Variants (arXiv:2002.05202), for the formula; else as `grouped_matmul/pallas_sm90/gmm.py`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dantinox.kernels.ops.grouped_matmul.group_metadata import GroupMetadata
from dantinox.kernels.ops.grouped_matmul.pallas_sm90 import block_sizes, gmm, warp_specialized
from dantinox.kernels.ops.grouped_matmul.pallas_sm90.block_sizes import HEIGHT, INNER, ROWS
from dantinox.kernels.ops.grouped_matmul.pallas_sm90.gmm import rows_to, whole
from dantinox.kernels.ops.grouped_matmul.pallas_sm90.warp_specialized import CHUNK, SIDE, WARPGROUPS, Ring, Static, Task

Array = jax.Array
NUM_UP_WEIGHTS = 2
EPILOGUE_COLUMNS = CHUNK // 2
SM90_BLOCK_N = (256, 128)  # columns per tile; in up_proj, of both weights together


def up_proj(
    x: Array,
    w_gate: Array,
    w_up: Array,
    group_sizes: Array,
    static: Static,
    *,
    save_residuals: bool,
    name: str = "experts_up",
) -> tuple[Array, ...]:
    """(h,), or with `save_residuals` (h, gate, up): [N, F] each, in x's dtype, zeros in unassigned rows.

    Args:
        x: [N, M], rows sorted by expert; w_gate, w_up: [E, M, F]; M and F multiples of 64.
    """
    (N, M), (E, _, F) = x.shape, w_gate.shape
    tile = block_sizes.hopper(N, E, M, F, static.cores, matrices=NUM_UP_WEIGHTS, widths=static.among(*SM90_BLOCK_N))
    columns, column_tiles, k_steps = tile.columns, pl.cdiv(F, tile.columns), pl.cdiv(M, INNER)

    def body(
        x: Any,
        w_gate: Any,
        w_up: Any,
        table: Any,
        count: Any,
        *outs: Any,
        warpgroup: Array,
        ring: Ring,
        staged: Any,
        x_ring: Any,
        w_ring: Any,
    ) -> warp_specialized.Roles:
        def load(task: Task) -> None:
            rows, features = pl.ds(pl.multiple_of(task.visit.row, SIDE), HEIGHT), pl.ds(task.column, columns)

            @pl.loop(0, task.fillings)
            def load_stage(k: Array) -> None:
                inner = pl.ds(k * INNER, INNER)

                def copy(stage: Array) -> None:
                    barrier = ring.here.at[stage]
                    plgpu.copy_gmem_to_smem(x.at[rows, inner], x_ring.at[stage], barrier)
                    for i, w in enumerate((w_gate, w_up)):
                        plgpu.copy_gmem_to_smem(w.at[task.visit.group, inner, features], w_ring.at[stage, i], barrier)

                ring.fill(task.used + k, copy)

        def compute(task: Task) -> None:
            first, row_offset, num_rows = task.rows_for_warpgroup(warpgroup)

            @pl.when(num_rows > 0)
            def multiply() -> None:
                def operands(_: Any, stage: Array) -> list[tuple[Any, Any]]:
                    rows = x_ring.at[stage, pl.ds(warpgroup * ROWS, ROWS)]
                    return [(rows, w_ring.at[stage, i]) for i in range(NUM_UP_WEIGHTS)]

                sums = warp_specialized.wgmma_reduce(ring, task.used, task.fillings, operands, columns, columns)

                def store_chunk(n: int) -> None:
                    gate, up = (acc[:, n : n + CHUNK] for acc in sums)
                    # Store only the requested outputs.
                    for i, (value, out) in enumerate(
                        zip((gate * jax.nn.sigmoid(gate) * up, gate, up), outs, strict=False)
                    ):
                        store_rows = rows_to(out, first, task.column + n, row_offset, num_rows)
                        warp_specialized.leave(staged, n // CHUNK * len(outs) + i, value, store_rows)

                warp_specialized.chunks(columns, columns if F % columns == 0 else F - task.column, store_chunk)

            pl.when(num_rows == 0)(lambda: ring.skip(task.used, task.fillings))

        return warp_specialized.tasks(table, count[0], E, column_tiles, columns, lambda _: k_steps), load, compute

    out = jax.ShapeDtypeStruct((N, F), x.dtype)
    values = warp_specialized.launch(
        body,
        [whole(x), w_gate, w_up, *warp_specialized.table(warp_specialized.plan(group_sizes, N))],
        [out] * (3 if save_residuals else 1),
        static,
        stages=tile.stages,
        copies=1 + NUM_UP_WEIGHTS,
        rings={"x_ring": (HEIGHT, INNER), "w_ring": (NUM_UP_WEIGHTS, INNER, columns)},
        dtype=x.dtype,
        name=name,
    )
    return tuple(values)


def down_proj_bwd(
    dy: Array,
    w_down: Array,
    gate: Array,
    up: Array,
    router_weights: Array,
    group_sizes: Array,
    static: Static,
    *,
    name: str = "experts_dh",
) -> tuple[Array, Array, Array, Array]:
    """(dgate, dup, p h [N, F] in dy's dtype, dp [N] float32); unassigned rows of the first three are not written.

    Args:
        dy: [N, M], rows sorted by expert; w_down: [E, F, M]; M and F multiples of 64.
        gate, up: [N, F], the residuals of `up_proj`.
        router_weights: [N] float32, p.
    """
    (N, M), (E, F, _) = dy.shape, w_down.shape
    tile = block_sizes.hopper(N, E, M, F, static.cores, widths=static.among(*SM90_BLOCK_N))
    columns, column_tiles, k_steps = tile.columns, pl.cdiv(F, tile.columns), pl.cdiv(M, INNER)
    num_chunks = columns // CHUNK
    metadata = warp_specialized.plan(group_sizes, N)

    def body(
        dy: Any,
        w_down: Any,
        gate: Any,
        up: Any,
        router_weights: Any,
        table: Any,
        count: Any,
        dgate: Any,
        dup: Any,
        weighted_h: Any,
        row_shares: Any,
        *,
        warpgroup: Array,
        ring: Ring,
        staged: Any,
        x_ring: Any,
        w_ring: Any,
        row_sums: Any,
    ) -> warp_specialized.Roles:
        def load(task: Task) -> None:
            gmm.fill(ring, task, task.used, k_steps, dy, w_down, x_ring, w_ring, columns, True)
            rows = pl.ds(pl.multiple_of(task.visit.row, SIDE), HEIGHT)

            @pl.loop(0, jnp.maximum(task.fillings - k_steps, 0))
            def load_residuals(n: Array) -> None:
                features = pl.ds(task.column + n * CHUNK, CHUNK)

                def copy(stage: Array) -> None:
                    barrier = ring.here.at[stage]
                    plgpu.copy_gmem_to_smem(gate.at[rows, features], x_ring.at[stage], barrier)
                    plgpu.copy_gmem_to_smem(up.at[rows, features], w_ring.at[stage, pl.ds(0, HEIGHT)], barrier)

                ring.fill(task.used + k_steps + n, copy)

        def compute(task: Task) -> None:
            first, row_offset, num_rows = task.rows_for_warpgroup(warpgroup)
            has_work = (num_rows > 0) & (task.fillings > 0)

            @pl.when(has_work)
            def multiply() -> None:
                weight = plgpu.load(router_weights.at[pl.ds(first, ROWS)], layout=warp_specialized.ROW, optimized=False)

                def operands(_: Any, stage: Array) -> list[tuple[Any, Any]]:
                    return [gmm.pair(x_ring, w_ring, stage, warpgroup, True)]

                (dh,) = warp_specialized.wgmma_reduce(ring, task.used, k_steps, operands, columns)
                total = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), warp_specialized.ROW)
                for n in range(num_chunks):

                    def store_chunk(total: Array, n: int = n) -> Array:
                        dh_chunk = dh[:, n * CHUNK : (n + 1) * CHUNK]
                        values, row_share = run_epilogue(
                            task, dh_chunk, weight, *load_gate_and_up(task.used + k_steps + n)
                        )
                        for i, (value, out) in enumerate(zip(values, (dgate, dup, weighted_h), strict=True)):
                            store_rows = rows_to(out, first, task.column + n * CHUNK, row_offset, num_rows)
                            warp_specialized.leave(staged, 3 * n + i, value, store_rows)
                        return total + row_share

                    total = lax.cond(task.column + n * CHUNK < F, store_chunk, lambda total: total, total)
                # The copy of the last tile's sums was complete before the first chunk of this one.
                row_sums[warpgroup] = total
                plgpu.commit_smem()
                target = row_shares.at[task.number, lax.div(task.column, columns), pl.ds(warpgroup * ROWS, ROWS)]
                plgpu.copy_smem_to_gmem(row_sums.at[warpgroup], target)

            pl.when(~has_work)(lambda: ring.skip(task.used, task.fillings))

        def load_gate_and_up(filling: Array) -> tuple[Array, Array]:
            """64 columns of gate and up in float32."""
            ring.wait(filling)
            index = ring.stage(filling), pl.ds(warpgroup * ROWS, ROWS)
            gate, up = (plgpu.load(smem.at[index], layout=plgpu.Layout.WGMMA) for smem in (x_ring, w_ring))
            plgpu.commit_smem()  # TMA, another memory proxy, writes there next
            ring.release(filling)
            return gate.astype(jnp.float32), up.astype(jnp.float32)

        def run_epilogue(task: Task, dh: Array, weight: Array, gate: Array, up: Array) -> tuple[list[Array], Array]:
            """(dgate, dup, p h) and the summands of dp of 64 columns."""
            halves, row_share_parts = [], []
            for n in range(0, CHUNK, EPILOGUE_COLUMNS):
                half = (value[:, n : n + EPILOGUE_COLUMNS] for value in (dh, gate, up))
                # Always true, but opaque to the compiler: see State.
                values, row_share = lax.cond(task.visit.row >= 0, swiglu_bwd, zeros, *half, weight)
                halves.append(values)
                row_share_parts.append(row_share)
            values = [jnp.concatenate(pair, axis=1) for pair in zip(*halves, strict=True)]
            return values, jnp.sum(functools.reduce(jnp.add, row_share_parts), axis=1)

        def swiglu_bwd(dh: Array, gate: Array, up: Array, weight: Array) -> tuple[tuple[Array, ...], Array]:
            router_weight = lax.broadcast_in_dim(weight, dh.shape, [0])
            sigmoid_gate = sigmoid(gate)
            silu = gate * sigmoid_gate
            h, weighted_dh = silu * up, router_weight * dh
            values = weighted_dh * up * sigmoid_gate * (1 + gate - silu), weighted_dh * silu, router_weight * h
            # In the output dtype they take half the registers.
            return tuple(value.astype(dy.dtype) for value in values), dh * h

        def zeros(dh: Array, *_: Array) -> tuple[tuple[Array, ...], Array]:
            return (jnp.zeros_like(dh, dy.dtype),) * 3, dh

        def fillings(column: Array) -> Array:
            return k_steps + lax.div(jnp.minimum(columns, F - column), CHUNK)

        return warp_specialized.tasks(table, count[0], E, column_tiles, columns, fillings), load, compute

    out = jax.ShapeDtypeStruct((N, F), dy.dtype)
    row_shares = jax.ShapeDtypeStruct((metadata.group.shape[0], column_tiles, HEIGHT), jnp.float32)
    weights = jnp.pad(router_weights, (0, -N % SIDE + HEIGHT))
    dgate, dup, weighted_h, row_shares = warp_specialized.launch(
        body,
        [whole(dy), w_down, whole(gate), whole(up), weights, *warp_specialized.table(metadata)],
        [out, out, out, row_shares],
        static,
        stages=tile.stages,
        copies=2,
        rings={"x_ring": (HEIGHT, INNER), "w_ring": (columns, INNER)},
        dtype=dy.dtype,
        scratch={"row_sums": plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32)},
        name=name,
    )
    return dgate, dup, weighted_h, gather_row_values(jnp.sum(row_shares, axis=1), metadata, N, E)


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)): the quotient takes two instructions, where a division takes five.

    up_proj does not use it: the assembler then adds two moves to the loop of products.
    """
    return jnp.square(lax.rsqrt(1 + jnp.exp(-x)))


def gather_row_values(values: Array, metadata: GroupMetadata, N: int, E: int) -> Array:
    """[N]: the value of each row among those of the visits, [visits, HEIGHT]; 0 for unassigned rows."""
    is_visit = jnp.arange(metadata.group.shape[0]) < metadata.count
    ends = jnp.where(is_visit, jnp.minimum(metadata.row + HEIGHT, metadata.row_end), N)
    n = jnp.arange(N)
    visit = jnp.searchsorted(ends, n, side="right")
    return jnp.where(metadata.group[visit] < E, values[visit, n - metadata.row[visit]], 0)
