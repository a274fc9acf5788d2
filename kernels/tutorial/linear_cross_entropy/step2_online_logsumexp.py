"""Step 2, online logsumexp: three numbers summarize the tiles of the vocabulary so far. No logits in memory.

Math      for each tile:  m' = max(m, max_v s),  l' = l exp(m - m') + sum_v exp(s - m'),  t' = t + s[target]
          loss = m + log(l) - t.  The target is in one tile; in the others its mask selects nothing
Tiling    grid (tiles of N, tiles of V), the second one after the other:

              vocabulary ->   v_tile v_tile v_tile v_tile
              n_tile            ▞ ->   ▞ ->   ▞ ->   ▞      ▞ computed, then masked past V
              n_tile            ▞ ->   ▞ ->   ▞ ->   ▞

State     m, l and t of a tile of rows, float32 [n_tile, 1], in their output blocks: the blocks are the same for all
          tiles of the vocabulary, so they stay on the chip until the last.
Traffic   h once, w once per tile of rows, three numbers per row. 2 N M V FLOPs.
Limits    as step 1, without its logits: N and V are limited by h and w alone.
Source    Milakov and Gimelshein, Online normalizer calculation for softmax (arXiv:1805.02867).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from dantinox.kernels.tutorial.linear_cross_entropy.common import (
    NT,
    RowStats,
    Tiles,
    call_options,
    dot,
    iota,
    operation,
)

Array = jax.Array


def row_stats(h: Array, w: Array, targets: Array, tiles: Tiles) -> RowStats:
    """Maximum, sum of exponentials and target's logit of each row."""
    (N, M), V = h.shape, w.shape[0]
    row_spec = pl.BlockSpec((tiles.n, 1), lambda n, v: (n, 0))
    kernel = pl.pallas_call(
        functools.partial(_kernel, V=V),
        out_shape=[jax.ShapeDtypeStruct((N, 1), jnp.float32)] * 3,
        grid=(pl.cdiv(N, tiles.n), pl.cdiv(V, tiles.v)),
        in_specs=[
            pl.BlockSpec((tiles.n, M), lambda n, v: (n, 0)),
            pl.BlockSpec((tiles.v, M), lambda n, v: (v, 0)),
            row_spec,
        ],
        out_specs=[row_spec] * 3,
        **call_options(),
        name="online_logsumexp",
    )
    return RowStats(*kernel(h, w, targets))


def _kernel(h_ref: Any, w_ref: Any, target_ref: Any, max_ref: Any, sum_ref: Any, logit_ref: Any, *, V: int) -> None:
    v = pl.program_id(1)

    @pl.when(v == 0)
    def init_state() -> None:
        max_ref[...] = jnp.full_like(max_ref, -jnp.inf)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        logit_ref[...] = jnp.zeros_like(logit_ref)

    s = dot(h_ref[...], w_ref[...], NT)
    column = v * s.shape[1] + iota(s.shape, 1)
    s = jnp.where(column < V, s, -jnp.inf)  # w holds anything past V; exp(-inf) adds nothing
    row_max = jnp.maximum(max_ref[...], jnp.max(s, axis=1, keepdims=True))
    decay = jnp.exp(max_ref[...] - row_max)  # 0 in the first tile
    sum_ref[...] = decay * sum_ref[...] + jnp.sum(jnp.exp(s - row_max), axis=1, keepdims=True)
    logit_ref[...] += jnp.sum(jnp.where(column == target_ref[...], s, 0), axis=1, keepdims=True)
    max_ref[...] = row_max


linear_cross_entropy = operation(row_stats)
