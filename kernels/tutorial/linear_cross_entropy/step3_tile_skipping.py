"""Step 3, tile skipping: a mask in the last tile of the vocabulary only; tiles of rows without targets are skipped.

Math      as step 2, for tiles of rows in which a row takes part
Tiling    grid (tiles of N, tiles of V). A table in scalar memory says which tiles of rows are active:

              vocabulary ->   v_tile v_tile v_tile v_tile
              n_tile            █ ->   █ ->   █ ->   ▞      █ inside the vocabulary, no mask is computed
              n_tile            █ ->   █ ->   █ ->   ▞      ▞ reaches past it: computed, then masked
              n_tile            ░      ░      ░      ░      ░ no row takes part: neither fetched nor computed

State     as step 2.
Traffic   h once, w once per active tile of rows, three numbers per row. 2 M V FLOPs per row of an active tile.
Limits    as step 2.
Source    Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models (arXiv:2411.09009), drops rows that take
          no part before the kernel.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dantinox.kernels.tutorial.linear_cross_entropy.common import (
    NT,
    RowStats,
    Tiles,
    active_tiles,
    call_options,
    dot,
    iota,
    operation,
)

Array = jax.Array


def row_stats(h: Array, w: Array, targets: Array, tiles: Tiles) -> RowStats:
    """Maximum, sum of exponentials and target's logit of each row."""
    (N, M), V = h.shape, w.shape[0]
    last = pl.cdiv(V, tiles.v) - 1
    row_spec = pl.BlockSpec((tiles.n, 1), lambda n, v, active: (n, 0))
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(pl.cdiv(N, tiles.n), last + 1),
        in_specs=[
            pl.BlockSpec((tiles.n, M), lambda n, v, active: (n, 0)),
            # A skipped tile names the last tile of w, which is there already.
            pl.BlockSpec((tiles.v, M), lambda n, v, active: (jnp.where(active[n] > 0, v, last), 0)),
            row_spec,
        ],
        out_specs=[row_spec] * 3,
    )
    kernel = pl.pallas_call(
        functools.partial(_kernel, V=V),
        out_shape=[jax.ShapeDtypeStruct((N, 1), jnp.float32)] * 3,
        grid_spec=grid_spec,
        **call_options(),
        name="tile_skipping",
    )
    return RowStats(*kernel(active_tiles(targets, tiles.n), h, w, targets))


def _kernel(active_ref, h_ref, w_ref, target_ref, max_ref, sum_ref, logit_ref, *, V: int) -> None:
    v, v_tile = pl.program_id(1), w_ref.shape[0]
    active, inside = active_ref[pl.program_id(0)] > 0, (v + 1) * v_tile <= V

    @pl.when(v == 0)
    def init_state() -> None:
        max_ref[...] = jnp.full_like(max_ref, -jnp.inf)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        logit_ref[...] = jnp.zeros_like(logit_ref)

    def add_tile(masked: bool) -> None:
        s = dot(h_ref[...], w_ref[...], NT)
        column = v * v_tile + iota(s.shape, 1)
        if masked:
            s = jnp.where(column < V, s, -jnp.inf)
        add_logits(s, column == target_ref[...], max_ref, sum_ref, logit_ref)

    pl.when(active & inside)(functools.partial(add_tile, masked=False))
    pl.when(active & ~inside)(functools.partial(add_tile, masked=True))


def add_logits(s: Array, is_target: Array, max_ref: Any, sum_ref: Any, logit_ref: Any) -> None:
    """Add a tile of logits [n_tile, v_tile] to the state of its rows."""
    row_max = jnp.maximum(max_ref[...], jnp.max(s, axis=1, keepdims=True))
    decay = jnp.exp(max_ref[...] - row_max)
    sum_ref[...] = decay * sum_ref[...] + jnp.sum(jnp.exp(s - row_max), axis=1, keepdims=True)
    logit_ref[...] += jnp.sum(jnp.where(is_target, s, 0), axis=1, keepdims=True)
    max_ref[...] = row_max


linear_cross_entropy = operation(row_stats)
