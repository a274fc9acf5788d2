"""Attention in Triton, backward: one kernel for dq, one for dk and dv, both without atomics.

Math      p = 2^(s - lse);  dv = p^T do;  dp = do v^T;  ds = p (dp - delta) cap'(s);  dq = scale ds k;
          dk = scale ds^T q.  do is the cotangent of the ungated output; delta [t] = <do[t], o[t]>.
Tiling    dq: a program per block of queries of one head, which loops over keys as the forward pass does.
          dk, dv: a program per block of keys of one key head; it loops over the G heads of its group and over the
          queries that see the block, so that the heads' sums need neither atomics nor a second pass.

              queries ->       0    1    2    3    4
              key block 0      ▞    █    ▞    ░    ░      ▞ masked: diagonal or window's edge
              key block 1      ░    ▞    █    ▞    ░      █ no mask is computed
              key block 2      ░    ░    ▞    █    ▞      ░ not visited

State     dq [block_q, D], or dk and dv [block_kv, D], in float32 registers.
Traffic   dq reads K and V once per query block and head; dk and dv read q, do, lse and delta once per key block. 10 D
          FLOPs per visible pair, and 4 D to compute s and dp a second time.
Limits    As the forward kernel. float16 is multiplied as TF32, which has its precision and float32's range: gradients
          of scores neither overflow nor vanish.
Source    Dao, FlashAttention-2 (arXiv:2307.08691), for the recomputation from lse and the two loops.
"""

import jax
import jax.numpy as jnp
import triton

from dantinox.kernels.ops.attention import segment_ids
from dantinox.kernels.ops.attention.triton.block_sizes import TritonBlockSizes, dkv_block_sizes, dq_block_sizes
from dantinox.kernels.ops.attention.triton.common import TritonAttentionConfig
from dantinox.kernels.ops.attention.triton.dkv_kernel import dkv_kernel
from dantinox.kernels.ops.attention.triton.dq_kernel import dq_kernel
from dantinox.kernels.triton_call import call_triton

Array = jax.Array
Segments = tuple[Array, Array]


def backward(
    q: Array,
    k: Array,
    v: Array,
    do: Array,
    lse: Array,
    delta: Array,
    segments: Segments | None,
    config: TritonAttentionConfig,
) -> tuple[Array, Array, Array]:
    """Return dq, dk and dv.

    Args:
        q: queries [B, T, H, D].
        k: keys [B, S, K, D].
        v: values [B, S, K, D].
        do: cotangent of the ungated output [B, T, H, D], in q's dtype or float32.
        lse: log2-sum-exp2 of the scores [B, H, T], float32.
        delta: inner products of output and cotangent, less the cotangent of the log-sum-exp, [B, H, T], float32.
        segments: (q_ids [B, T], kv_ids [B, S]) int32, or None.
        config: static parameters of the kernels.
    """
    B, T, H, D = q.shape
    S, K = k.shape[1:3]
    if q.dtype == jnp.float16:
        config = config._replace(precision="tf32")
    constants = config.constants(q, k, segments) | {"SCALE": config.scale}

    def call(kernel, sizes: TritonBlockSizes, out_type, grid: tuple[int, ...], ranges: Array):
        return call_triton(
            kernel,
            q,
            k,
            v,
            do,
            lse,
            delta,
            *((ranges, ranges) if segments is None else segments),
            ranges,
            out_type=out_type,
            grid=grid,
            capability=config.capability,
            num_warps=sizes.num_warps,
            num_stages=sizes.num_stages,
            name=f"attention_{kernel.__name__.removesuffix('_kernel')}",
            BLOCK_Q=sizes.block_q,
            BLOCK_KV=sizes.block_kv,
            **constants,
        )

    dq_sizes, dkv_sizes = dq_block_sizes(q.dtype, D), dkv_block_sizes(config.capability, q.dtype, D)
    dq_ranges = dkv_ranges = jnp.zeros(1, jnp.int32)
    if segments is not None:
        q_ids, kv_ids = segments
        dq_ranges = segment_ids.kv_block_ranges(q_ids, dq_sizes.block_q, kv_ids, dq_sizes.block_kv)
        dkv_ranges = segment_ids.kv_block_ranges(kv_ids, dkv_sizes.block_kv, q_ids, dkv_sizes.block_q)
    like_q, like_k = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k))
    dq = call(dq_kernel, dq_sizes, like_q, (H * triton.cdiv(T, dq_sizes.block_q) * B,), dq_ranges)
    kv_grid = (K * triton.cdiv(S, dkv_sizes.block_kv) * B,)
    dk, dv = call(dkv_kernel, dkv_sizes, (like_k, like_k), kv_grid, dkv_ranges)
    return dq, dk, dv
