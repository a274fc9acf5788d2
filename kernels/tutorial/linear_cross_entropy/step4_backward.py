"""Step 4, backward pass: one kernel for dh, one for dw; each computes the logits of a tile again.

Math      ds = (p - [v = target]) dloss,  p = exp(s - m) / l;  dh = ds w,  dw = ds^T h
Tiling    dh: grid (tiles of N, tiles of V), as step 3; dw: the other way round.

              vocabulary ->   v_tile v_tile v_tile v_tile
              n_tile            █ |    █ |    █ |    ▞ |    █ inside the vocabulary, no mask is computed
              n_tile            █ |    █ |    █ |    ▞ |    ▞ reaches past it: masked for dh, whose sum includes it
              n_tile            ░ v    ░ v    ░ v    ░ v    ░ no row takes part: adds nothing   | order of dw

State     dh [n_tile, M] in float32, from the first tile of the vocabulary to the last; dw [v_tile, M], from the first
          tile of rows to the last.
Traffic   dh: h once, w once per active tile of rows; dw: w once, h once per tile of the vocabulary. 4 M V FLOPs per
          row and kernel, 10 with the forward pass: five products, of which two compute logits again.
Limits    as step 3, with gradients of h and w. The forward pass keeps m and l, not m + log(l): see README.md.
Source    Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models (arXiv:2411.09009).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dantinox.kernels.tutorial.linear_cross_entropy.common import (
    NN,
    NT,
    TN,
    Tiles,
    active_tiles,
    call_options,
    dot,
    iota,
    operation,
    pad_rows,
    zero_past,
)
from dantinox.kernels.tutorial.linear_cross_entropy.step3_tile_skipping import row_stats

Array = jax.Array


def save_residuals(h: Array, w: Array, targets: Array, tiles: Tiles) -> tuple[Array, Any]:
    """The losses, and what the backward pass needs: the arguments, m and l."""
    stats = row_stats(h, w, targets, tiles)
    return stats.loss(targets), (h, w, targets, stats.row_max, stats.total)


def backward(tiles: Tiles, residuals: Any, dloss: Array) -> tuple[Array, Array, None]:
    """The gradients, each by its own kernel."""
    return (gradient("dh", tiles, residuals, dloss), gradient("dw", tiles, residuals, dloss), None)


def gradient(of: str, tiles: Tiles, residuals: Any, dloss: Array) -> Array:
    """Compute dh or dw."""
    h, w, targets, row_max, total = residuals
    takes_part, dloss = targets >= 0, dloss[:, None]
    # Rows that take no part become zeros: dw sums over the rows of a tile, and 0 * NaN is NaN.
    h, row_max, dloss, weight = (jnp.where(takes_part, x, 0) for x in (h, row_max, dloss, dloss / total))
    rows = [pad_rows(x, tiles.n) for x in (h, row_max, weight, dloss)] + [pad_rows(targets, tiles.n, -1)]
    M, V, last = h.shape[1], w.shape[0], pl.cdiv(w.shape[0], tiles.v) - 1
    grid = (rows[0].shape[0] // tiles.n, last + 1)
    row_index = lambda n, v, active: (n, 0)
    w_index = lambda n, v, active: (jnp.where(active[n] > 0, v, last), 0)
    if of == "dw":
        grid = grid[::-1]
        row_index, w_index = (lambda v, n, active: (n, 0)), (lambda v, n, active: (v, 0))
    row_spec, w_spec = pl.BlockSpec((tiles.n, M), row_index), pl.BlockSpec((tiles.v, M), w_index)
    out, out_spec = (rows[0], row_spec) if of == "dh" else (w, w_spec)
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=grid,
        in_specs=[row_spec, *[pl.BlockSpec((tiles.n, 1), row_index)] * 4, w_spec],
        out_specs=out_spec,
        scratch_shapes=[pltpu.VMEM(out_spec.block_shape, jnp.float32)],
    )
    kernel = pl.pallas_call(
        functools.partial(_kernel, of=of, V=V),
        out_shape=jax.ShapeDtypeStruct(out.shape, out.dtype),
        grid_spec=grid_spec,
        **call_options(),
        name=of,
    )
    return kernel(active_tiles(targets, tiles.n), *rows, w)[: h.shape[0] if of == "dh" else V]


def _kernel(active_ref, h_ref, max_ref, weight_ref, dloss_ref, target_ref, w_ref, out_ref, acc_ref, *, of, V) -> None:
    n, v = (pl.program_id(axis) for axis in ((0, 1) if of == "dh" else (1, 0)))
    first, active = v * w_ref.shape[0], active_ref[n] > 0
    inside = first + w_ref.shape[0] <= V

    @pl.when(pl.program_id(1) == 0)
    def init_sum() -> None:
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def add_tile(masked: bool) -> None:
        h, w = h_ref[...], w_ref[...]
        w = zero_past(w, first, V) if masked else w
        s = dot(h, w, NT)
        column = first + iota(s.shape, 1)
        ds = jnp.exp(s - max_ref[...]) * weight_ref[...] - jnp.where(column == target_ref[...], dloss_ref[...], 0)
        if masked:
            ds = jnp.where(column < V, ds, 0)
        acc_ref[...] += dot(ds.astype(w.dtype), w, NN) if of == "dh" else dot(ds.astype(h.dtype), h, TN)

    pl.when(active & inside if of == "dh" else active)(functools.partial(add_tile, masked=False))
    if of == "dh":  # dw writes no row past the vocabulary
        pl.when(active & ~inside)(functools.partial(add_tile, masked=True))

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def write_gradient() -> None:
        out_ref[...] = acc_ref[...].astype(out_ref.dtype)


linear_cross_entropy = operation(row_stats, save_residuals, backward)
