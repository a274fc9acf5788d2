"""Step 1, all logits: a kernel multiplies, all N V logits go to memory, and XLA reduces them.

Math      s = h w^T;  loss[n] = m + log(sum_v exp(s[n, v] - m)) - s[n, target[n]],  m = max_v s[n, v]
Tiling    grid (tiles of N, tiles of V). Every logit is computed, and what a tile has past N or V is dropped:

              vocabulary ->   v_tile v_tile v_tile v_tile
              n_tile            █      █      █      █      █ computed and written
              n_tile            █      █      █      █

State     none: a tile needs no other.
Traffic   h once and w once per tile of rows; s, float32 [N, V], is written, then read for its maximum, for its sum and
          for the targets' logits, unless XLA merges them. 2 N M V FLOPs.
Limits    float32, bfloat16; float16 only interpreted. Any N, V and M, if the logits fit into memory. No gradients.
          NotImplementedError: softcap, z_loss. ValueError: other shapes and dtypes; tiles not multiples of 16.
Source    the loss of every language model, as it is written first.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from dantinox.kernels.tutorial.linear_cross_entropy.common import NT, RowStats, Tiles, call_options, dot, operation

Array = jax.Array


def row_stats(h: Array, w: Array, targets: Array, tiles: Tiles) -> RowStats:
    """Maximum, sum of exponentials and target's logit of each row."""
    (N, M), V = h.shape, w.shape[0]
    kernel = pl.pallas_call(
        _kernel,
        out_shape=jax.ShapeDtypeStruct((N, V), jnp.float32),
        grid=(pl.cdiv(N, tiles.n), pl.cdiv(V, tiles.v)),
        in_specs=[
            pl.BlockSpec((tiles.n, M), lambda n, v: (n, 0)),
            pl.BlockSpec((tiles.v, M), lambda n, v: (v, 0)),
        ],
        out_specs=pl.BlockSpec(tiles, lambda n, v: (n, v)),
        **call_options(),
        name="all_logits",
    )
    s = kernel(h, w)
    row_max = jnp.max(s, axis=1, keepdims=True)
    total = jnp.sum(jnp.exp(s - row_max), axis=1, keepdims=True)
    return RowStats(row_max, total, jnp.take_along_axis(s, jnp.maximum(targets, 0), axis=1))


def _kernel(h_ref: Any, w_ref: Any, s_ref: Any) -> None:
    s_ref[...] = dot(h_ref[...], w_ref[...], NT)


linear_cross_entropy = operation(row_stats)
