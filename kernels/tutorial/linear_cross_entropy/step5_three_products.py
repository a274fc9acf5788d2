"""Step 5, three products: dh and dw in the forward pass, for cotangents of 1; the backward pass scales them.

Math      ds = p - [v = target],  dh = ds w,  dw = ds^T h, once a row's m and l are known. Then dh[n] dloss[n], and dw c
          if dloss[n] = c in every row that takes part; otherwise dw as in step 4
Tiling    grid (tiles of N, 2 phases, tiles of V): a tile of rows computes all its logits, then all their gradients:

              phase           0: logits, m, l, t          1: ds, dh, dw
              n_tile            █ -> █ -> █ -> ▞ ->         █ -> █ -> █ -> ▞      █ inside the vocabulary   ▞ masked
              n_tile            ░    ░    ░    ░            ░    ░    ░    ░      ░ skipped

State     all logits of a tile of rows, float32 [n_tile, V], and its dh. dw is in memory: a step reads, adds, writes.
Traffic   w twice and dw, float32, twice per active tile of rows, h and dh once. 6 M V FLOPs per row, 10 in step 4.
Limits    as step 4, and V limited by VMEM. A common cotangent costs nothing; others cost the two products of dw.
Source    Hsu et al., Liger Kernel (arXiv:2410.10989): gradients in the forward pass, chunk by chunk.
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
    RowStats,
    Tiles,
    active_tiles,
    call_options,
    dot,
    iota,
    operation,
    pad_rows,
    zero_past,
)
from dantinox.kernels.tutorial.linear_cross_entropy.step3_tile_skipping import add_logits, row_stats
from dantinox.kernels.tutorial.linear_cross_entropy.step4_backward import gradient

Array = jax.Array


def save_residuals(h: Array, w: Array, targets: Array, tiles: Tiles) -> tuple[Array, Any]:
    """The losses, and the gradients for cotangents of 1, in float32."""
    (N, M), V = h.shape, w.shape[0]
    rows = [pad_rows(jnp.where(targets >= 0, h, 0), tiles.n), pad_rows(targets, tiles.n, -1)]
    num_n, num_v = rows[0].shape[0] // tiles.n, pl.cdiv(V, tiles.v)
    row_spec = pl.BlockSpec((tiles.n, 1), lambda n, phase, v, active: (n, 0))
    h_spec = pl.BlockSpec((tiles.n, M), lambda n, phase, v, active: (n, 0))
    w_spec = pl.BlockSpec((tiles.v, M), lambda n, phase, v, active: (jnp.where(active[n] > 0, v, num_v - 1), 0))
    in_memory = pl.BlockSpec(memory_space=pl.ANY)  # not copied to the chip by Pallas
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(num_n, 2, num_v),
        in_specs=[h_spec, row_spec, w_spec, in_memory],
        out_specs=[row_spec, row_spec, row_spec, h_spec, in_memory],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in ((num_v, *tiles), (tiles.v, M))],
    )
    row, dh, dw = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((N, 1), (N, M), (num_v * tiles.v, M)))
    kernel = pl.pallas_call(
        functools.partial(_kernel, V=V),
        out_shape=[row, row, row, dh, dw],
        grid_spec=grid_spec,
        input_output_aliases={4: 4},  # the zeros that dw starts from: input, the table counted, to output
        **call_options(),
        name="three_products",
    )
    *stats, dh, dw = kernel(active_tiles(targets, tiles.n), *rows, w, jnp.zeros(dw.shape, dw.dtype))
    return RowStats(*stats).loss(targets), ((h, w, targets, *stats[:2]), dh, dw[:V])


def backward(tiles: Tiles, residuals: Any, dloss: Array) -> tuple[Array, Array, None]:
    """Scale the gradients of the forward pass."""
    (h, w, targets, *_), dh, dw = residuals
    takes_part = targets[:, 0] >= 0
    dloss = jnp.where(takes_part, dloss, 0)
    common = dloss[jnp.argmax(takes_part)]  # of the first row that takes part; 0 if none does
    dw = jax.lax.cond(
        jnp.all(dloss == common, where=takes_part),
        lambda: (dw * common).astype(w.dtype),
        lambda: gradient("dw", tiles, residuals[0], dloss),
    )
    return (dh * dloss[:, None]).astype(h.dtype), dw, None


def _kernel(active_ref, h_ref, target_ref, w_ref, _, max_ref, sum_ref, logit_ref, dh_ref, dw_ref, s_ref, dw_tile, *, V):
    n, phase, v = (pl.program_id(axis) for axis in range(3))
    v_tile, active, inside = w_ref.shape[0], active_ref[n] > 0, (v + 1) * w_ref.shape[0] <= V
    is_target = v * v_tile + iota(s_ref.shape[1:], 1) == target_ref[...]

    @pl.when((phase == 0) & (v == 0))
    def init_state() -> None:
        max_ref[...] = jnp.full_like(max_ref, -jnp.inf)
        sum_ref[...], logit_ref[...], dh_ref[...] = (jnp.zeros_like(x) for x in (sum_ref, logit_ref, dh_ref))

    def compute_logits(masked: bool) -> None:
        s = dot(h_ref[...], w_ref[...], NT)
        s = jnp.where(v * v_tile + iota(s.shape, 1) < V, s, -jnp.inf) if masked else s
        s_ref[v] = s
        add_logits(s, is_target, max_ref, sum_ref, logit_ref)

    def compute_gradients(masked: bool) -> None:
        h, w = h_ref[...], zero_past(w_ref[...], v * v_tile, V) if masked else w_ref[...]
        p = jnp.where(target_ref[...] >= 0, jnp.exp(s_ref[v] - max_ref[...]) / sum_ref[...], 0)
        ds = (p - is_target.astype(jnp.float32)).astype(w.dtype)
        dh_ref[...] += dot(ds, w, NN)
        rows_of_dw = dw_ref.at[pl.ds(v * v_tile, v_tile)]
        pltpu.sync_copy(rows_of_dw, dw_tile)
        dw_tile[...] += dot(ds, h, TN)
        pltpu.sync_copy(dw_tile, rows_of_dw)

    for masked, is_tile in ((False, inside), (True, ~inside)):
        pl.when(active & (phase == 0) & is_tile)(functools.partial(compute_logits, masked))
        pl.when(active & (phase == 1) & is_tile)(functools.partial(compute_gradients, masked))


linear_cross_entropy = operation(row_stats, save_residuals, backward)
