"""Gradients of attention on Mosaic TPU, and interpreted on a CPU: dq, dk and dv in one pass over the visible blocks.

Math      with do' = do sigmoid(gate) and delta = rowsum(do' o'), o' the ungated output:
          p = 2^(s - m) / l;  dv = p^T do';  ds = p (do' v^T - delta);  dq = scale ds k;  dk = scale ds^T q
Tiling    the grid of `fwd.py`, once per span of keys:

              keys ->        span 0      span 1
              G x bq rows    ▞    ░    ░    ░       ▞ masked
              G x bq rows    █    ▞    ░    ░       █ interior
              G x bq rows    ▞    █    ▞    ░       ░ not in the grid
              G x bq rows    ░    ▞  | █    ▞       | dq of both spans is added at the end

State     dq [D, R] of one query block, dk and dv [D, span] of all keys of the span, in float32. The matmuls for dk and
          dv also sum over the G heads. Each output is written once: no atomics, and two runs are bit-equal.
Traffic   reads q, do and three numbers per row once per span, k (both ways) and v once per visible block. 10 D FLOPs
          per visible pair; two kernels, one for dq and one for dk and dv, would take 14 D and read everything twice.
Limits    as the forward kernel.
Source    Dao, FlashAttention-2 (arXiv:2307.08691), algorithm 2.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from dantinox.kernels.cost import Cost
from dantinox.kernels.ops.attention.pallas_tpu.block_call import (
    Operand,
    Output,
    ScratchShape,
    block_spec,
    pallas_call_over_blocks,
)
from dantinox.kernels.ops.attention.pallas_tpu.common import (
    NN,
    NT,
    AttentionKernelConfig,
    BlockContext,
    SegmentTables,
    dot_per_head,
    kv_spans,
)
from dantinox.kernels.ops.attention.pallas_tpu.refs import BlockRef, SubtileRef

Array = jax.Array
MIN_ROWS_PER_DOT, MAX_ROWS_PER_DOT = 32, 128  # in interpret mode
KEYS_IN_VREGS = 64  # keys of a subtile processed at a time, or registers spill


class QKVGradients(NamedTuple):
    """Gradients in the kernels' layout: dq as q, dk and dv [heads, key subtiles, D, keys]."""

    dq: Array
    dk: Array
    dv: Array


def _bwd_kernel(
    block: BlockContext,
    *,
    first_kv_block: int,
    q_ref: SubtileRef,
    do_ref: SubtileRef,
    m_ref: SubtileRef,
    inv_l_ref: SubtileRef,
    delta_ref: SubtileRef,
    k_ref: SubtileRef,
    v_ref: SubtileRef,
    k_transposed_ref: SubtileRef,
    dq_ref: BlockRef,
    dk_ref: BlockRef | None = None,
    dv_ref: BlockRef | None = None,
    dq_acc_ref: BlockRef,
    dk_acc_ref: BlockRef,
    dv_acc_ref: BlockRef,
    s_ref: SubtileRef,
    dp_ref: SubtileRef,
    p_ref: SubtileRef,
    ds_ref: SubtileRef,
) -> None:
    config = block.config
    num_q_subtiles, _ = config.num_subtiles
    # Compiled, dk and dv accumulate in scratch for the whole span; interpreted, in blocks of the output.
    acc_block = () if config.interpret else (block.kv_block - first_kv_block,)

    @pl.when(block.is_first_use_of_kv if config.interpret else block.step == 0)
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
        key_slices: list[tuple[Any, ...]] = [()]
        if not config.interpret:
            key_slices = [(pl.ds(i, step),) for i in range(0, block_kv_compute, step)]
        for r, c in block.subtiles():
            for key_slice in key_slices:
                s = s_ref.load(r, c, *key_slice)
                p = config.exp(s - m_ref.load(r)) * inv_l_ref.load(r)
                ds = p * dp_ref.load(r, c, *key_slice)
                if config.softcap is not None:
                    t = s * (1 / (config.softcap * config.score_scale))
                    ds = ds * (1 - jnp.minimum(t * t, 1))  # masked scores are below -softcap
                p_ref.store(p, r, c, *key_slice)
                ds_ref.store(ds, r, c, *key_slice)

    def accumulate_over_q(acc_ref: BlockRef, a_ref: SubtileRef, b_ref: SubtileRef) -> None:
        for r, c in block.subtiles():
            acc = acc_ref.load(*acc_block, c) + _dot_over_rows(a_ref.load(r), b_ref.load(r, c), config)
            acc_ref.store(acc, *acc_block, c)

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

    if dk_ref is not None and dv_ref is not None:

        @pl.when(block.step == pl.num_programs(1) - 1)
        def store_dk_dv() -> None:
            for out_ref, acc_ref, scale in ((dk_ref, dk_acc_ref, config.scale), (dv_ref, dv_acc_ref, 1)):
                out = out_ref.ref
                out[...] = (acc_ref.ref[...] * scale).reshape(out.shape).astype(out.dtype)


def _dot_over_rows(a: Array, b: Array, config: AttentionKernelConfig) -> Array:
    """a b^T.

    A CPU's matmul adds row after row to one float32, so in interpret mode each matmul gets few rows: T / 16, since the
    errors of plain jnp grow with T too.
    """
    rows = a.shape[-1]
    step = min(max(config.T // 16, MIN_ROWS_PER_DOT), MAX_ROWS_PER_DOT) if config.interpret else rows
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
    config: AttentionKernelConfig,
    *,
    cost: Cost,
) -> QKVGradients:
    """Runs the backward kernel, once per span of keys.

    Args:
        q: [heads, query subtiles, D, rows].
        k: [heads, key subtiles, keys, D].
        v: as k.
        do: cotangent of the ungated output, as q.
        m: [heads, query subtiles, 1, rows]; see `ForwardResult`.
        inv_l: as m.
        delta: row sums of do times the ungated output, as m.
        segments: segment ids, or None.
        config: what is known when the kernel is traced.
        cost: cost estimate of all spans for the compiler.

    Returns:
        The gradients of q, k and v.
    """
    D, sizes, (num_q_subtiles, num_kv_subtiles) = q.shape[2], config.block_sizes, config.num_subtiles
    rows, keys, kv_heads = sizes.block_q_compute, sizes.block_kv_compute, sizes.kv_heads
    inputs = {
        "q": Operand(q, "q"),
        "do": Operand(do, "q"),
        "m": Operand(m, "q"),
        "inv_l": Operand(inv_l, "q"),
        "delta": Operand(delta, "q"),
        "k": Operand(k, "kv", kv_axis=-2),
        "v": Operand(v, "kv", kv_axis=-2),
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
        dq_shape = jax.ShapeDtypeStruct((q.shape[0], q_end - q_start, *q.shape[2:]), dq_dtype)
        outputs = {"dq": Output(dq_shape, block_spec(config, "q", D, rows, first_block=q_start // num_q_subtiles))}
        scratch = {"dq_acc": ScratchShape((num_q_subtiles, D, rows), jnp.float32)}
        span_shape = ((span_end - span_start) * num_kv_subtiles, D, keys)
        for name in ("dk", "dv"):
            if config.interpret:
                acc_shape = jax.ShapeDtypeStruct((q.shape[0], *span_shape), jnp.float32)
                acc_spec = block_spec(config, "kv", D, keys, first_block=span_start)
                outputs[f"{name}_acc"] = Output(acc_shape, acc_spec)
            else:
                span_spec = pl.BlockSpec((kv_heads, *span_shape), lambda g, n, *_: (g, 0, 0, 0))
                outputs[name] = Output(jax.ShapeDtypeStruct((q.shape[0], *span_shape), k.dtype), span_spec)
                scratch[f"{name}_acc"] = ScratchShape((span_end - span_start, num_kv_subtiles, D, keys), jnp.float32)
        results = pallas_call_over_blocks(
            functools.partial(_bwd_kernel, first_kv_block=span_start),
            config,
            schedule,
            inputs,
            outputs,
            scratch,
            phase_scratch,
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
    if config.interpret:
        dk, dv = (dk * config.scale).astype(k.dtype), dv.astype(v.dtype)
    assert dq is not None
    return QKVGradients(dq.astype(q.dtype), dk, dv)


def _concatenate_spans(spans: list[Array]) -> Array:
    return spans[0] if len(spans) == 1 else jnp.concatenate(spans, 1)
