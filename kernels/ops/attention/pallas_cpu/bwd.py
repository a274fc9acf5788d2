"""Gradients of attention in a form that is fast to interpret on a CPU: one pass over the visible blocks.

Math      with do' = do sigmoid(gate) and delta = rowsum(do' o'), o' the ungated output:
          p = e^(s - m) / l;  dv = p^T do';  ds = p (do' v^T - delta);  dq = scale ds k;  dk = scale ds^T q
Tiling    grid (groups of heads, visible blocks); a step computes and masks all scores of its block:

              keys ->        bk   bk   bk   bk
              G x bq rows    ▞    ░    ░    ░       ▞ █ a step
              G x bq rows    █    ▞    ░    ░       ░ not in the grid
              G x bq rows    ▞    █    ▞    ░

State     dq [D, R] of one query block per head, in scratch memory; dk and dv of all keys, in the outputs: a step adds
          to the blocks of its keys. All in float32.
Traffic   that of the TPU kernel with one span of keys; a step also copies its blocks.
Limits    as the forward kernel.
Source    that of the TPU kernel.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from dantinox.kernels.cost import Cost
from dantinox.kernels.ops.attention.common import MASK_VALUE, NN, NT, QKVGradients, SegmentTables, dot_per_head
from dantinox.kernels.ops.attention.pallas_cpu.common import (
    BlockStep,
    CpuAttentionConfig,
    Ref,
    block_scratch,
    call_over_blocks,
    kv_block_spec,
    q_block_spec,
)
from dantinox.kernels.softcap import cap_derivative
from dantinox.kernels.vma import varying_shape

Array = jax.Array
MIN_ROWS_PER_DOT, MAX_ROWS_PER_DOT = 32, 128


class BwdInputs(NamedTuple):
    """Inputs of the backward kernel: arrays, or references to them."""

    q: Any
    do: Any
    m: Any
    inv_l: Any
    delta: Any
    k: Any
    v: Any
    k_transposed: Any
    segments: SegmentTables | None


def _bwd_kernel(step: BlockStep, inputs: BwdInputs, gradients: QKVGradients, dq_acc_ref: Ref) -> None:
    config = step.config

    @pl.when(step.is_first_use_of_kv)
    def init_dk_dv() -> None:
        gradients.dk[...] = jnp.zeros(gradients.dk.shape, gradients.dk.dtype)
        gradients.dv[...] = jnp.zeros(gradients.dv.shape, gradients.dv.dtype)

    @pl.when(step.is_first_kv_block)
    def init_dq() -> None:
        dq_acc_ref[...] = jnp.zeros(dq_acc_ref.shape, dq_acc_ref.dtype)

    q, do = step.load_q(inputs.q), step.load_q(inputs.do)
    s = step.masked_scores(step.load_kv(inputs.k), q, inputs.segments)
    p = jnp.exp(s - step.load_q(inputs.m)) * step.load_q(inputs.inv_l)
    dp = dot_per_head(step.load_kv(inputs.v), do, NN) - step.load_q(inputs.delta)
    ds = p * dp
    if config.softcap is not None:
        ds = ds * cap_derivative(s, softcap=config.softcap)
    ds = jnp.where(s == MASK_VALUE, 0, ds)  # there dp may be infinite: v is another query's
    p, ds = p.astype(q.dtype), ds.astype(q.dtype)
    gradients.dv[...] += _dot_over_rows(do, p, config.T)
    gradients.dk[...] += _dot_over_rows(q, ds, config.T)
    dq_acc_ref[...] += dot_per_head(step.load_kv(inputs.k_transposed), ds, NN)

    @pl.when(step.is_last_kv_block)
    def store_dq() -> None:
        gradients.dq[...] = (dq_acc_ref[...] * config.scale).astype(gradients.dq.dtype)


def _dot_over_rows(a: Array, b: Array, T: int) -> Array:
    """Compute a b^T, summed over the rows in parts.

    A CPU's matmul adds row after row to one float32, so each matmul gets few rows: T / 16, since the errors of plain
    jnp grow with T too.
    """
    rows = a.shape[-1]
    step = min(max(T // 16, MIN_ROWS_PER_DOT), MAX_ROWS_PER_DOT)
    products = [dot_per_head(a[..., i : i + step], b[..., i : i + step], NT) for i in range(0, rows, step)]
    return functools.reduce(jnp.add, products)


def attention_bwd(
    q: Array,
    k: Array,
    v: Array,
    do: Array,
    m: Array,
    inv_l: Array,
    delta: Array,
    segments: SegmentTables | None,
    config: CpuAttentionConfig,
    *,
    cost: Cost,
) -> QKVGradients:
    """Run the backward kernel.

    Args:
        q: [heads, query blocks, D, rows].
        k: [heads, key blocks, keys, D].
        v: [heads, key blocks, keys, Dv].
        do: cotangent of the ungated output [heads, query blocks, Dv, rows].
        m: [heads, query blocks, 1, rows]; see `ForwardResult`.
        inv_l: as m.
        delta: row sums of do times the ungated output, less the cotangent of the log-sum-exp, as m.
        segments: segment ids, or None.
        config: static parameters of the kernel.
        cost: cost estimate for the compiler.

    Returns:
        The gradients of q, k and v.
    """
    k_transposed = k.swapaxes(-1, -2)
    gradients = QKVGradients(
        varying_shape(q.shape, q.dtype, q, k),
        varying_shape(k_transposed.shape, jnp.float32, q, k),
        varying_shape((*v.shape[:2], v.shape[3], v.shape[2]), jnp.float32, q, k),
    )
    dq, dk, dv = call_over_blocks(
        _bwd_kernel,
        config,
        config.block_schedule(),
        BwdInputs(q, do, m, inv_l, delta, k, v, k_transposed, segments),
        gradients,
        QKVGradients(
            q_block_spec(config, gradients.dq),
            kv_block_spec(config, gradients.dk),
            kv_block_spec(config, gradients.dv),
        ),
        [block_scratch(config, *q.shape[2:])],
        name="attention_backward",
        cost=cost,
    )
    dk, dv = dk.swapaxes(-1, -2), dv.swapaxes(-1, -2)
    return QKVGradients(dq, (dk * config.scale).astype(k.dtype), dv.astype(v.dtype))
