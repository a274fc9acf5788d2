"""Attention in a form that is fast to interpret on a CPU: flash attention over the visible blocks only.

Math      s = cap(scale q k^T);  p = e^(s - m);  o = sigmoid(gate) * sum(p v) / sum(p)
Tiling    grid (groups of heads, visible blocks), as in `pallas_tpu/fwd.py`, but in large blocks: a step computes
          and masks all scores of its block. Under a window one step processes all key blocks that a query block sees:

              keys ->        bk   bk   bk   bk
              G x bq rows    [▞    ░]   ░    ░       [ ] one step
              G x bq rows    [█    ▞]   ░    ░       ░ outside a step: neither read nor computed
              G x bq rows     ░   [█    ▞]   ░

State     m, l [1, R] and the output [D, R] of one query block per head, in float32.
Traffic   that of the TPU kernel; a step also copies its blocks of q, k and v.
Limits    float32, bfloat16, and float16, which is computed in float32; any T, S, H, K, D and softcap. Float32 must hold
          the scores and, for gradients, do v^T, times the scale too. `dantinox.kernels.attention` raises
          ValueError.
Source    that of the TPU kernel.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from dantinox.kernels.cost import Cost
from dantinox.kernels.ops.attention.common import M_INIT, NN, ForwardResult, SegmentTables, dot_per_head
from dantinox.kernels.ops.attention.pallas_cpu.common import (
    BlockStep,
    CpuAttentionConfig,
    Ref,
    block_scratch,
    call_over_blocks,
    merge_kv_blocks,
    q_block_spec,
)
from dantinox.kernels.vma import varying_shape

Array = jax.Array


class FwdInputs(NamedTuple):
    """Inputs of the forward kernel: arrays, or references to them."""

    q: Any
    k: Any
    v: Any
    gate: Any
    segments: SegmentTables | None


def _fwd_kernel(
    step: BlockStep, inputs: FwdInputs, outputs: ForwardResult, m_ref: Ref, l_ref: Ref, acc_ref: Ref
) -> None:
    @pl.when(step.is_first_kv_block)
    def init_state() -> None:
        m_ref[...] = jnp.full(m_ref.shape, M_INIT, m_ref.dtype)
        l_ref[...] = jnp.zeros(l_ref.shape, l_ref.dtype)
        acc_ref[...] = jnp.zeros(acc_ref.shape, acc_ref.dtype)

    s = step.masked_scores(step.load_kv(inputs.k, kv_axis=-2), step.load_q(inputs.q), inputs.segments)
    m_prev = m_ref[...]
    m = jnp.maximum(m_prev, jnp.max(s, axis=-2, keepdims=True))
    p, decay = jnp.exp(s - m), jnp.exp(m_prev - m)
    m_ref[...] = m
    l_ref[...] = decay * l_ref[...] + jnp.sum(p, axis=-2, keepdims=True)
    v = step.load_kv(inputs.v)
    acc_ref[...] = decay * acc_ref[...] + dot_per_head(v, p.astype(v.dtype), NN)

    @pl.when(step.is_last_kv_block)
    def epilogue() -> None:
        l = l_ref[...]
        sees_no_key = l == 0
        safe_l = jnp.where(sees_no_key, 1.0, l)
        o = acc_ref[...] / safe_l
        if outputs.o_ungated is not None:
            outputs.o_ungated[...] = o.astype(outputs.o_ungated.dtype)
        if inputs.gate is not None:
            o = o * jax.nn.sigmoid(step.load_q(inputs.gate).astype(jnp.float32))
        outputs.o[...] = o.astype(outputs.o.dtype)
        if outputs.m is not None:
            outputs.m[...] = m_ref[...]
            outputs.inv_l[...] = jnp.where(sees_no_key, 0.0, 1 / safe_l)


def attention_fwd(
    q: Array,
    k: Array,
    v: Array,
    gate: Array | None,
    segments: SegmentTables | None,
    config: CpuAttentionConfig,
    *,
    residuals: bool,
    lse: bool,
    cost: Cost,
) -> ForwardResult:
    """Run the forward kernel.

    Args:
        q: [heads, query blocks, D, rows].
        k: [heads, key blocks, keys, D].
        v: [heads, key blocks, keys, Dv].
        gate: [heads, query blocks, Dv, rows], or [heads, query blocks, 1, rows], or None.
        segments: segment ids, or None.
        config: static parameters of the kernel.
        residuals: whether to write all residuals of the backward pass.
        lse: whether to write the log-sum-exp, which is one of them, in any case.
        cost: cost estimate for the compiler.

    Returns:
        The output and what was requested.
    """
    *blocks, _, rows = q.shape
    Dv = v.shape[-1]
    v = v.swapaxes(-1, -2)
    o = varying_shape((*blocks, Dv, rows), q.dtype, q, k)
    row = varying_shape((*blocks, 1, rows), jnp.float32, q, k)
    outputs = ForwardResult(o)
    if residuals or lse:
        outputs = outputs._replace(m=row, inv_l=row)
    if residuals and gate is not None:
        outputs = outputs._replace(o_ungated=o)
    schedule, kv_blocks_per_step = config.block_schedule(), config.block_sizes.kv_blocks_per_step
    if kv_blocks_per_step > 1:
        schedule = merge_kv_blocks(schedule, k.shape[1], kv_blocks_per_step)
    result = call_over_blocks(
        _fwd_kernel,
        config,
        schedule,
        FwdInputs(q, k, v, gate, segments),
        outputs,
        jax.tree.map(functools.partial(q_block_spec, config), outputs),
        [block_scratch(config, 1, rows), block_scratch(config, 1, rows), block_scratch(config, Dv, rows)],
        num_kv_blocks=kv_blocks_per_step,
        name="attention_forward",
        cost=cost,
    )
    return result._replace(o_ungated=result.o) if residuals and gate is None else result
