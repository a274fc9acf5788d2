"""Step 8, phases: a step computes its scores in phases through scratch memory, so that the registers suffice.

Math      as step 6
Tiling    grid (B, K, visible tiles), as step 5. A tile is processed in subtiles of one head and SUBTILE queries, each
          phase over all subtiles before the next phase begins:

              keys ->       k_tile
              SUBTILE        [0]      phase 1   s = scale q k^T             matrix unit       s to scratch memory
              SUBTILE        [1]      phase 2   mask, where needed          vector unit       s
              SUBTILE        [2]      phase 3   m, l and p = exp(s - m)     vector unit       s to p, decay
              SUBTILE        [3]      phase 4   acc = decay acc + p v       matrix unit       p to acc

State     m, l and acc as step 5; within a step s [G q_tile, k_tile] in float32, p in the dtype of v, and decay
Traffic   HBM as step 6; VMEM: each score is written and read as s, 4 bytes, and as p, 2 in bfloat16
Limits    as step 6
Source    `kernels/ops/attention/pallas_tpu/common.py`, which processes its blocks so.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dantinox.kernels.tutorial.attention.common import M_INIT, NN, NT, Problem, call_options, differentiable, dot, iota
from dantinox.kernels.tutorial.attention.step4_tile_skipping import FIRST, LAST, MASKED, visible_tiles
from dantinox.kernels.tutorial.attention.step7_backward import backward

Array = jax.Array
SUBTILE = 128  # queries: 128 x 256 scores are 32 registers, half of the 64


def forward(q: Array, k: Array, v: Array, problem: Problem) -> tuple[Array, Array]:
    """Output [B, H, T, D] and lse [B, H, T, 1] of q [B, H, T, D], k and v [B, K, S, D]."""
    (B, H, T, D), K = q.shape, k.shape[1]
    G, (mask, scale, q_tile, k_tile) = H // K, problem
    tables, rows = visible_tiles(mask, q_tile, k_tile), G * q_tile
    q_spec, lse_spec = (
        pl.BlockSpec((None, G, q_tile, n), lambda b, h, n, i, j, flags: (b, h, i[n], 0)) for n in (D, 1)
    )
    kv_spec = pl.BlockSpec((None, None, k_tile, D), lambda b, h, n, i, j, flags: (b, h, j[n], 0))
    state = [pltpu.VMEM((rows, n), jnp.float32) for n in (1, 1, D)]
    between_phases = [
        pltpu.VMEM((rows, n), dtype) for n, dtype in ((k_tile, jnp.float32), (k_tile, v.dtype), (1, jnp.float32))
    ]
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(tables),
        grid=(B, K, len(tables[0])),
        in_specs=[q_spec, kv_spec, kv_spec],
        out_specs=[q_spec, lse_spec],
        scratch_shapes=[*state, *between_phases],
    )
    kernel = pl.pallas_call(
        functools.partial(_kernel, mask=mask, scale=scale),
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, H, T, 1), jnp.float32)],
        grid_spec=grid_spec,
        name="phases",
        **call_options(),
    )
    return kernel(*tables, q, k, v)


def _kernel(i_ref, j_ref, flag_ref, q_ref, k_ref, v_ref, *refs, mask, scale) -> None:
    o_ref, lse_ref, m_ref, l_ref, acc_ref, s_ref, p_ref, decay_ref = refs
    G, q_tile, _ = q_ref.shape
    n = pl.program_id(2)
    i, j, flag = i_ref[n], j_ref[n], flag_ref[n]
    step = math.gcd(SUBTILE, q_tile)
    subtiles = [(g, start, pl.ds(g * q_tile + start, step)) for g in range(G) for start in range(0, q_tile, step)]

    @pl.when(flag & FIRST != 0)
    def init_state() -> None:
        m_ref[...] = jnp.full(m_ref.shape, M_INIT, jnp.float32)
        l_ref[...] = jnp.zeros(l_ref.shape, jnp.float32)
        acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)

    # Conditions that always hold, and differ: they keep the compiler from interleaving or merging the phases.
    @pl.when(flag > -1)
    def compute_scores() -> None:
        for g, start, rows in subtiles:
            s_ref[rows] = dot(q_ref[g, pl.ds(start, step)], k_ref[...], NT) * scale

    @pl.when(flag & MASKED != 0)
    def apply_mask() -> None:
        for _, start, rows in subtiles:
            s = s_ref[rows]
            query = mask.S - mask.T + i * q_tile + start + iota(s.shape, 0)
            s_ref[rows] = mask.apply(s, query, j * s.shape[1] + iota(s.shape, 1))

    @pl.when(flag > -2)
    def softmax() -> None:
        for _, _, rows in subtiles:
            s = s_ref[rows]
            m = jnp.maximum(jnp.max(s, axis=1, keepdims=True), m_ref[rows])
            p = jnp.exp(s - m)
            decay = jnp.exp(m_ref[rows] - m)
            l_ref[rows] = decay * l_ref[rows] + jnp.sum(p, axis=1, keepdims=True)
            m_ref[rows], decay_ref[rows], p_ref[rows] = m, decay, p.astype(p_ref.dtype)

    @pl.when(flag > -3)
    def accumulate() -> None:
        v = mask.zero_unseen(v_ref[...], j * v_ref.shape[0])
        for _, _, rows in subtiles:
            acc_ref[rows] = decay_ref[rows] * acc_ref[rows] + dot(p_ref[rows], v, NN)

    @pl.when(flag & LAST != 0)
    def epilogue() -> None:
        l = jnp.where(l_ref[...] == 0, 1, l_ref[...])
        o_ref[...] = (acc_ref[...] / l).reshape(o_ref.shape).astype(o_ref.dtype)
        lse_ref[...] = (m_ref[...] + jnp.log(l)).reshape(lse_ref.shape)


attention = differentiable(forward, backward)
