"""Attention on Mosaic TPU: flash attention over the visible blocks only.

Math      s = cap(scale q k^T) log2(e);  p = 2^(s - m);  o = sigmoid(gate) * sum(p v) / sum(p)
Tiling    grid (heads, visible blocks), the blocks of a query block one after the other. `block_schedule.py` lists
          the visible blocks; `pallas_tpu/common.py` describes how a kernel processes one. The G query heads of a key
          head are packed: R = G * bq rows.

              keys ->        bk   bk   bk   bk
              G x bq rows    ▞    ░    ░    ░       ▞ masked
              G x bq rows    █    ▞    ░    ░       █ interior: no mask is computed
              G x bq rows    ▞    █    ▞    ░       ░ not in the grid

State     m, l [1, R] and the output [D, R] of one query block, in float32; written at its last key block.
Layout    q, gate and o are [heads, G, T, D], k and v [heads, S, D]: with D last, as the caller has them, XLA only moves
          the axis of heads. The matrix unit transposes q while it loads it (D < 128: the transpose unit, once), the
          transpose unit v in every step.
Traffic   reads q and gate and writes o once, reads k and v once per visible block: 2 T S_visible / bq rows of D.
          4 D FLOPs per visible pair. The naive algorithm moves the T S scores three times.
Limits    float32, bfloat16, and float16, which is computed in float32; any T, S, H, K, D and softcap. Float32 must hold
          the scores times log2(e) and, for gradients, do v^T, times the scale too. `dantinox.kernels.attention` raises
          ValueError.
Source    Dao, FlashAttention-2 (arXiv:2307.08691); jax's splash attention for the grid of visible blocks.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from dantinox.kernels.cost import Cost
from dantinox.kernels.mosaic_tpu import in_32_bits
from dantinox.kernels.ops.attention.common import (
    M_INIT,
    AttentionConfig,
    ForwardResult,
    SegmentTables,
)
from dantinox.kernels.ops.attention.packing import is_elementwise_gate
from dantinox.kernels.ops.attention.pallas_tpu.block_call import (
    ScratchShape,
    key_blocks,
    pallas_call_over_blocks,
    query_blocks,
    row_blocks,
)
from dantinox.kernels.ops.attention.pallas_tpu.block_sizes import TpuBlockSizes
from dantinox.kernels.ops.attention.pallas_tpu.common import MIN_D_TO_TRANSPOSE_ON_LOAD, BlockContext
from dantinox.kernels.ops.attention.pallas_tpu.refs import BlockRef, QueriesRef
from dantinox.kernels.vma import varying_shape

Array = jax.Array


def _fwd_kernel(
    block: BlockContext,
    *,
    q_ref: BlockRef,
    k_ref: BlockRef,
    v_ref: BlockRef,
    gate_ref: BlockRef | None = None,
    o_ref: BlockRef,
    o_ungated_ref: BlockRef | None = None,
    m_out_ref: BlockRef | None = None,
    inv_l_ref: BlockRef | None = None,
    m_ref: BlockRef,
    l_ref: BlockRef,
    acc_ref: BlockRef,
    s_ref: BlockRef,
    s_max_ref: BlockRef,
    p_ref: BlockRef,
    decay_ref: BlockRef,
    v_transposed_ref: BlockRef,
    q_transposed_ref: BlockRef | None = None,
) -> None:
    config = block.config
    num_q_subtiles, num_kv_subtiles = config.num_subtiles

    @pl.when(block.is_first_kv_block)
    def init_state() -> None:
        m_ref.fill(M_INIT)
        l_ref.fill(0)
        acc_ref.fill(0)
        if q_transposed_ref is not None:
            for r in range(num_q_subtiles):
                q_transposed_ref.store(q_ref.load(r).T, r)

    def store_max(r: int, c: int, s: Array) -> None:
        s_max_ref.store(jnp.max(s, axis=-2, keepdims=True), r, c)

    @block.run_phase
    def compute_scores() -> None:
        for r, c in block.subtiles():
            s = block.scores(block.keys_times_queries(k_ref, q_ref, q_transposed_ref, r, c))
            s_ref.store(s, r, c)
            store_max(r, c, s)

    block.apply_mask(s_ref, after=store_max)

    @block.run_phase
    def compute_softmax() -> None:
        block.transpose_keys(v_ref, v_transposed_ref, "exponentials")
        for r in range(num_q_subtiles):
            m_prev = m_ref.load(r)
            m = functools.reduce(jnp.maximum, (s_max_ref.load(r, c) for c in range(num_kv_subtiles)), m_prev)
            decay = jnp.exp2(m_prev - m)
            m_ref.store(m, r)
            decay_ref.store(decay, r)
            l_ref.store(decay * l_ref.load(r), r)
            for c in range(num_kv_subtiles):
                p = jnp.exp2(s_ref.load(r, c) - m)
                l_ref.store(l_ref.load(r) + jnp.sum(p, axis=-2, keepdims=True), r)
                p_ref.store(p, r, c)

    @block.run_phase
    def accumulate_output() -> None:
        block.transpose_keys(v_ref, v_transposed_ref, "products")
        block.accumulate_over_keys(acc_ref, v_transposed_ref, p_ref, decay_ref)

    def store_gated(gate_ref: QueriesRef, r: int, o: Array) -> None:
        rows = gate_ref.rows_per_piece
        for piece in range(o.shape[-1] // rows):
            o_piece = o[:, piece * rows : (piece + 1) * rows].T
            if o_ungated_ref is not None:
                o_ungated_ref.store(o_piece, r, piece)
            o_ref.store(o_piece * jax.nn.sigmoid(gate_ref.load(r, piece).astype(jnp.float32)), r, piece)

    def store_output(r: int, o: Array) -> None:
        if isinstance(gate_ref, QueriesRef):
            store_gated(gate_ref, r, o)
            return
        if o_ungated_ref is not None:
            o_ungated_ref.store_transposed(o, r)
        if gate_ref is not None:
            o = o * jax.nn.sigmoid(gate_ref.load(r).astype(jnp.float32))
        o_ref.store_transposed(o, r)

    @pl.when(block.is_last_kv_block)
    def epilogue() -> None:
        for r in range(num_q_subtiles):
            l = l_ref.load(r)
            sees_no_key = l == 0
            safe_l = jnp.where(sees_no_key, 1.0, l)
            store_output(r, acc_ref.load(r) / safe_l)
            if m_out_ref is not None and inv_l_ref is not None:
                m_out_ref.store(m_ref.load(r), r)
                inv_l_ref.store(jnp.where(sees_no_key, 0.0, 1 / safe_l), r)


@in_32_bits
def attention_fwd(
    q: Array,
    k: Array,
    v: Array,
    gate: Array | None,
    segments: SegmentTables | None,
    config: AttentionConfig[TpuBlockSizes],
    *,
    residuals: bool,
    lse: bool,
    cost: Cost,
) -> ForwardResult:
    """Run the forward kernel.

    Args:
        q: [heads, G, T, D].
        k: [heads, key subtiles, keys, D].
        v: [heads, key subtiles, keys, Dv].
        gate: [heads, G, T, Dv], or [heads, query subtiles, 1, rows], or None.
        segments: segment ids, or None.
        config: static parameters of the kernel.
        residuals: whether to write all residuals of the backward pass.
        lse: whether to write the log-sum-exp, which is one of them, in any case.
        cost: cost estimate for the compiler.

    Returns:
        The output and what was requested.
    """
    (heads, G, T, D), (num_q_subtiles, num_kv_subtiles) = q.shape, config.num_subtiles
    Dv = v.shape[3]
    rows, keys = config.block_sizes.subtile(G)
    inputs = {"q": query_blocks(config, q), "k": key_blocks(config, k), "v": key_blocks(config, v)}
    o = varying_shape((heads, G, T, Dv), q.dtype, q, k)
    outputs = {"o": query_blocks(config, o)}
    if gate is not None:
        inputs["gate"] = query_blocks(config, gate) if is_elementwise_gate(gate, o) else row_blocks(config, gate)
        if residuals:
            outputs["o_ungated"] = outputs["o"]
    if residuals or lse:
        row_output = row_blocks(config, varying_shape((heads, G * T // rows, 1, rows), jnp.float32, q, k))
        outputs |= {"m_out": row_output, "inv_l": row_output}
    row_shape = (num_q_subtiles, 1, rows)
    scratch = {
        "m": ScratchShape(row_shape, jnp.float32),
        "l": ScratchShape(row_shape, jnp.float32),
        "acc": ScratchShape((num_q_subtiles, Dv, rows), jnp.float32),
        "s": ScratchShape((num_q_subtiles, num_kv_subtiles, keys, rows), jnp.float32),
        "s_max": ScratchShape((num_q_subtiles, num_kv_subtiles, 1, rows), jnp.float32),
        "p": ScratchShape((num_q_subtiles, num_kv_subtiles, keys, rows), v.dtype),
        "decay": ScratchShape(row_shape, jnp.float32),
        "v_transposed": ScratchShape((num_kv_subtiles, Dv, keys), v.dtype),
    }
    if D < MIN_D_TO_TRANSPOSE_ON_LOAD:
        scratch["q_transposed"] = ScratchShape((num_q_subtiles, D, rows), q.dtype)
    results = pallas_call_over_blocks(
        _fwd_kernel,
        config,
        config.block_schedule(),
        inputs,
        outputs,
        scratch,
        segments=segments,
        name="attention_forward",
        cost=cost,
    )
    o_ungated = results.get("o_ungated", results["o"] if residuals else None)
    return ForwardResult(results["o"], o_ungated, results.get("m_out"), results.get("inv_l"))
