"""The gradients of attention on Hopper: one kernel for dq, one for dk and dv, each over the visible blocks only.

Math      s = q k^T scale, or softcap tanh(q k^T scale / softcap);  p = 2^(s log2(e) - lse);  dv = p^T do
          ds = p (do v^T - delta), with a soft cap times 1 - (s / softcap)^2;  dq = scale ds k;  dk = scale ds^T q
Tiling    A thread block owns 128 queries (dq) or keys (dk, dv), 64 per consumer warpgroup, and loops over the visible
          blocks, while the producer warpgroup loads the next ones:

              keys ->                          keys ->
              128 queries  ▞ ░ ░ ░ ░           ▞ ░ ░ ░ ░
              128 queries  █ ▞ ░ ░ ░           █ ▞ ░ ░ ░       ▞ masked
              128 queries  ▞ █ ▞ ░ ░  -> dq    ▞ █ ▞ ░ ░       █ interior: no mask
              128 queries  ░ ▞ █ ▞ ░           ░ ▞ █ ▞ ░       ░ neither loaded nor computed
                                               |   v
                                                 dk, dv        of all G heads of the key head, one after the other

          Above D = 128, dk and dv of 64 keys fill the registers of two warpgroups: one owns dv and computes p, the
          other owns dk and receives p through shared memory.
State     The float32 accumulators are in registers. dk and dv transpose the scores, with keys as rows, so that p and ds
          go from registers into the next wgmma. No two thread blocks write the same output: no atomics, and runs are
          bit-equal.
Traffic   With n visible blocks: dq reads q and do once and n blocks of k and v; dk and dv read k and v once and n
          blocks of q and do. 14 D FLOPs per visible pair; a single kernel takes 10 D, but adds up dq in memory in an
          order that varies.
Limits    bfloat16 and float16; D a multiple of 16, up to 256. Any T and S: lengths are padded to multiples of 8
          tokens. Segment ids in any order; where they ascend, blocks of other segments are skipped and blocks of one
          segment apply no mask.
          Keys that no query sees must be finite: the caller zeroes them. A float16 cotangent is scaled by a power of
          two, because ds need not fit float16 where the gradients do; weights below 2^-14 lose precision there. do v^T
          must be finite, for hidden pairs too.
Source    Dao, FlashAttention-2 (arXiv:2307.08691), algorithm 2; Shah et al., FlashAttention-3 (arXiv:2407.08608).
"""

import jax
import jax.numpy as jnp

from dantinox.kernels.ops.attention import segment_ids
from dantinox.kernels.ops.attention.pallas_sm90.block_sizes import bwd_block_sizes
from dantinox.kernels.ops.attention.pallas_sm90.common import (
    BLOCK_ROWS,
    TMA_ROWS,
    BwdInputs,
    Segments,
    Sm90AttentionConfig,
)
from dantinox.kernels.ops.attention.pallas_sm90.dkv_kernel import block_kv, dkv
from dantinox.kernels.ops.attention.pallas_sm90.dq_kernel import dq

Array = jax.Array

LARGEST_DS = 2.0**14  # a rounded power of two may make it sqrt(2) times as large
PAD_TO = 128  # ids, lse and delta are padded to whole blocks


def backward(
    q: Array,
    k: Array,
    v: Array,
    do: Array,
    lse: Array,
    delta: Array,
    segments: Segments | None,
    config: Sm90AttentionConfig,
) -> tuple[Array, Array, Array]:
    """Return (dq, dk, dv), in the shapes of q, k and v.

    Args:
        q: queries [B, T, H, D].
        k: keys [B, S, K, D].
        v: values [B, S, K, D].
        do: cotangent of the ungated output [B, T, H, D], in q's dtype or in float32.
        lse: [B, H, T] float32, log2 of the sum of a row's 2^(s log2(e)); +inf where a row sees no key.
        delta: [B, H, T] float32, rowsum(do * o) less the cotangent of lse, o the ungated output.
        segments: (q_ids [B, T], kv_ids [B, S]) int32, or None.
        config: static parameters of the kernels.
    """
    unscale = None
    if q.dtype == jnp.float16:
        do, delta, unscale = _scale_cotangent(do.astype(jnp.float32), delta, v)
    q, do, k, v = (_pad_to_multiple(x, 1, TMA_ROWS) for x in (q, do, k, v))
    lse, delta = _pad_to_multiple(lse, 2, PAD_TO, jnp.inf), _pad_to_multiple(delta, 2, PAD_TO)
    inputs = BwdInputs(q, k, v, do.astype(q.dtype), lse, delta, unscale=unscale)
    dq_inputs = dkv_inputs = inputs
    if segments is not None:
        q_ids, kv_ids = (segment_ids.pad_ids_to_block(ids.astype(jnp.int32), PAD_TO) for ids in segments)
        D = q.shape[-1]
        sizes, inputs = bwd_block_sizes(D), inputs._replace(q_ids=q_ids, kv_ids=kv_ids)
        q_to_kv = segment_ids.kv_block_ranges(q_ids, BLOCK_ROWS, kv_ids, sizes.block_kv)
        kv_to_q = segment_ids.kv_block_ranges(kv_ids, block_kv(D), q_ids, sizes.block_q)
        dq_inputs, dkv_inputs = inputs._replace(segment_ranges=q_to_kv), inputs._replace(segment_ranges=kv_to_q)
    q_grad = dq(dq_inputs, config)
    k_grad, v_grad = dkv(dkv_inputs, config)
    return q_grad[:, : config.T], k_grad[:, : config.S], v_grad[:, : config.S]


def _scale_cotangent(do: Array, delta: Array, v: Array) -> tuple[Array, Array, Array]:
    """Scale do and delta by a power of two per sequence and key head, so that float16 holds ds; return its inverse too.

    |ds| <= |do v^T| + |delta| <= max|do| max|v| + max|delta|, by the inequality of Cauchy and Schwarz.
    """
    (B, T, H, D), K = do.shape, v.shape[2]
    do_norm = jnp.max(jnp.linalg.norm(do.reshape(B, T, K, H // K, D), axis=-1), axis=(1, 3))  # [B, K]
    v_norm = jnp.max(jnp.linalg.norm(v.astype(jnp.float32), axis=-1), axis=1)
    largest_delta = jnp.max(jnp.abs(delta).reshape(B, K, -1), axis=-1)
    bound = jnp.maximum(do_norm, do_norm * v_norm + largest_delta)
    power = jax.lax.reduce_precision(LARGEST_DS / jnp.where(bound == 0, LARGEST_DS, bound), 8, 0)
    per_head = jnp.repeat(power, H // K, axis=1)  # [B, H]
    return do * per_head[:, None, :, None], delta * per_head[:, :, None], 1 / power


def _pad_to_multiple(x: Array, axis: int, multiple: int, fill: float = 0) -> Array:
    padding = -x.shape[axis] % multiple
    widths = [(0, padding if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=fill) if padding else x
