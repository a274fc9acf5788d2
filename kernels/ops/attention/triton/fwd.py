"""Attention in Triton, forward: flash attention, one program per block of queries of one head.

Math      s = cap(scale q k^T) log2(e);  p = 2^(s - m);  o = sigmoid(gate) * sum(p v) / sum(p);  lse = m + log2(sum(p))
Tiling    One axis of programs: heads fastest, then query blocks from the last to the first, then sequences. The heads
          of a group run at the same time and share K and V in L2; the longest rows of a causal mask start first.

              keys ->          0    1    2    3    4
              query block 0    ▞    ░    ░    ░    ░      ▞ masked: diagonal or window's edge
              query block 1    █    ▞    ░    ░    ░      █ no mask is computed
              query block 2    ▞    █    ▞    ░    ░      ░ not visited

State     m, l [block_q] and the output [block_q, D] in float32 registers; K and V blocks in stages of shared memory.
Traffic   Reads q and gate and writes o once; reads K and V once per query block and head, most of it from L2. 4 D FLOPs
          per visible pair.
Limits    float32 (rounded to TF32, or in three passes where the matmul precision asks for it), bfloat16, float16; D up
          to 256, filled up to a power of two in registers; any T and S. `kernels.attention` raises the ValueErrors.
Source    Dao, FlashAttention-2 (arXiv:2307.08691), for the loop over keys with the output in registers.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from dantinox.kernels.ops.attention import segment_ids
from dantinox.kernels.ops.attention.triton.block_sizes import fwd_block_sizes
from dantinox.kernels.ops.attention.triton.common import (
    ELEMENTWISE_GATE,
    HEAD_GATE,
    NO_GATE,
    TritonAttentionConfig,
    load_block,
    loop_range,
    mask_scores,
    query_program,
    store_block,
    visible_keys,
)
from dantinox.kernels.triton_call import call_triton
from dantinox.kernels.triton_math import LOWEST, round_operand, scale_scores

Array = jax.Array
Segments = tuple[Array, Array]


@triton.jit
def attend(
    acc,
    m,
    l,
    q_block,
    k,
    v,
    position,
    q_segment,
    kv_ids,
    start,
    end,
    S: tl.constexpr,
    D: tl.constexpr,
    STRIDE: tl.constexpr,
    D_BLOCK: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
    CAP: tl.constexpr,
    FACTOR: tl.constexpr,
    BOUND: tl.constexpr,
    CAPPED: tl.constexpr,
    INTERIOR: tl.constexpr,
):
    """Add the keys of [start, end) to the output, the maximum and the sum of a query block."""
    for kv_start in tl.range(start, end, BLOCK_KV):
        k_block = round_operand(load_block(k, kv_start, S, STRIDE, D, BLOCK_KV, D_BLOCK, INTERIOR), PRECISION)
        s = tl.dot(q_block, tl.trans(k_block), input_precision=PRECISION)
        s = scale_scores(s, CAP, FACTOR, BOUND, CAPPED)
        if not INTERIOR:
            key = kv_start + tl.arange(0, BLOCK_KV)
            kv_segment = key
            if SEGMENTS:
                kv_segment = tl.load(kv_ids + key, mask=key < S, other=0)
            s = mask_scores(
                s, position[:, None], key[None, :], q_segment[:, None], kv_segment[None, :], S, CAUSAL, WINDOW, SEGMENTS
            )
        new_m = tl.maximum(m, tl.max(s, axis=1))
        p = tl.exp2(s - new_m[:, None])
        decay = tl.exp2(m - new_m)
        m = new_m
        l = l * decay + tl.sum(p, axis=1)
        v_block = round_operand(load_block(v, kv_start, S, STRIDE, D, BLOCK_KV, D_BLOCK, INTERIOR), PRECISION)
        p = round_operand(p.to(v_block.dtype), PRECISION)
        acc = tl.dot(p, v_block, acc * decay[:, None], input_precision=PRECISION)
    return acc, m, l


@triton.jit
def forward_kernel(
    q,
    k,
    v,
    gate,
    q_ids,
    kv_ids,
    ranges,
    T: tl.constexpr,
    S: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    D_BLOCK: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
    CAP: tl.constexpr,
    FACTOR: tl.constexpr,
    BOUND: tl.constexpr,
    CAPPED: tl.constexpr,
    GATE: tl.constexpr,
    o,
    lse,
):
    """Compute one block of queries of one head."""
    Q_BLOCKS: tl.constexpr = (T + BLOCK_Q - 1) // BLOCK_Q
    sequence, h, q_block_index = query_program(T, H, BLOCK_Q)
    q_start = q_block_index * BLOCK_Q
    t = q_start + tl.arange(0, BLOCK_Q)

    query = (sequence * T * H + h) * D
    key = (sequence * S * K + h // (H // K)) * D
    q_ids += sequence * T
    kv_ids += sequence * S
    ranges += (sequence * Q_BLOCKS + q_block_index) * 4

    q_block = round_operand(load_block(q + query, q_start, T, H * D, D, BLOCK_Q, D_BLOCK, False), PRECISION)
    q_segment = t
    if SEGMENTS:
        q_segment = tl.load(q_ids + t, mask=t < T, other=0)
    start, interior_start, interior_end, end = visible_keys(
        q_start, ranges, T, S, BLOCK_Q, BLOCK_KV, CAUSAL, WINDOW, SEGMENTS
    )
    acc = tl.zeros((BLOCK_Q, D_BLOCK), tl.float32)
    m = tl.full((BLOCK_Q,), LOWEST, tl.float32)
    l = tl.zeros((BLOCK_Q,), tl.float32)
    for part in tl.static_range(3):
        first, last = loop_range(part, start, interior_start, interior_end, end)
        if part > 0 or WINDOW > 0 or SEGMENTS:
            acc, m, l = attend(
                acc, m, l, q_block, k + key, v + key, t + (S - T), q_segment, kv_ids, first, last, S, D, K * D,
                D_BLOCK, BLOCK_KV, CAUSAL, WINDOW, SEGMENTS, PRECISION, CAP, FACTOR, BOUND, CAPPED, part == 1,
            )  # fmt: skip
    sees_key = l > 0
    acc = acc / tl.where(sees_key, l, 1.0)[:, None]
    if GATE == HEAD_GATE:
        logit = tl.load(gate + (sequence * T + t) * H + h, mask=t < T, other=0.0).to(tl.float32)
        acc *= tl.sigmoid(logit)[:, None]
    if GATE == ELEMENTWISE_GATE:
        logits = load_block(gate + query, q_start, T, H * D, D, BLOCK_Q, D_BLOCK, False).to(tl.float32)
        acc *= tl.sigmoid(logits)
    store_block(o + query, acc, q_start, T, H * D, D, BLOCK_Q, D_BLOCK)
    # A row without a key has the largest lse, so that the backward pass gives it weights of zero.
    row_lse = tl.where(sees_key, m + tl.log2(tl.where(sees_key, l, 1.0)), -LOWEST)
    tl.store(lse + (sequence * H + h) * T + t, row_lse, mask=t < T)


def forward(
    q: Array, k: Array, v: Array, gate: Array | None, segments: Segments | None, config: TritonAttentionConfig
) -> tuple[Array, Array]:
    """Return the output [B, T, H, D] and the log2-sum-exp2 of the scores [B, H, T] in float32.

    Args:
        q: queries [B, T, H, D].
        k: keys [B, S, K, D].
        v: values [B, S, K, D].
        gate: logits [B, T, H, D] or [B, T, H, 1], or None.
        segments: (q_ids [B, T], kv_ids [B, S]) int32, or None.
        config: static parameters of the kernel.
    """
    B, T, H, D = q.shape
    sizes = fwd_block_sizes(config.capability, q.dtype, D)
    block_q, block_kv = sizes.block_q, sizes.block_kv
    gate_kind = NO_GATE if gate is None else HEAD_GATE if gate.shape[-1] == 1 else ELEMENTWISE_GATE
    q_ids = kv_ids = ranges = jnp.zeros(1, jnp.int32)
    if segments is not None:
        q_ids, kv_ids = segments
        ranges = segment_ids.kv_block_ranges(q_ids, block_q, kv_ids, block_kv)
    constants = config.constants(q, k, segments)
    del constants["INVERSE"]
    return call_triton(
        forward_kernel,
        q,
        k,
        v,
        q if gate is None else gate,
        q_ids,
        kv_ids,
        ranges,
        out_type=(jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, H, T), jnp.float32)),
        grid=(H * triton.cdiv(T, block_q) * B,),
        capability=config.capability,
        num_warps=sizes.num_warps,
        num_stages=sizes.num_stages,
        name="attention_forward",
        BLOCK_Q=block_q,
        BLOCK_KV=block_kv,
        GATE=gate_kind.value,
        **constants,
    )
