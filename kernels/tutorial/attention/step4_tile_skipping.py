"""Step 4, tile skipping: the grid is the list of tiles that hold a visible pair.

Math      as step 3, over those tiles of keys alone: exp of a masked score is 0
Tiling    grid (B, H, visible tiles). Three tables in scalar memory, prefetched, say which tile a grid step processes:

              keys ->     k_tile k_tile k_tile k_tile
              q_tile        ▞      ░      ░      ░       ▞ computed, then masked
              q_tile        █      ▞      ░      ░       █ interior, all pairs visible: no mask is computed
              q_tile        ▞      █      ▞      ░       ░ not in the grid: no load, no work, no time
              q_tile        ░      ▞      █      ▞

State     m and l [q_tile, 1] and acc [q_tile, D] in float32, from the first visible tile of a query tile to its last.
Traffic   as step 3 with the visible keys in place of S. With a window W a query tile visits about
          (W + q_tile) / k_tile + 1 tiles: FLOPs and bytes grow with T W instead of T S.
Limits    float32, bfloat16; float16 only interpreted. Any T, S, H, K, D. Causal, window, scale; NotImplementedError:
          gate, softcap, segment_ids. ValueError: other shapes and dtypes; tiles that are not multiples of 16.
Source    Dao, FlashAttention-2 (arXiv:2307.08691), section 3.1: blocks of a causal mask; Pallas: scalar prefetch.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dantinox.kernels.tutorial.attention.common import M_INIT, NN, NT, Mask, call_options, check, dot, heads_first, iota

Array = jax.Array
FIRST, LAST, MASKED = 1, 2, 4


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    q_tile: int = 256,
    k_tile: int = 256,
    **unsupported: None,
) -> Array:
    """[B, T, H, D], as `dantinox.kernels.attention`: q [B, T, H, D], k and v [B, S, K, D]."""
    tiles = {"q_tile": q_tile, "k_tile": k_tile}
    mask, scale = check(q, k, v, causal, window, scale, tiles, **unsupported)
    (B, T, H, D), K = q.shape, k.shape[2]
    if 0 in (q.size, k.size):
        return jnp.zeros_like(q)
    tables = visible_tiles(mask, q_tile, k_tile)
    q_spec = pl.BlockSpec((None, None, q_tile, D), lambda b, h, n, i, j, flags: (b, h, i[n], 0))
    kv_spec = pl.BlockSpec((None, None, k_tile, D), lambda b, h, n, i, j, flags: (b, h // (H // K), j[n], 0))
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(tables),
        grid=(B, H, len(tables[0])),
        in_specs=[q_spec, kv_spec, kv_spec],
        out_specs=q_spec,
        scratch_shapes=[pltpu.VMEM((q_tile, n), jnp.float32) for n in (1, 1, D)],
    )
    kernel = pl.pallas_call(
        functools.partial(_kernel, mask=mask, scale=scale),
        out_shape=jax.ShapeDtypeStruct((B, H, T, D), q.dtype),
        grid_spec=grid_spec,
        name="tile_skipping",
        **call_options(),
    )
    return heads_first(kernel(*tables, heads_first(q), heads_first(k), heads_first(v)))


def visible_tiles(mask: Mask, q_tile: int, k_tile: int) -> np.ndarray:
    """Query tile, key tile and flags of each step. A query tile that sees no key keeps one step, to write zeros."""
    steps = []
    for i in range(-(-mask.T // q_tile)):
        q_start = mask.S - mask.T + i * q_tile
        q_last = min(q_start + q_tile, mask.S) - 1
        low, high = mask.visible_keys(q_start, q_last)
        k_tiles = range(max(low, 0) // k_tile, max(high, 0) // k_tile + 1)
        for j in k_tiles:
            # All queries of the tile see the keys that both its first and its last query see.
            (low, _), (_, high) = mask.visible_keys(q_last, q_last), mask.visible_keys(q_start, q_start)
            fully_visible = low <= j * k_tile and (j + 1) * k_tile - 1 <= high
            steps.append((i, j, FIRST * (j == k_tiles[0]) + LAST * (j == k_tiles[-1]) + MASKED * (not fully_visible)))
    return np.array(steps, np.int32).T


def _kernel(i_ref, j_ref, flag_ref, q_ref, k_ref, v_ref, o_ref, m_ref, l_ref, acc_ref, *, mask, scale) -> None:
    n = pl.program_id(2)
    i, j, flag = i_ref[n], j_ref[n], flag_ref[n]

    @pl.when(flag & FIRST != 0)
    def init_state() -> None:
        m_ref[...] = jnp.full(m_ref.shape, M_INIT, jnp.float32)
        l_ref[...] = jnp.zeros(l_ref.shape, jnp.float32)
        acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)

    def process_tile(masked: bool) -> None:
        s = dot(q_ref[...], k_ref[...], NT) * scale  # [q_tile, k_tile]
        v = v_ref[...]
        if masked:
            query = mask.S - mask.T + i * s.shape[0] + iota(s.shape, 0)
            s = mask.apply(s, query, j * s.shape[1] + iota(s.shape, 1))
            v = mask.zero_unseen(v, j * s.shape[1])
        m = jnp.maximum(jnp.max(s, axis=1, keepdims=True), m_ref[...])
        p = jnp.exp(s - m)
        decay = jnp.exp(m_ref[...] - m)  # rescales what was accumulated under a smaller maximum
        m_ref[...] = m
        l_ref[...] = decay * l_ref[...] + jnp.sum(p, axis=1, keepdims=True)
        acc_ref[...] = decay * acc_ref[...] + dot(p.astype(v.dtype), v, NN)

    pl.when(flag & MASKED != 0)(functools.partial(process_tile, masked=True))
    pl.when(flag & MASKED == 0)(functools.partial(process_tile, masked=False))

    @pl.when(flag & LAST != 0)
    def epilogue() -> None:
        l = l_ref[...]
        o_ref[...] = (acc_ref[...] / jnp.where(l == 0, 1, l)).astype(o_ref.dtype)  # l is 0 where a query sees no key
