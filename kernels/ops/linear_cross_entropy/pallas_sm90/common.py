"""Shared by the Hopper kernels of the linear cross-entropy: static parameters, memory, loads and logits of a tile."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dantinox.kernels.mosaic_gpu import softcap_tanh
from dantinox.kernels.ops.grouped_matmul.pallas_sm90.warp_specialized import (
    ROW_LAYOUT,
    Sm90GmmConfig,
    SmemPipeline,
    wgmma_reduce,
)
from dantinox.kernels.ops.linear_cross_entropy.pallas_sm90.block_sizes import (
    BLOCK_K,
    BLOCK_N,
    BLOCK_V,
    WARPGROUP_ROWS,
)

Array = jax.Array
Ref = Any
COLUMNS = 64  # columns of logits that the epilogues take at a time, to save registers


class Sm90LossConfig(NamedTuple):
    """Static parameters of the kernels. Hashable, since `vjp.py` passes it to custom_vjp.

    Attributes:
        softcap: bound of the logits, or None.
        z_loss: weight of the squared logsumexp.
        launch: thread blocks, interpreter and words per tile.
    """

    softcap: float | None
    z_loss: float
    launch: Sm90GmmConfig

    @property
    def block_v(self) -> int:
        """Words per tile."""
        return self.launch.width or BLOCK_V


def load_tile(
    pipeline: SmemPipeline, first_step: Array, h: Ref, w: Ref, h_smem: Ref, w_smem: Ref, row: Array, word: Array
) -> None:
    """Load the rows of h and of w of a tile, 64 of the contraction per stage; TMA reads zeros outside the arrays."""
    rows, words = pl.ds(pl.multiple_of(row, BLOCK_N), BLOCK_N), pl.ds(word, w_smem.shape[1])

    @pl.loop(0, h.shape[1] // BLOCK_K)
    def load_stage(k: Array) -> None:
        contracted = pl.ds(k * BLOCK_K, BLOCK_K)

        def copy(slot: Array) -> None:
            plgpu.copy_gmem_to_smem(h.at[rows, contracted], h_smem.at[slot], pipeline.full.at[slot])
            plgpu.copy_gmem_to_smem(w.at[words, contracted], w_smem.at[slot], pipeline.full.at[slot])

        pipeline.produce(first_step + k, copy)


def tile_products(
    pipeline: SmemPipeline, first_step: Array, k_steps: int, h_smem: Ref, w_smem: Ref, warpgroup: Array
) -> Array:
    """Return h w^T of a consumer's rows of a tile, [WARPGROUP_ROWS, block_v] float32."""

    def operands(_: Any, slot: Array) -> list[tuple[Any, Any]]:
        rows = h_smem.at[slot, pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)]
        return [(rows, w_smem.at[slot].transpose((1, 0)))]

    return wgmma_reduce(pipeline, first_step, k_steps, operands, w_smem.shape[1])[0]


def load_rows(ref: Ref, first: Array) -> Array:
    """Load one value per row of a consumer."""
    return plgpu.load(ref.at[pl.ds(first, WARPGROUP_ROWS)], layout=ROW_LAYOUT, optimized=False)


def per_row(x: Array, columns: int) -> Array:
    """Broadcast one value per row over the columns."""
    return lax.broadcast_in_dim(x, (x.shape[0], columns), [0])


def cap(s: Array, softcap: float | None) -> Array:
    """Return the capped logits."""
    return s if softcap is None else softcap * softcap_tanh(s, scale=1.0, softcap=softcap)


class TargetFinder:
    """Finds the target's logit of each row in the columns of a tile.

    It compares eight columns: in the next eight, the values of a thread differ by a constant, which goes into the
    comparison. Indices of all columns would take registers.
    """

    def __init__(self, targets: Array, first_word: Array) -> None:
        column = plgpu.broadcasted_iota(jnp.int32, (8,), 0, layout=plgpu.Layout.WGMMA.reduce(0))
        self.distance = per_row(targets - first_word, 8) - lax.broadcast_in_dim(column, (targets.shape[0], 8), [1])

    def is_target(self, first_column: int, columns: int) -> Array:
        """Return a mask of columns of the tile: true at each row's target."""
        groups = range(first_column, first_column + columns, 8)
        return jnp.concatenate([self.distance == n for n in groups], axis=1)
