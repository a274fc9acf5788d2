"""Step 6, log-sum-exp: the forward pass saves one number per row, from which a backward pass recomputes p.

Math      forward as step 5, and lse = m + log l. Then p = exp(s - lse) is final, without a maximum or a sum:

              delta = rowsum(do o)
              dv = p^T do;  ds = p (do v^T - delta);  dq = scale ds k;  dk = scale ds^T q

Tiling    grid (B, K, visible tiles), as step 5:

              keys ->     k_tile k_tile k_tile k_tile
              G x q_tile    ▞      ░      ░      ░       ▞ computed, then masked
              G x q_tile    █      ▞      ░      ░       █ interior, no mask is computed
              G x q_tile    ▞      █      ▞      ░       ░ not in the grid

State     as step 5
Traffic   as step 5, and lse: 4 bytes per row, instead of p: S elements per row. The gate moves behind the kernel, since
          its derivative needs the ungated output. The backward pass is plain jnp and has T S scores in memory.
Limits    float32, bfloat16; float16 only interpreted. Any T, S, H, K, D. Gate [B, T, H, D] or [B, T, H, 1], causal,
          window, scale; NotImplementedError: softcap, segment_ids. ValueError: other shapes and dtypes; rows or a
          k_tile that are not multiples of 16.
Source    Dao et al., FlashAttention (arXiv:2205.14135), algorithm 4; Rabe and Staats, arXiv:2112.05682.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dantinox.kernels.tutorial.attention.common import Problem, call_options, differentiable, iota
from dantinox.kernels.tutorial.attention.step4_tile_skipping import LAST, visible_tiles
from dantinox.kernels.tutorial.attention.step5_packed_gqa_gate import forward_kernel

Array = jax.Array


def forward(q: Array, k: Array, v: Array, problem: Problem) -> tuple[Array, Array]:
    """Output [B, H, T, D] and lse [B, H, T, 1] of q [B, H, T, D], k and v [B, K, S, D]."""
    (B, H, T, D), K = q.shape, k.shape[1]
    G, (_, _, q_tile, k_tile) = H // K, problem
    tables = visible_tiles(problem.mask, q_tile, k_tile)
    q_spec, lse_spec = (
        pl.BlockSpec((None, G, q_tile, n), lambda b, h, n, i, j, flags: (b, h, i[n], 0)) for n in (D, 1)
    )
    kv_spec = pl.BlockSpec((None, None, k_tile, D), lambda b, h, n, i, j, flags: (b, h, j[n], 0))
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(tables),
        grid=(B, K, len(tables[0])),
        in_specs=[q_spec, kv_spec, kv_spec],
        out_specs=[q_spec, lse_spec],
        scratch_shapes=[pltpu.VMEM((G * q_tile, n), jnp.float32) for n in (1, 1, D)],
    )
    kernel = pl.pallas_call(
        functools.partial(_kernel, mask=problem.mask, scale=problem.scale),
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, H, T, 1), jnp.float32)],
        grid_spec=grid_spec,
        name="log_sum_exp",
        **call_options(),
    )
    return kernel(*tables, q, k, v)


def _kernel(i_ref, j_ref, flag_ref, q_ref, k_ref, v_ref, o_ref, lse_ref, m_ref, l_ref, acc_ref, **problem) -> None:
    forward_kernel(i_ref, j_ref, flag_ref, q_ref, k_ref, v_ref, o_ref, m_ref, l_ref, acc_ref, **problem)

    @pl.when(flag_ref[pl.program_id(2)] & LAST != 0)
    def store_lse() -> None:
        l = l_ref[...]  # 0 where a query sees no key: lse is M_INIT there, and exp(-inf - M_INIT) is 0
        lse_ref[...] = (m_ref[...] + jnp.log(jnp.where(l == 0, 1, l))).reshape(lse_ref.shape)


def backward(problem: Problem, residuals: tuple[Array, ...], do: Array) -> tuple[Array, Array, Array]:
    """dq, dk and dv in plain jnp."""
    (q, k, v, o, lse), mask = residuals, problem.mask
    shape = (q.shape[0], k.shape[1], -1, *q.shape[2:])  # the heads of a group on an axis of their own
    delta = jnp.sum(do.astype(jnp.float32) * o, axis=-1, keepdims=True)
    q, do, lse, delta = (x.reshape(*shape[:-1], x.shape[-1]) for x in (q, do, lse, delta))
    k, v = mask.zero_unseen(k, 0), mask.zero_unseen(v, 0)
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    s = einsum("bkgtd,bksd->bkgts", q, k) * problem.scale
    s = mask.apply(s, mask.S - mask.T + iota(s.shape, 3), iota(s.shape, 4))
    p = jnp.exp(s - lse)
    ds = (p * (einsum("bkgtd,bksd->bkgts", do, v) - delta)).astype(q.dtype)
    dq = einsum("bkgts,bksd->bkgtd", ds, k).reshape(o.shape) * problem.scale
    dk = einsum("bkgts,bkgtd->bksd", ds, q) * problem.scale
    dv = einsum("bkgts,bkgtd->bksd", p.astype(do.dtype), do)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


attention = differentiable(forward, backward)
