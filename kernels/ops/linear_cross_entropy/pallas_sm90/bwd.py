"""The backward pass of the linear cross-entropy on Hopper: a kernel for the logits' gradients, two products by XLA.

Math      ds = ((1 + 2 z_loss lse) exp(s - m) / l - [v = target]) dloss cap'(s);  dh = ds w;  dw = ds^T h
Tiling    The vocabulary in chunks, one after the other, each of at most 2^24 logits (`common.py`). For each, one
          persistent thread block per SM computes tile after tile of the logits again, 128 rows x 256 words, and writes
          their gradients; the two products read them.

              vocabulary ->   chunk 0         chunk 1         rest
              128 rows        █   █   █   █   █   █   █   █   █   ▞        █ a tile   ▞ not used past the vocabulary
              128 rows        █   █   █   █   █   █   █   █   █   ▞
                              dh +=           dh +=           dh +=
                              dw[chunk 0] =   dw[chunk 1] =   dw[rest] =

State     One tile of logits, 64 x 256 float32 per consumer; two buffers of 64 rows of 128 bytes each, from which TMA
          stores the gradients. In memory the gradients of a chunk, and the sum of dh [N, M] in float32.
Traffic   Writes each gradient once and reads it twice, 6 bytes per logit in 16 bits, most of it in L2, which a chunk
          fits. Reads and writes the sum of dh once per chunk. 6 N M V FLOPs, 8 with the forward pass: four products,
          one more than with all logits in memory. The library's products are as fast as any; a kernel that kept dh or
          dw on the chip would compute the logits M / 256 times, as a thread block has registers for 256 of M columns.
Limits    As the forward kernel. The gradients of float16 are float32, for its range, and multiplied in TF32.
Source    Hsu et al., Liger Kernel (arXiv:2410.10989), for chunks of logits between a kernel and a library's products;
          its chunks are rows, ours words, so that a chunk writes its rows of dw once.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dantinox.kernels.mosaic_gpu import TMA_ROWS, wgmma_smem
from dantinox.kernels.ops.grouped_matmul.pallas_sm90 import tile_scheduler, warp_specialized
from dantinox.kernels.ops.grouped_matmul.pallas_sm90.warp_specialized import (
    COMPUTE_WARPGROUPS,
    STORE_BUFFERS,
    SmemPipeline,
)
from dantinox.kernels.ops.linear_cross_entropy.common import chunk_size, chunked_gradients, gradient_dtype
from dantinox.kernels.ops.linear_cross_entropy.pallas_sm90.block_sizes import (
    BLOCK_K,
    BLOCK_N,
    STAGES,
    WARPGROUP_ROWS,
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
STORE_BYTES = 128  # of a row of a store buffer: one swizzled line


class BwdInputs(NamedTuple):
    """Inputs of the kernel, in global memory; those per row have whole blocks of rows."""

    h: Any
    w: Any
    targets: Any
    row_max: Any
    weight_gradient: Any
    target_gradient: Any


class BwdOutputs(NamedTuple):
    """Output of the kernel, in global memory: the logits' gradients, in columns of 64."""

    ds: Any


class BwdScratch(NamedTuple):
    """Shared memory and barriers of a thread block, in order of allocation."""

    empty: Ref
    full: Ref
    store_smem: Ref  # buffers per consumer
    w_smem: Ref  # per stage
    h_smem: Ref  # per stage


class BwdTile(NamedTuple):
    """A tile of logits: its first row, its first word and its first pipeline step."""

    row: Array
    word: Array
    first_step: Array


def backward(
    h: Array,
    w: Array,
    targets: Array,
    row_max: Array,
    weight_gradient: Array,
    target_gradient: Array,
    config: Sm90LossConfig,
) -> tuple[Array, Array]:
    """Return (dh, dw).

    Args:
        h: [N, M]; zeros in rows that take no part. N is a multiple of `TMA_ROWS`, M of `BLOCK_K`.
        w: [V, M].
        targets: [N] int32, below 0 in rows that take no part.
        row_max: maxima m of the logits, [N] float32.
        weight_gradient: factor of exp(s - m), the gradient of the logsumexp over l, [N] float32; 0 in rows that take no
            part.
        target_gradient: gradient of the loss [N] float32, 0 in rows that take no part.
        config: static parameters.
    """
    rest = -h.shape[0] % BLOCK_N
    row_max, weight_gradient, target_gradient = (
        jnp.pad(x, (0, rest)) for x in (row_max, weight_gradient, target_gradient)
    )

    def logit_gradients(w_chunk: Array, targets: Array) -> Array:
        targets, words = jnp.pad(targets, (0, rest), constant_values=-1), w_chunk.shape[0]
        w_chunk = jnp.pad(w_chunk, ((0, -words % TMA_ROWS), (0, 0)))
        inputs = BwdInputs(h, w_chunk, targets, row_max, weight_gradient, target_gradient)
        return launch(inputs, pl.cdiv(words, COLUMNS) * COLUMNS, config)[:, :words]

    return chunked_gradients(h, w, targets, chunk_size(h.shape[0], w.shape[0], config.block_v), logit_gradients)


def launch(inputs: BwdInputs, columns: int, config: Sm90LossConfig) -> Array:
    """Return the gradients of the logits [N, columns]; those past the rows of w are to be ignored."""
    dtype, ds_dtype = inputs.h.dtype, gradient_dtype(inputs.h.dtype)
    store_columns = STORE_BYTES // ds_dtype.itemsize

    def make_roles(
        gmem: BwdInputs, out: BwdOutputs, smem: BwdScratch, pipeline: SmemPipeline, warpgroup: Array
    ) -> BwdKernel:
        return BwdKernel(gmem, out, smem, pipeline, warpgroup, config)

    outputs = warp_specialized.launch_warp_specialized(
        make_roles,
        inputs,
        BwdOutputs(jax.ShapeDtypeStruct((inputs.h.shape[0], columns), ds_dtype)),
        BwdScratch(
            empty=warp_specialized.empty_barriers(STAGES),
            full=warp_specialized.full_barriers(STAGES, copies=2),
            store_smem=wgmma_smem((COMPUTE_WARPGROUPS, STORE_BUFFERS, 1, WARPGROUP_ROWS, store_columns), ds_dtype),
            w_smem=wgmma_smem((STAGES, config.block_v, BLOCK_K), dtype),
            h_smem=wgmma_smem((STAGES, BLOCK_N, BLOCK_K), dtype),
        ),
        config.launch,
        stages=STAGES,
        name="linear_cross_entropy_logit_gradients",
    )
    return outputs.ds


@dataclass(frozen=True, eq=False)
class BwdKernel:
    """The gradients of the logits on one thread block; see `WarpgroupRoles`."""

    gmem: BwdInputs
    out: BwdOutputs
    smem: BwdScratch
    pipeline: SmemPipeline
    warpgroup: Array
    config: Sm90LossConfig

    @property
    def k_steps(self) -> int:
        """Pipeline steps per tile."""
        return self.gmem.h.shape[1] // BLOCK_K

    def for_each_tile(self, run_tile: Callable[[BwdTile], None]) -> Array:
        """Run run_tile(tile) for the tiles of this thread block; return the number of pipeline steps."""
        block_v = self.config.block_v
        num_n_blocks, num_v_blocks = self.gmem.targets.shape[0] // BLOCK_N, pl.cdiv(self.out.ds.shape[1], block_v)

        def run_nth_tile(n: Array, step: Array) -> Array:
            n_block, v_block = tile_scheduler.snake_order(n, num_n_blocks, num_v_blocks)
            run_tile(BwdTile(n_block * BLOCK_N, v_block * block_v, step))
            return step + self.k_steps

        return tile_scheduler.for_each_persistent_tile(num_n_blocks * num_v_blocks, run_nth_tile)

    def load(self, tile: BwdTile) -> None:
        """Load the operands of a tile."""
        gmem, smem = self.gmem, self.smem
        load_tile(self.pipeline, tile.first_step, gmem.h, gmem.w, smem.h_smem, smem.w_smem, tile.row, tile.word)

    def compute(self, tile: BwdTile) -> None:
        """Compute and store the gradients of this consumer's rows."""
        gmem, smem, row = self.gmem, self.smem, tile.row + self.warpgroup * WARPGROUP_ROWS
        targets = load_rows(gmem.targets, row)
        m, dweight, dtarget = (load_rows(x, row) for x in (gmem.row_max, gmem.weight_gradient, gmem.target_gradient))
        products = tile_products(self.pipeline, tile.first_step, self.k_steps, smem.h_smem, smem.w_smem, self.warpgroup)
        finder, buffers = TargetFinder(targets, tile.word), smem.store_smem.at[self.warpgroup]
        columns = buffers.shape[-1]

        def store_chunk(n: int) -> None:
            s = cap(products[:, n : n + columns], self.config.softcap)
            ds = jnp.exp(s - per_row(m, columns)) * per_row(dweight, columns)
            ds -= jnp.where(finder.is_target(n, columns), per_row(dtarget, columns), 0.0)
            if self.config.softcap is not None:
                t = s * (1 / self.config.softcap)
                ds *= 1.0 - t * t

            def start_copy(_: int, buffer: Ref) -> None:
                target = self.out.ds.at[pl.ds(row, WARPGROUP_ROWS), pl.ds(tile.word + n, columns)]
                plgpu.copy_smem_to_gmem(buffer, target, commit_group=False)

            warp_specialized.store_chunk_async(buffers, n // columns, ds, start_copy)

        for n in range(0, self.config.block_v, columns):
            # A branch, even where it is always taken: the compiler would start all chunks at once, and spill.
            pl.when(tile.word + n < self.out.ds.shape[1])(functools.partial(store_chunk, n))
