"""Gradients of attention on Mosaic TPU: dq, dk and dv in one pass over the visible blocks.

Math      with do' = do sigmoid(gate) and delta = rowsum(do' o'), o' the ungated output:
          p = 2^(s - m) / l;  dv = p^T do';  ds = p (do' v^T - delta);  dq = scale ds k;  dk = scale ds^T q
Tiling    the grid of `fwd.py`, once per span of keys:

              keys ->        span 0      span 1
              G x bq rows    ▞    ░    ░    ░       ▞ masked
              G x bq rows    █    ▞    ░    ░       █ interior
              G x bq rows    ▞    █    ▞    ░       ░ not in the grid
              G x bq rows    ░    ▞  | █    ▞       | span 1 begins with the dq of span 0

State     dq [D, R] of one query block, dk and dv [D, span] of all keys of the span, in float32. The matmuls for dk and
          dv also sum over the G heads. Each output is written once: no atomics, and two runs are bit-equal. A query
          block that sees keys of two spans passes its dq from one to the next in float32.
Layout    as in `fwd.py`. The transposes of q and do are made once per query block, that of k in every step; dq, dk and
          dv are transposed before they are written.
Traffic   reads q, do and three numbers per row once per span, k and v once per visible block; writes and reads dq in
          float32 where two spans meet. 10 D FLOPs per visible pair; two kernels, one for dq and one for dk and dv,
          would take 14 D and read everything twice.
Limits    as the forward kernel.
Source    Dao, FlashAttention-2 (arXiv:2307.08691), algorithm 2.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from dantinox.kernels.cost import Cost
from dantinox.kernels.mosaic_tpu import in_32_bits
from dantinox.kernels.ops.attention.common import (
    NT,
    AttentionConfig,
    QKVGradients,
    SegmentTables,
    dot_per_head,
)
from dantinox.kernels.ops.attention.pallas_tpu.block_call import (
    Blocked,
    QBlockRange,
    ScratchShape,
    key_blocks,
    pallas_call_over_blocks,
    query_blocks,
    row_blocks,
)
from dantinox.kernels.ops.attention.pallas_tpu.block_sizes import TpuBlockSizes
from dantinox.kernels.ops.attention.pallas_tpu.common import LOG2E, BlockContext, KvSpan, kv_spans
from dantinox.kernels.ops.attention.pallas_tpu.refs import BlockRef
from dantinox.kernels.softcap import cap_derivative
from dantinox.kernels.vma import varying_shape

Array = jax.Array
KEYS_IN_VREGS = 64  # keys of a subtile processed at a time, or registers spill


def _bwd_kernel(
    block: BlockContext,
    *,
    span: KvSpan,
    q_ref: BlockRef,
    do_ref: BlockRef,
    m_ref: BlockRef,
    inv_l_ref: BlockRef,
    delta_ref: BlockRef,
    k_ref: BlockRef,
    v_ref: BlockRef,
    dq_before_ref: BlockRef | None = None,
    dq_ref: BlockRef | None = None,
    dq_shared_ref: BlockRef | None = None,
    dk_ref: BlockRef,
    dv_ref: BlockRef,
    dq_acc_ref: BlockRef,
    dk_acc_ref: BlockRef,
    dv_acc_ref: BlockRef,
    q_transposed_ref: BlockRef,
    do_transposed_ref: BlockRef,
    k_transposed_ref: BlockRef,
    s_ref: BlockRef,
    dp_ref: BlockRef,
    p_ref: BlockRef,
    ds_ref: BlockRef,
) -> None:
    config = block.config
    num_q_subtiles, num_kv_subtiles = config.num_subtiles
    span_block = block.kv_block - span.start

    @pl.when(block.step == 0)
    def init_dk_dv() -> None:
        dk_acc_ref.fill(0)
        dv_acc_ref.fill(0)

    @pl.when(block.is_first_kv_block)
    def init_q_block() -> None:
        for r in range(num_q_subtiles):
            q_transposed_ref.store(q_ref.load(r).T, r)
            do_transposed_ref.store(do_ref.load(r).T, r)
            if dq_before_ref is not None:
                dq_acc_ref.store(jnp.where(block.q_block < span.continued_stop, dq_before_ref.load(r), 0), r)
        if dq_before_ref is None:
            dq_acc_ref.fill(0)

    @block.run_phase
    def compute_scores_and_dp() -> None:
        for r, c in block.subtiles():
            s_ref.store(block.scores(block.keys_times_queries(k_ref, q_ref, q_transposed_ref, r, c)), r, c)
            dp = block.keys_times_queries(v_ref, do_ref, do_transposed_ref, r, c)
            dp_ref.store(dp - delta_ref.load(r), r, c)

    block.apply_mask(s_ref)

    @block.run_phase
    def compute_p_and_ds() -> None:
        block.transpose_keys(k_ref, k_transposed_ref, "exponentials")
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
        accumulate_over_q(dv_acc_ref, do_transposed_ref, p_ref)

    @block.run_phase
    def accumulate_dk() -> None:
        accumulate_over_q(dk_acc_ref, q_transposed_ref, ds_ref)

    @block.run_phase
    def accumulate_dq() -> None:
        block.transpose_keys(k_ref, k_transposed_ref, "products")
        block.accumulate_over_keys(dq_acc_ref, k_transposed_ref, ds_ref)

    def store_finished_dq(dq_ref: BlockRef) -> None:
        for r in range(num_q_subtiles):
            dq_ref.store_transposed(dq_acc_ref.load(r) * config.scale, r)

    def store_shared_dq(dq_shared_ref: BlockRef) -> None:
        for r in range(num_q_subtiles):
            dq_shared_ref.store(dq_acc_ref.load(r), r)

    @pl.when(block.is_last_kv_block)
    def store_dq() -> None:
        if dq_ref is not None:
            pl.when(block.q_block < span.shared_start)(functools.partial(store_finished_dq, dq_ref))
        if dq_shared_ref is not None:
            pl.when(block.q_block >= span.shared_start)(functools.partial(store_shared_dq, dq_shared_ref))

    def store_key_block(out_ref: BlockRef, acc_ref: BlockRef, scale: float, c: int, n: Any, _: None) -> None:
        out_ref.store_transposed(acc_ref.load(n, c) * scale, n * num_kv_subtiles + c)

    @pl.when(block.step == pl.num_programs(1) - 1)
    def store_dk_dv() -> None:
        for out_ref, acc_ref, scale in ((dk_ref, dk_acc_ref, config.scale), (dv_ref, dv_acc_ref, 1)):
            for c in range(num_kv_subtiles):
                store_block = functools.partial(store_key_block, out_ref, acc_ref, scale, c)
                jax.lax.fori_loop(0, span.stop - span.start, store_block, None)


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
        q: [heads, G, T, D].
        k: [heads, key subtiles, keys, D].
        v: [heads, key subtiles, keys, Dv].
        do: cotangent of the ungated output [heads, G, T, Dv].
        m: [heads, query subtiles, 1, rows]; see `ForwardResult`.
        inv_l: as m.
        delta: row sums of do times the ungated output, less the cotangent of the log-sum-exp, as m.
        segments: segment ids, or None.
        config: static parameters of the kernel.
        cost: cost estimate of all spans for the compiler.

    Returns:
        The gradients of q, k and v.
    """
    (D, Dv), (num_q_subtiles, num_kv_subtiles) = (q.shape[3], v.shape[3]), config.num_subtiles
    rows, keys = config.block_sizes.subtile(config.G)
    inputs = {
        "q": query_blocks(config, q),
        "do": query_blocks(config, do),
        "m": row_blocks(config, m),
        "inv_l": row_blocks(config, inv_l),
        "delta": row_blocks(config, delta),
        "k": key_blocks(config, k),
        "v": key_blocks(config, v),
    }
    subtile_shape = (num_q_subtiles, num_kv_subtiles, keys, rows)
    scratch = {
        "dq_acc": ScratchShape((num_q_subtiles, D, rows), jnp.float32),
        "q_transposed": ScratchShape((num_q_subtiles, D, rows), q.dtype),
        "do_transposed": ScratchShape((num_q_subtiles, Dv, rows), do.dtype),
        "k_transposed": ScratchShape((num_kv_subtiles, D, keys), k.dtype),
        "s": ScratchShape(subtile_shape, jnp.float32),
        "dp": ScratchShape(subtile_shape, jnp.float32),
        "p": ScratchShape(subtile_shape, q.dtype),
        "ds": ScratchShape(subtile_shape, q.dtype),
    }
    spans = kv_spans(config)
    num_blocks = sum(len(span.schedule) for span in spans)
    widths = {"dk": D, "dv": Dv}
    for name, width in widths.items():
        scratch[f"{name}_acc"] = ScratchShape((spans[0].stop, num_kv_subtiles, width, keys), jnp.float32)
    # The first queries may see no key, so that no step writes their rows.
    results = {"dq": jnp.zeros_like(q)} if spans[0].q_start > 0 else {}
    for n, span in enumerate(spans):
        outputs = _dq_outputs(q, span, config)
        for name, x in (("dk", k), ("dv", v)):  # their blocks are spans
            block_shape = (1, spans[0].stop * num_kv_subtiles, keys, widths[name])
            spec = pl.BlockSpec(block_shape, lambda g, *_, n=n: (g, n, 0, 0))
            outputs[name] = Blocked(varying_shape(x.shape, x.dtype, q, k), spec)
        span_inputs = inputs
        if span.q_start < span.continued_stop:
            before = QBlockRange(spans[n - 1].shared_start, span.continued_stop)
            span_inputs = inputs | {"dq_before": row_blocks(config, results.pop("dq_shared"), before)}
        results |= pallas_call_over_blocks(
            functools.partial(_bwd_kernel, span=span),
            config,
            span.schedule,
            span_inputs,
            outputs,
            scratch,
            segments=segments,
            name="attention_backward",
            cost=cost.scaled(len(span.schedule) / num_blocks),
            written={name: results[name] for name in ("dq", "dk", "dv") if name in results and name in outputs},
        )
    return QKVGradients(results["dq"], results["dk"], results["dv"])


def _dq_outputs(q: Array, span: KvSpan, config: AttentionConfig[TpuBlockSizes]) -> dict[str, Blocked]:
    """Return the outputs for the query blocks that a span finishes and for those that the next span continues."""
    outputs: dict[str, Blocked] = {}
    (heads, _, _, D), (num_q_subtiles, _) = q.shape, config.num_subtiles
    if span.q_start < span.shared_start:
        finished = QBlockRange(span.q_start, span.shared_start)
        outputs["dq"] = query_blocks(config, varying_shape(q.shape, q.dtype, q), finished)
    if span.shared_start < span.q_stop:
        shared = QBlockRange(span.shared_start, span.q_stop)
        shape = (heads, (shared.stop - shared.start) * num_q_subtiles, D, config.block_sizes.block_q_compute)
        outputs["dq_shared"] = row_blocks(config, varying_shape(shape, jnp.float32, q), shared)
    return outputs
