"""Step 7, backward pass: one kernel for dq, one for dk and dv; each recomputes p tile by tile.

Math      as step 6. dq sums over keys and dk, dv sum over queries: each kernel keeps one sum on the chip
Tiling    dq: grid (B, K, visible tiles), as step 5. dk, dv: the same tiles, sorted by key tile:

              keys ->     k_tile k_tile k_tile k_tile
              G x q_tile    ▞ |    ░ |    ░ |    ░ |     ▞ computed, then masked
              G x q_tile    █ |    ▞ |    ░ |    ░ |     █ interior, no mask is computed
              G x q_tile    ▞ |    █ |    ▞ |    ░ |     ░ not in the grid
              G x q_tile    ░ v    ▞ v    █ v    ▞ v     | order of the grid for dk, dv

State     dq [G q_tile, D] in float32, from the first visible tile of a query tile to its last; dk and dv [k_tile, D],
          from the first visible tile of a key tile to its last.
Traffic   dq: q, do, lse and delta once, k and v once per query tile; dk, dv: the other way round. 6 D and 8 D FLOPs
          per pair, since both compute s and do v^T. No scores in memory.
Limits    as step 6
Source    Dao, FlashAttention-2 (arXiv:2307.08691), algorithm 2.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dantinox.kernels.tutorial.attention.common import NN, NT, TN, Problem, call_options, differentiable, dot, iota
from dantinox.kernels.tutorial.attention.step4_tile_skipping import FIRST, LAST, MASKED, visible_tiles
from dantinox.kernels.tutorial.attention.step6_log_sum_exp import forward

Array = jax.Array


def backward(problem: Problem, residuals: tuple[Array, ...], do: Array) -> tuple[Array, ...]:
    """Compute dq by one kernel, and dk and dv by another."""
    (q, k, v, o, lse), (mask, _, q_tile, k_tile) = residuals, problem
    delta = jnp.sum(do.astype(jnp.float32) * o, axis=-1, keepdims=True)
    # dk and dv sum over the rows of a tile, so the rows past T have to be zeros.
    pad = ((0, 0), (0, 0), (0, -mask.T % q_tile), (0, 0))
    inputs = (*(jnp.pad(x, pad) for x in (q, do, lse, delta)), k, v)
    (dq,) = _run("dq", visible_tiles(mask, q_tile, k_tile), inputs, inputs[:1], problem)
    dk, dv = _run("dkv", tiles_by_key(problem), inputs, (k, v), problem)
    return dq[:, :, : mask.T], dk, dv


def tiles_by_key(problem: Problem) -> np.ndarray:
    """`visible_tiles`, sorted by key tile. A key tile that no query sees has one step, to write zeros."""
    tiles = visible_tiles(problem.mask, problem.q_tile, problem.k_tile)
    unseen = [(0, j, MASKED) for j in range(pl.cdiv(problem.mask.S, problem.k_tile)) if j not in tiles[1]]
    i, j, flags = np.array(sorted([*map(tuple, tiles.T), *unseen], key=lambda tile: (tile[1], tile[0])), np.int32).T
    first, last = np.diff(j, prepend=-1) != 0, np.diff(j, append=-1) != 0
    return np.stack([i, j, FIRST * first + LAST * last + (flags & MASKED)]).astype(np.int32)


def _run(name: str, tables: np.ndarray, inputs: tuple[Array, ...], like: tuple[Array, ...], problem: Problem):
    """Run the kernel over the tiles of the tables; its outputs have the shapes of `like`: (q,) or (k, v)."""
    (B, H, _, D), K = inputs[0].shape, inputs[-1].shape[1]
    G, (mask, scale, q_tile, k_tile) = H // K, problem
    acc_shape = (G * q_tile if name == "dq" else k_tile, D)
    q_index = lambda b, h, n, i, j, flags: (b, h, i[n], 0)
    q_specs = [pl.BlockSpec((None, G, q_tile, x.shape[3]), q_index) for x in inputs[:4]]
    kv_specs = [pl.BlockSpec((None, None, k_tile, D), lambda b, h, n, i, j, flags: (b, h, j[n], 0))] * 2
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(tables),
        grid=(B, K, len(tables[0])),
        in_specs=[*q_specs, *kv_specs],
        out_specs=q_specs[:1] if name == "dq" else kv_specs,
        scratch_shapes=[pltpu.VMEM(acc_shape, jnp.float32)] * len(like),
    )
    kernel = pl.pallas_call(
        functools.partial(_kernel, mask=mask, scale=scale),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in like],
        grid_spec=grid_spec,
        name=name,
        **call_options(),
    )
    return kernel(*tables, *inputs)


def _kernel(i_ref, j_ref, flag_ref, q_ref, do_ref, lse_ref, delta_ref, k_ref, v_ref, *refs, mask, scale) -> None:
    out_refs, acc_refs = refs[: len(refs) // 2], refs[len(refs) // 2 :]
    n = pl.program_id(2)
    i, j, flag = i_ref[n], j_ref[n], flag_ref[n]

    @pl.when(flag & FIRST != 0)
    def init_sums() -> None:
        for ref in acc_refs:
            ref[...] = jnp.zeros_like(ref)

    def process_tile(masked: bool) -> None:
        q, do, lse, delta = (x[...].reshape(-1, x.shape[-1]) for x in (q_ref, do_ref, lse_ref, delta_ref))
        k, v = k_ref[...], v_ref[...]
        if masked:
            k, v = (mask.zero_unseen(x, j * k.shape[0]) for x in (k, v))
        s = dot(q, k, NT) * scale  # [G q_tile, k_tile]
        if masked:
            query = mask.S - mask.T + i * q_ref.shape[1] + iota((*q_ref.shape[:2], s.shape[1]), 1).reshape(s.shape)
            s = mask.apply(s, query, j * s.shape[1] + iota(s.shape, 1))
        p = jnp.exp(s - lse)
        ds = (p * (dot(do, v, NT) - delta)).astype(q.dtype)
        products = [dot(ds, k, NN)] if len(acc_refs) == 1 else [dot(ds, q, TN), dot(p.astype(do.dtype), do, TN)]
        for ref, product in zip(acc_refs, products, strict=True):
            ref[...] += product

    pl.when(flag & MASKED != 0)(functools.partial(process_tile, masked=True))
    pl.when(flag & MASKED == 0)(functools.partial(process_tile, masked=False))

    @pl.when(flag & LAST != 0)
    def epilogue() -> None:
        for out_ref, ref, factor in zip(out_refs, acc_refs, (scale, 1)):  # dq and dk have the factor, dv has not
            out_ref[...] = (ref[...] * factor).reshape(out_ref.shape).astype(out_ref.dtype)


attention = differentiable(forward, backward)
