"""The forward pass of the linear cross-entropy on Hopper: an online logsumexp behind warp-specialized products.

Math      s = cap(h w^T);  m = max_v s;  l = sum_v exp(s - m);  lse = m + log(l);
          loss = (m - s[target]) + log(l) + z_loss lse^2
Tiling    One persistent thread block per SM takes task after task: 128 rows and a split of the vocabulary, which it
          visits in tiles of 256 words. Two consumer warpgroups have 64 of the rows each; a third loads by TMA
          (`grouped_matmul/pallas_sm90/warp_specialized.py`). Thread blocks that run at the same time share the splits
          of 16 blocks of rows, so that they read h and w from L2.

              vocabulary ->   split 0     split 1     split 2
              128 rows        █   █   █   █   █   █   █   ▞        █ a tile   ▞ masked past the vocabulary
              128 rows        █   █   █   █   █   █   █   ▞

          The exponentials of a tile take 2048 cycles of an SM, at 16 per cycle, and its products 16 M: an eighth more
          at M = 1024. One consumer's exponentials overlap the other's products by the stages that they are apart, one
          of 512 cycles as a rule and four at most; meanwhile the producer loads the next tile.
State     m, l and the target's logit, three registers for each of a thread's two rows; one tile of logits, 64 x 256
          float32, 128 of the 240 registers per thread. Four stages of h and w, 64 columns wide.
Traffic   A tile reads 128 rows of h and 256 of w from L2, 85 FLOPs per byte. From memory, w is read once per 16 blocks
          of rows, 2048 FLOPs per byte. Writes three float32 numbers per row and split, which XLA combines in order.
          2 N M V FLOPs.
Limits    bfloat16 and float16; float32 is left to Triton. Any N, M and V: `vjp.py` fills h up to 8 rows and both to 64
          columns, this file w to 8 words, in a copy where V is no multiple of 8. A soft cap from 2^-40 to 2^40.
Source    Milakov and Gimelshein, Online normalizer calculation for softmax (arXiv:1805.02867); Wijmans et al., Cut Your
          Losses in Large-Vocabulary Language Models (arXiv:2411.09009); NVIDIA's CUTLASS for the warp specialization.
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

from dantinox.kernels.mosaic_gpu import TMA_ROWS, wgmma_smem
from dantinox.kernels.ops.grouped_matmul.pallas_sm90 import tile_scheduler, warp_specialized
from dantinox.kernels.ops.grouped_matmul.pallas_sm90.warp_specialized import (
    COMPUTE_WARPGROUPS,
    ROW_LAYOUT,
    SmemPipeline,
)
from dantinox.kernels.ops.linear_cross_entropy.common import combine_splits
from dantinox.kernels.ops.linear_cross_entropy.pallas_sm90.block_sizes import (
    BLOCK_K,
    BLOCK_N,
    STAGES,
    WARPGROUP_ROWS,
    tiles_per_split,
)
from dantinox.kernels.ops.linear_cross_entropy.pallas_sm90.common import (
    COLUMNS,
    Ref,
    Sm90LossConfig,
    TargetFinder,
    cap,
    load_rows,
    load_tile,
    per_row,
    tile_products,
)

Array = jax.Array
Carry = tuple[Array, Array, Array]  # maximum, sum of exponentials and target's logit of a row
M_INIT = float(jnp.finfo(jnp.float32).min)  # no finite logit is below it
NUM_STATS = 3  # numbers per row and split


class FwdInputs(NamedTuple):
    """Inputs of the kernel, in global memory; `targets` has whole blocks of rows."""

    h: Any
    w: Any
    targets: Any


class FwdOutputs(NamedTuple):
    """Output of the kernel, in global memory: the `Carry` of each row, [splits, NUM_STATS, whole blocks of rows]."""

    stats: Any


class FwdScratch(NamedTuple):
    """Shared memory and barriers of a thread block, in order of allocation."""

    empty: Ref
    full: Ref
    stats_smem: Ref  # per consumer
    w_smem: Ref  # per stage
    h_smem: Ref  # per stage


class FwdTask(NamedTuple):
    """A block of rows and a split of the vocabulary.

    Attributes:
        row: its first row.
        split: index of the split.
        first_tile, end_tile: its tiles of the vocabulary.
        first_step: its first pipeline step.
    """

    row: Array
    split: Array
    first_tile: Array
    end_tile: Array
    first_step: Array


def forward(h: Array, w: Array, targets: Array, config: Sm90LossConfig) -> tuple[Array, Array, Array]:
    """Return (losses, maxima m of the logits, their sums of exponentials l), [N] float32.

    Args:
        h: [N, M]; N is a multiple of `TMA_ROWS`, M of `BLOCK_K`.
        w: [V, M].
        targets: [N] int32, below 0 in rows that take no part.
        config: static parameters.
    """
    N, V, block_v = h.shape[0], w.shape[0], config.block_v
    split_tiles = tiles_per_split(N, V, block_v, config.launch.num_sms)
    splits, rows = pl.cdiv(V, split_tiles * block_v), pl.cdiv(N, BLOCK_N) * BLOCK_N
    inputs = FwdInputs(h, jnp.pad(w, ((0, -V % TMA_ROWS), (0, 0))), jnp.pad(targets, (0, rows - N), constant_values=-1))

    def make_roles(
        gmem: FwdInputs, out: FwdOutputs, smem: FwdScratch, pipeline: SmemPipeline, warpgroup: Array
    ) -> FwdKernel:
        return FwdKernel(gmem, out, smem, pipeline, warpgroup, config, V, split_tiles)

    outputs = warp_specialized.launch_warp_specialized(
        make_roles,
        inputs,
        FwdOutputs(jax.ShapeDtypeStruct((splits, NUM_STATS, rows), jnp.float32)),
        FwdScratch(
            empty=warp_specialized.empty_barriers(STAGES),
            full=warp_specialized.full_barriers(STAGES, copies=2),
            stats_smem=plgpu.SMEM((COMPUTE_WARPGROUPS, NUM_STATS, WARPGROUP_ROWS), jnp.float32),
            w_smem=wgmma_smem((STAGES, block_v, BLOCK_K), h.dtype),
            h_smem=wgmma_smem((STAGES, BLOCK_N, BLOCK_K), h.dtype),
        ),
        config.launch,
        stages=STAGES,
        name="linear_cross_entropy",
    )
    maxima, totals, target_logits = (outputs.stats[:, i, :N] for i in range(NUM_STATS))
    return combine_splits(maxima, totals, target_logits, targets, config.z_loss)


@dataclass(frozen=True, eq=False)
class FwdKernel:
    """The forward pass on one thread block; see `WarpgroupRoles`."""

    gmem: FwdInputs
    out: FwdOutputs
    smem: FwdScratch
    pipeline: SmemPipeline
    warpgroup: Array
    config: Sm90LossConfig
    V: int
    split_tiles: int

    @property
    def k_steps(self) -> int:
        """Pipeline steps per tile."""
        return self.gmem.h.shape[1] // BLOCK_K

    def for_each_tile(self, run_task: Callable[[FwdTask], None]) -> Array:
        """Run run_task(task) for the tasks of this thread block; return the number of pipeline steps."""
        splits, _, rows = self.out.stats.shape
        num_tiles, num_n_blocks = pl.cdiv(self.V, self.config.block_v), rows // BLOCK_N

        def run_nth_task(n: Array, step: Array) -> Array:
            n_block, split = tile_scheduler.snake_order(n, num_n_blocks, splits)
            first_tile = split * self.split_tiles
            end_tile = jnp.minimum(first_tile + self.split_tiles, num_tiles)
            run_task(FwdTask(n_block * BLOCK_N, split, first_tile, end_tile, step))
            return step + (end_tile - first_tile) * self.k_steps

        return tile_scheduler.for_each_persistent_tile(num_n_blocks * splits, run_nth_task)

    def load(self, task: FwdTask) -> None:
        """Load the operands of each tile of a task."""
        gmem, smem = self.gmem, self.smem

        @pl.loop(task.first_tile, task.end_tile)
        def load_next_tile(tile: Array) -> None:
            first_step, word = self.first_step(task, tile), tile * self.config.block_v
            load_tile(self.pipeline, first_step, gmem.h, gmem.w, smem.h_smem, smem.w_smem, task.row, word)

    def first_step(self, task: FwdTask, tile: Array) -> Array:
        """Return the first pipeline step of a tile."""
        return task.first_step + (tile - task.first_tile) * self.k_steps

    def compute(self, task: FwdTask) -> None:
        """Compute and store the maximum, the sum and the target's logit of this consumer's rows."""
        row = task.row + self.warpgroup * WARPGROUP_ROWS
        targets = load_rows(self.gmem.targets, row)

        def step(masked: bool) -> Callable[[Array, Carry], Carry]:
            return functools.partial(self.add_tile, task, targets, masked)

        def full(value: float) -> Array:
            return plgpu.layout_cast(jnp.full((WARPGROUP_ROWS,), value, jnp.float32), ROW_LAYOUT)

        end_whole = jnp.minimum(task.end_tile, self.V // self.config.block_v)
        carry = lax.fori_loop(task.first_tile, end_whole, step(masked=False), (full(M_INIT), full(0.0), full(0.0)))
        if self.V % self.config.block_v:
            carry = lax.fori_loop(end_whole, task.end_tile, step(masked=True), carry)
        self.store(task.split, row, carry)

    def add_tile(self, task: FwdTask, targets: Array, masked: bool, tile: Array, carry: Carry) -> Carry:
        """Add the logits of a tile to the state of the rows; with `masked`, those past the vocabulary are left out."""
        smem, block_v = self.smem, self.config.block_v
        m, l, target_logit = carry
        products = tile_products(
            self.pipeline, self.first_step(task, tile), self.k_steps, smem.h_smem, smem.w_smem, self.warpgroup
        )
        finder, s, found, largest = TargetFinder(targets, tile * block_v), [], None, None
        for n in range(0, block_v, COLUMNS):
            x = cap(products[:, n : n + COLUMNS], self.config.softcap)
            if masked:
                column = plgpu.broadcasted_iota(jnp.int32, x.shape, 1, layout=plgpu.Layout.WGMMA)
                x = jnp.where(column < self.V - tile * block_v - n, x, -jnp.inf)
            target = jnp.where(finder.is_target(n, COLUMNS), x, 0.0)
            found = target if found is None else found + target
            largest = x if largest is None else jnp.maximum(largest, x)
            s.append(x)
        target_logit += jnp.sum(found, axis=1)
        m_next = jnp.maximum(m, jnp.max(largest, axis=1))
        weights = [jnp.exp(x - per_row(m_next, COLUMNS)) for x in s]
        l = l * jnp.exp(m - m_next) + jnp.sum(functools.reduce(jnp.add, weights), axis=1)
        return m_next, l, target_logit

    def store(self, split: Array, row: Array, carry: Carry) -> None:
        """Store the state of this consumer's rows."""
        stats = self.smem.stats_smem.at[self.warpgroup]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the copy of the previous task, which ended long before
        for i, value in enumerate(carry):
            stats[i] = value
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(stats, self.out.stats.at[split, :, pl.ds(row, WARPGROUP_ROWS)])
