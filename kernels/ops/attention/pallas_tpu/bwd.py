"""Gradients of attention on Mosaic TPU: dq, dk and dv in one pass over the visible blocks.

Math      with do' = do sigmoid(gate) and delta = rowsum(do' o'), o' the ungated output:
          p = 2^(s - m) / l;  dv = p^T do';  ds = p (do' v^T - delta);  dq = scale ds k;  dk = scale ds^T q
Tiling    the grid of `fwd.py`, once per span of keys:

              keys ->        span 0      span 1
              G x bq rows    ▞    ░    ░    ░       ▞ masked
              G x bq rows    █    ▞    ░    ░       █ interior
              G x bq rows    ▞    █    ▞    ░       ░ not in the grid
              G x bq rows    ░    ▞  | █    ▞       | dq is summed over the spans at the end

State     dq [D, R] of one query block, dk and dv [D, span] of all keys of the span, in float32. The matmuls for dk and
          dv also sum over the G heads. Each output is written once: no atomics, and two runs are bit-equal.
Traffic   reads q, do and three numbers per row once per span, k (also transposed) and v once per visible block.
          10 D FLOPs per visible pair; two kernels, one for dq and one for dk and dv, would take 14 D and read
          everything twice.
Limits    as the forward kernel.
Source    Dao, FlashAttention-2 (arXiv:2307.08691), algorithm 2.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from dantinox.kernels.cost import Cost
from dantinox.kernels.mosaic_tpu import in_32_bits
from dantinox.kernels.ops.attention.common import (
    NN,
    NT,
    AttentionConfig,
    QKVGradients,
    SegmentTables,
    dot_per_head,
)
from dantinox.kernels.ops.attention.pallas_tpu.block_call import (
    Operand,
    Output,
    ScratchShape,
    block_spec,
    pallas_call_over_blocks,
)
from dantinox.kernels.ops.attention.pallas_tpu.block_sizes import TpuBlockSizes
from dantinox.kernels.ops.attention.pallas_tpu.common import LOG2E, BlockContext, kv_spans
from dantinox.kernels.ops.attention.pallas_tpu.refs import BlockRef
from dantinox.kernels.softcap import cap_derivative
from dantinox.kernels.vma import varying_shape

Array = jax.Array
KEYS_IN_VREGS = 64  # keys of a subtile processed at a time, or registers spill


def _bwd_kernel(
    block: BlockContext,
    *,
    first_kv_block: int,
    q_ref: BlockRef,
    do_ref: BlockRef,
    m_ref: BlockRef,
    inv_l_ref: BlockRef,
    delta_ref: BlockRef,
    k_ref: BlockRef,
    v_ref: BlockRef,
    k_transposed_ref: BlockRef,
    dq_ref: BlockRef,
    dk_ref: BlockRef,
    dv_ref: BlockRef,
    dq_acc_ref: BlockRef,
    dk_acc_ref: BlockRef,
    dv_acc_ref: BlockRef,
    s_ref: BlockRef,
    dp_ref: BlockRef,
    p_ref: BlockRef,
    ds_ref: BlockRef,
) -> None:
    config = block.config
    num_q_subtiles, _ = config.num_subtiles
    span_block = block.kv_block - first_kv_block

    @pl.when(block.step == 0)
    def init_dk_dv() -> None:
        dk_acc_ref.fill(0)
        dv_acc_ref.fill(0)

    @pl.when(block.is_first_kv_block)
    def init_dq() -> None:
        dq_acc_ref.fill(0)

    @block.run_phase
    def compute_scores_and_dp() -> None:
        for r, c in block.subtiles():
            s_ref.store(block.scores(dot_per_head(k_ref.load(c), q_ref.load(r), NN)), r, c)
            dp_ref.store(dot_per_head(v_ref.load(c), do_ref.load(r), NN) - delta_ref.load(r), r, c)

    block.apply_mask(s_ref)

    @block.run_phase
    def compute_p_and_ds() -> None:
        block_kv_compute = config.block_sizes.block_kv_compute
        step = min(KEYS_IN_VREGS, block_kv_compute)
        for r, c in block.subtiles():
            for start in range(0, block_kv_compute, step):
                keys = pl.ds(start, step)
                s = s_ref.load(r, c, keys)
                p = jnp.exp2(s - m_ref.load(r)) * inv_l_ref.load(r)
                ds = p * dp_ref.load(r, c, keys)
                if config.softcap is not None:
                    ds = ds * cap_derivative(s, softcap=config.softcap, unit=LOG2E)
                p_ref.store(p, r, c, keys)
                ds_ref.store(ds, r, c, keys)

    def accumulate_over_q(acc_ref: BlockRef, a_ref: BlockRef, b_ref: BlockRef) -> None:
        for r, c in block.subtiles():
            acc = acc_ref.load(span_block, c) + dot_per_head(a_ref.load(r), b_ref.load(r, c), NT)
            acc_ref.store(acc, span_block, c)

    @block.run_phase
    def accumulate_dv() -> None:
        accumulate_over_q(dv_acc_ref, do_ref, p_ref)

    @block.run_phase
    def accumulate_dk() -> None:
        accumulate_over_q(dk_acc_ref, q_ref, ds_ref)

    @block.run_phase
    def accumulate_dq() -> None:
        block.accumulate_over_keys(dq_acc_ref, k_transposed_ref, ds_ref)

    @pl.when(block.is_last_kv_block)
    def store_dq() -> None:
        for r in range(num_q_subtiles):
            dq_ref.store(dq_acc_ref.load(r) * config.scale, r)

    @pl.when(block.step == pl.num_programs(1) - 1)
    def store_dk_dv() -> None:
        for out_ref, acc_ref, scale in ((dk_ref, dk_acc_ref, config.scale), (dv_ref, dv_acc_ref, 1)):
            out = out_ref.ref
            out[...] = (acc_ref.ref[...] * scale).reshape(out.shape).astype(out.dtype)


@in_32_bits
def attention_bwd(
    q: Array,
    k: Array,
    v: Array,
    do: Array,
    m: Array,
    inv_l: Array,
    delta: Array,
    segments: SegmentTables | None,
    config: AttentionConfig[TpuBlockSizes],
    *,
    cost: Cost,
) -> QKVGradients:
    """Run the backward kernel, once per span of keys.

    Args:
        q: [heads, query subtiles, D, rows].
        k: [heads, key subtiles, keys, D].
        v: as k.
        do: cotangent of the ungated output, as q.
        m: [heads, query subtiles, 1, rows]; see `ForwardResult`.
        inv_l: as m.
        delta: row sums of do times the ungated output, as m.
        segments: segment ids, or None.
        config: static parameters of the kernel.
        cost: cost estimate of all spans for the compiler.

    Returns:
        The gradients of q, k and v.
    """
    D, sizes, (num_q_subtiles, num_kv_subtiles) = q.shape[2], config.block_sizes, config.num_subtiles
    rows, keys = sizes.block_q_compute, sizes.block_kv_compute
    inputs = {
        "q": Operand(q, "q"),
        "do": Operand(do, "q"),
        "m": Operand(m, "q"),
        "inv_l": Operand(inv_l, "q"),
        "delta": Operand(delta, "q"),
        "k": Operand(k, "kv"),
        "v": Operand(v, "kv"),
        "k_transposed": Operand(k.swapaxes(-1, -2), "kv"),
    }
    subtile_shape = (num_q_subtiles, num_kv_subtiles, keys, rows)
    phase_scratch = {
        "s": ScratchShape(subtile_shape, jnp.float32),
        "dp": ScratchShape(subtile_shape, jnp.float32),
        "p": ScratchShape(subtile_shape, q.dtype),
        "ds": ScratchShape(subtile_shape, q.dtype),
    }
    schedules = {span: config.block_schedule(span) for span in kv_spans(config)}
    num_blocks = sum(map(len, schedules.values()))
    dq, dk_spans, dv_spans = None, [], []
    for span, schedule in schedules.items():
        span_start, span_end = span or (0, k.shape[1] // num_kv_subtiles)
        q_start, q_end = int(schedule.q.min()) * num_q_subtiles, (int(schedule.q.max()) + 1) * num_q_subtiles
        dq_dtype = q.dtype if span is None else jnp.float32
        dq_shape = varying_shape((q.shape[0], q_end - q_start, *q.shape[2:]), dq_dtype, q, k)
        outputs = {"dq": Output(dq_shape, block_spec(config, "q", D, rows, first_block=q_start // num_q_subtiles))}
        scratch = {"dq_acc": ScratchShape((num_q_subtiles, D, rows), jnp.float32)}
        span_shape = ((span_end - span_start) * num_kv_subtiles, D, keys)
        span_spec = pl.BlockSpec((1, *span_shape), lambda g, n, *_: (g, 0, 0, 0))
        for name in ("dk", "dv"):
            outputs[name] = Output(varying_shape((q.shape[0], *span_shape), k.dtype, q, k), span_spec)
            scratch[f"{name}_acc"] = ScratchShape((span_end - span_start, num_kv_subtiles, D, keys), jnp.float32)
        results = pallas_call_over_blocks(
            functools.partial(_bwd_kernel, first_kv_block=span_start),
            config,
            schedule,
            inputs,
            outputs,
            scratch | phase_scratch,
            segments=segments,
            name="attention_backward",
            cost=cost.scaled(len(schedule) / num_blocks),
        )
        dq_span, dk, dv = results.values()
        if span is None:
            dq = dq_span
        else:
            dq = jnp.zeros(q.shape, jnp.float32) if dq is None else dq
            dq = dq.at[:, q_start:q_end].add(dq_span)
        dk_spans.append(dk)
        dv_spans.append(dv)
    dk, dv = _concatenate_spans(dk_spans), _concatenate_spans(dv_spans)
    assert dq is not None
    return QKVGradients(dq.astype(q.dtype), dk, dv)


def _concatenate_spans(spans: list[Array]) -> Array:
    return spans[0] if len(spans) == 1 else jnp.concatenate(spans, 1)
