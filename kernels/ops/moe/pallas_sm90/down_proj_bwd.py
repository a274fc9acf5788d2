"""The backward pass of the experts' down projection and of SwiGLU on Hopper, in one kernel.

Math      dh = dy w_down_e^T;  dgate = p dh up silu'(gate);  dup = p dh silu(gate);  p h;
          dp = sum over the features of dh h
Tiling    as `grouped_matmul/pallas_sm90/gmm.py`. After the last step of the contraction come four more, 64 columns of
          gate and of up each, in the stages of dy and w_down: the epilogue needs no further SMEM.

              dy        w_down
              128 x 64  256 x 64       64 x 256 of dh per warpgroup
              g ▒▒▒▒▒▒  u ▒▒▒▒▒▒ ░░░░░░

          dp is written as one number per row of a task and column tile, so that no two thread blocks write the same
          address; XLA sums the column tiles in one order. Unassigned rows are not written.
State     128 of the 240 registers per thread for the accumulators of dh. The epilogue takes 64 columns at a time: 32
          registers for gate and up and 48 for its results in bfloat16, beside 96 for the accumulators of the other
          columns; p and dp: 2 each. A branch separates the halves of the 64 columns: the assembler schedules freely
          between two branches, and over 64 columns it spilled up to 8 numbers, once per tile.
Traffic   reads gate and up, 4 bytes per feature of a row; see `up_proj.py` for the cost of recomputing them. Never
          writes dh: it saves 2 bytes written and 2 read per feature, and dp a pass over dh and h.
Limits    as `grouped_matmul/pallas_sm90/gmm.py`, M and F for K and J.
Source    Shazeer, GLU Variants (arXiv:2002.05202), for the formula; else as `grouped_matmul/pallas_sm90/gmm.py`.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dantinox.kernels.ops.grouped_matmul.group_metadata import GroupMetadata
from dantinox.kernels.ops.grouped_matmul.pallas_sm90 import block_sizes, gmm, tile_scheduler, warp_specialized
from dantinox.kernels.ops.grouped_matmul.pallas_sm90.block_sizes import BLOCK_K, BLOCK_M, TMA_ROWS, WARPGROUP_ROWS
from dantinox.kernels.ops.grouped_matmul.pallas_sm90.tile_scheduler import GmmTile, TaskTable, WarpgroupRows
from dantinox.kernels.ops.grouped_matmul.pallas_sm90.warp_specialized import (
    CHUNK_COLUMNS,
    COMPUTE_WARPGROUPS,
    ROW_LAYOUT,
    Sm90GmmConfig,
    SmemPipeline,
)

Array = jax.Array
TILE_WIDTHS = (256, 128)
EPILOGUE_COLUMNS = CHUNK_COLUMNS // 2


class DownProjBwdInputs(NamedTuple):
    """Inputs of the kernel, in global memory."""

    dy: Any
    w_down: Any
    gate: Any
    up: Any
    router_weights: Any
    task_table: TaskTable


class DownProjBwdOutputs(NamedTuple):
    """Outputs of the kernel, in global memory; dp_parts [tasks, column tiles, BLOCK_M] sums up to dp."""

    dgate: Any
    dup: Any
    weighted_h: Any
    dp_parts: Any


class DownProjGrads(NamedTuple):
    """dgate, dup and p h [N, F], whose unassigned rows are not written; the router's gradients [N] float32."""

    dgate: Array
    dup: Array
    weighted_h: Array
    drouter_weights: Array


def down_proj_bwd(
    dy: Array,
    w_down: Array,
    gate: Array,
    up: Array,
    router_weights: Array,
    group_sizes: Array,
    config: Sm90GmmConfig,
    *,
    name: str = "experts_dh",
) -> DownProjGrads:
    """Return the gradients of gate, up and the router's weights, and p h.

    Args:
        dy: [N, M], rows sorted by expert.
        w_down: [E, F, M]; M and F multiples of 16.
        gate: [N, F], from `up_proj`.
        up: [N, F], from `up_proj`.
        router_weights: [N] float32, p.
        group_sizes: [E] int32.
        config: see `Sm90GmmConfig`.
        name: name of the kernel.
    """
    (N, M), (E, F, _), dtype = dy.shape, w_down.shape, dy.dtype
    widths = config.allowed_widths(*TILE_WIDTHS)
    sizes = block_sizes.gmm_block_sizes(N, E, M, F, config.num_sms, widths=widths)
    metadata = tile_scheduler.tma_group_metadata(group_sizes, N)
    padded_weights = jnp.pad(router_weights, (0, -N % TMA_ROWS + BLOCK_M))
    dy, gate, up = (gmm.pad_rows(x) for x in (dy, gate, up))
    inputs = DownProjBwdInputs(dy, w_down, gate, up, padded_weights, tile_scheduler.pack_task_table(metadata))
    row_shape = jax.ShapeDtypeStruct((N, F), dtype)
    parts_shape = (metadata.group.shape[0], pl.cdiv(F, sizes.block_n), BLOCK_M)
    outputs = DownProjBwdOutputs(row_shape, row_shape, row_shape, jax.ShapeDtypeStruct(parts_shape, jnp.float32))
    row_sums_smem = plgpu.SMEM((COMPUTE_WARPGROUPS, WARPGROUP_ROWS), jnp.float32)

    def make_roles(
        gmem: DownProjBwdInputs, out: DownProjBwdOutputs, smem: gmm.GmmScratch, pipeline: SmemPipeline, warpgroup: Array
    ) -> DownProjBwdKernel:
        num_tasks = gmem.task_table.count[0]
        return DownProjBwdKernel(gmem, out, smem, pipeline, warpgroup, num_tasks, E, M, F, sizes.block_n)

    results = warp_specialized.launch_warp_specialized(
        make_roles,
        inputs,
        outputs,
        gmm.gmm_scratch(sizes, dtype, (M, F), transposed=True)._replace(row_sums_smem=row_sums_smem),
        config,
        stages=sizes.stages,
        name=name,
    )
    drouter_weights = gather_row_values(jnp.sum(results.dp_parts, axis=1), metadata, N, E)
    return DownProjGrads(results.dgate, results.dup, results.weighted_h, drouter_weights)


@dataclass(frozen=True, eq=False)
class DownProjBwdKernel:
    """The backward pass on one thread block; see `WarpgroupRoles`."""

    gmem: DownProjBwdInputs
    out: DownProjBwdOutputs
    smem: gmm.GmmScratch
    pipeline: SmemPipeline
    warpgroup: Array
    num_tasks: Array
    E: int
    M: int
    F: int
    block_n: int

    @property
    def k_steps(self) -> int:
        """Pipeline steps of the contraction; those of gate and up follow."""
        return pl.cdiv(self.M, BLOCK_K)

    def for_each_tile(self, run_tile: Callable[[GmmTile], None]) -> Array:
        """Run run_tile(tile) for the tiles of this thread block; return the number of pipeline steps."""

        def num_steps(column: Array) -> Array:
            return self.k_steps + pl.cdiv(jnp.minimum(self.block_n, self.F - column), CHUNK_COLUMNS)

        fields, column_tiles = self.gmem.task_table.fields, pl.cdiv(self.F, self.block_n)
        return tile_scheduler.for_each_gmm_tile(
            fields, self.num_tasks, self.E, column_tiles, self.block_n, num_steps, run_tile
        )

    def load(self, tile: GmmTile) -> None:
        """Load the operands of dh, then the gate and up of the tile, 64 columns per stage."""
        gmem, smem = self.gmem, self.smem
        gmm.load_product_operands(
            self.pipeline,
            tile,
            tile.first_step,
            self.k_steps,
            gmem.dy,
            gmem.w_down,
            smem,
            block_n=self.block_n,
            transposed=True,
        )
        rows = pl.ds(pl.multiple_of(tile.task.row, TMA_ROWS), BLOCK_M)

        @pl.loop(0, jnp.maximum(tile.num_steps - self.k_steps, 0))
        def load_gate_and_up_chunk(n: Array) -> None:
            features = pl.ds(tile.column + n * CHUNK_COLUMNS, CHUNK_COLUMNS)

            def copy(slot: Array) -> None:
                full = self.pipeline.full.at[slot]
                plgpu.copy_gmem_to_smem(gmem.gate.at[rows, features], smem.x_smem.at[slot], full)
                plgpu.copy_gmem_to_smem(gmem.up.at[rows, features], smem.w_smem.at[slot, pl.ds(0, BLOCK_M)], full)

            self.pipeline.produce(tile.first_step + self.k_steps + n, copy)

    def compute(self, tile: GmmTile) -> None:
        """Compute and store a tile, or release its stages if it has no rows of this consumer."""
        rows = tile.warpgroup_rows(self.warpgroup)
        has_work = (rows.count > 0) & (tile.num_steps > 0)
        pl.when(has_work)(functools.partial(self.multiply_and_store, tile, rows))

        @pl.when(~has_work)
        def skip_tile() -> None:
            self.pipeline.skip(tile.first_step, tile.num_steps)

    def multiply_and_store(self, tile: GmmTile, rows: WarpgroupRows) -> None:
        """Compute the rows of this consumer and store them."""
        router_weight = gmm.load_row_values(self.gmem.router_weights, rows)

        def operands(_: Any, slot: Array) -> list[tuple[Any, Any]]:
            return [gmm.wgmma_operands(self.smem, slot, self.warpgroup, transposed=True)]

        (dh,) = warp_specialized.wgmma_reduce(self.pipeline, tile.first_step, self.k_steps, operands, self.block_n)
        dp = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS,), jnp.float32), ROW_LAYOUT)
        for n in range(self.block_n // CHUNK_COLUMNS):
            run_chunk = functools.partial(self.run_epilogue, tile, rows, n, dh, router_weight)
            dp = lax.cond(tile.column + n * CHUNK_COLUMNS < self.F, run_chunk, lambda dp: dp, dp)
        self.store_dp_part(tile, dp)

    def run_epilogue(
        self, tile: GmmTile, rows: WarpgroupRows, n: int, dh: Array, router_weight: Array, dp: Array
    ) -> Array:
        """Store the n-th chunk of dgate, dup and p h; return dp with the features of that chunk added."""
        dh_chunk = dh[:, n * CHUNK_COLUMNS : (n + 1) * CHUNK_COLUMNS]
        gate, up = self.load_gate_and_up(tile.first_step + self.k_steps + n)
        values, dp_of_chunk = self.swiglu_bwd_of_chunk(tile, dh_chunk, gate, up, router_weight)
        buffers = self.smem.store_smem.at[self.warpgroup]
        for i, (value, out) in enumerate(zip(values, self.out[:3], strict=True)):
            column = tile.column + n * CHUNK_COLUMNS
            start_copy = functools.partial(warp_specialized.copy_rows_by_powers_of_two, rows, out, column)
            warp_specialized.store_chunk_async(buffers, 3 * n + i, value, start_copy)
        return dp + dp_of_chunk

    def load_gate_and_up(self, step: Array) -> tuple[Array, Array]:
        """Load 64 columns of gate and up in float32 and release their stage."""
        self.pipeline.consumer_wait(step)
        index = self.pipeline.slot(step), pl.ds(self.warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
        refs = self.smem.x_smem, self.smem.w_smem
        gate, up = (plgpu.load(ref.at[index], layout=plgpu.Layout.WGMMA) for ref in refs)
        plgpu.commit_smem()  # TMA, another memory proxy, writes there next
        self.pipeline.consumer_release(step)
        return gate.astype(jnp.float32), up.astype(jnp.float32)

    def swiglu_bwd_of_chunk(
        self, tile: GmmTile, dh: Array, gate: Array, up: Array, router_weight: Array
    ) -> tuple[list[Array], Array]:
        """Return (dgate, dup, p h) and dp of 64 columns, half by half."""
        halves, dp_terms = [], []
        for n in range(0, CHUNK_COLUMNS, EPILOGUE_COLUMNS):
            half = (value[:, n : n + EPILOGUE_COLUMNS] for value in (dh, gate, up))
            # Always true, but opaque to the compiler: see State.
            values, dp_term = lax.cond(tile.task.row >= 0, self.swiglu_bwd, self.zeros, *half, router_weight)
            halves.append(values)
            dp_terms.append(dp_term)
        values = [jnp.concatenate(pair, axis=1) for pair in zip(*halves, strict=True)]
        return values, jnp.sum(functools.reduce(jnp.add, dp_terms), axis=1)

    def swiglu_bwd(self, dh: Array, gate: Array, up: Array, router_weight: Array) -> tuple[tuple[Array, ...], Array]:
        """Return (dgate, dup, p h) in the output dtype, which takes half the registers, and the summands of dp."""
        router_weight = lax.broadcast_in_dim(router_weight, dh.shape, [0])
        sigmoid_gate = sigmoid(gate)
        silu = gate * sigmoid_gate
        h, weighted_dh = silu * up, router_weight * dh
        values = weighted_dh * up * sigmoid_gate * (1 + gate - silu), weighted_dh * silu, router_weight * h
        return tuple(value.astype(self.gmem.dy.dtype) for value in values), dh * h

    def zeros(self, dh: Array, *_: Array) -> tuple[tuple[Array, ...], Array]:
        """Return values of the types that `swiglu_bwd` returns; never executed."""
        return (jnp.zeros_like(dh, self.gmem.dy.dtype),) * 3, dh

    def store_dp_part(self, tile: GmmTile, dp: Array) -> None:
        """Store the sums over the columns of a tile."""
        # The copy of the last tile's sums was complete before the first chunk of this one.
        self.smem.row_sums_smem[self.warpgroup] = dp
        plgpu.commit_smem()
        column_tile = lax.div(tile.column, self.block_n)
        rows = pl.ds(self.warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
        target = self.out.dp_parts.at[tile.task_index, column_tile, rows]
        plgpu.copy_smem_to_gmem(self.smem.row_sums_smem.at[self.warpgroup], target)


def sigmoid(x: Array) -> Array:
    """Return 1 / (1 + exp(-x)): this quotient takes two instructions, a division five.

    `up_proj` does not use it: the assembler then adds two moves to the loop of products.
    """
    return jnp.square(lax.rsqrt(1 + jnp.exp(-x)))


def gather_row_values(values: Array, metadata: GroupMetadata, N: int, E: int) -> Array:
    """Return the value of each row [N] from those of the tasks [tasks, BLOCK_M]; 0 for unassigned rows."""
    in_use = jnp.arange(metadata.group.shape[0]) < metadata.count
    ends = jnp.where(in_use, jnp.minimum(metadata.row + BLOCK_M, metadata.row_end), N)
    n = jnp.arange(N)
    task = jnp.searchsorted(ends, n, side="right")
    return jnp.where(metadata.group[task] < E, values[task, n - metadata.row[task]], 0)
