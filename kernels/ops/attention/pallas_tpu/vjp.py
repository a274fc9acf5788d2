"""Attention on TPU and CPU: the operation, its layout and its derivative around the two kernels.

The kernels see one entry per sequence and key head, in whole blocks padded with zeros. Padded queries give zero
gradients because their cotangents are zero; padded keys are behind the diagonal or masked.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dantinox.kernels import cost
from dantinox.kernels.dispatch import current_device
from dantinox.kernels.ops.attention.pallas_tpu import block_sizes, bwd, fwd
from dantinox.kernels.ops.attention.pallas_tpu.common import (
    FULL_OVERLAP,
    NO_OVERLAP,
    PARTIAL_OVERLAP,
    AttentionKernelConfig,
    SegmentTables,
)
from dantinox.kernels.ops.attention.segment_ids import block_segment_overlap, pad_ids_to_block, zero_unattended_keys

Array = jax.Array


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    gate: Array | None,
    causal: bool,
    window: int | None,
    scale: float,
    softcap: float | None,
    segment_ids: tuple[Array, Array] | None,
) -> Array:
    """See `dantinox.kernels.attention`, which checks the arguments."""
    B, T, H, D = q.shape
    S, K = k.shape[1:3]
    if S == 0:
        return jnp.zeros_like(q)
    k, v, segment_ids = zero_unattended_keys(k, v, segment_ids, T=T, causal=causal, window=window)
    S = k.shape[1]

    G, device = H // K, current_device()
    sizes = block_sizes.heuristic_block_sizes(
        device, heads=B * K, G=G, T=T, S=S, D=D, causal=causal, window=window, itemsize=q.dtype.itemsize
    )
    config = AttentionKernelConfig(T, S, G, causal, window, scale, softcap, sizes, device.platform == "cpu")
    segments = None if segment_ids is None else _segment_tables(*segment_ids, K, config)
    gate = None if gate is None else _pack_queries(gate, config)
    q, k, v = _pack_queries(q, config), _pack_keys(k, config), _pack_keys(v, config).swapaxes(-1, -2)
    return _unpack_queries(_attention(q, k, v, gate, segments, config), config, B)


class Residuals(NamedTuple):
    """What the forward pass keeps for the backward pass; see `ForwardResult`."""

    q: Array
    k: Array
    v: Array
    gate: Array | None
    segments: SegmentTables | None
    o_ungated: Array
    m: Array
    inv_l: Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(
    q: Array, k: Array, v: Array, gate: Array | None, segments: SegmentTables | None, config: AttentionKernelConfig
) -> Array:
    return fwd.attention_fwd(q, k, v, gate, segments, config, residuals=False, cost=_cost(q, gate, config)).o


def _attention_fwd(q, k, v, gate, segments, config):
    result = fwd.attention_fwd(q, k, v, gate, segments, config, residuals=True, cost=_cost(q, gate, config))
    return result.o, Residuals(q, k, v, gate, segments, result.o_ungated, result.m, result.inv_l)


def _attention_bwd(config: AttentionKernelConfig, residuals: Residuals, do: Array) -> tuple:
    q, k, v, gate, segments, o_ungated, m, inv_l = residuals
    do_ungated, dgate, delta = _bwd_preprocess(do, o_ungated, gate)
    dq, dk, dv = bwd.attention_bwd(
        q,
        k,
        v.swapaxes(-1, -2),
        do_ungated,
        m,
        inv_l,
        delta,
        segments,
        config,
        cost=_cost(q, gate, config, backward=True),
    )
    return dq, dk.swapaxes(-1, -2), dv, dgate, None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _bwd_preprocess(do: Array, o_ungated: Array, gate: Array | None) -> tuple[Array, Array | None, Array]:
    """(cotangent of the ungated output, dgate, delta [..., 1, rows]): one pass over do and o, which XLA fuses."""
    do_f32, o_ungated = do.astype(jnp.float32), o_ungated.astype(jnp.float32)
    if gate is None:
        return do, None, jnp.sum(do_f32 * o_ungated, axis=-2, keepdims=True)
    sigmoid_gate = jax.nn.sigmoid(gate.astype(jnp.float32))
    dgate = do_f32 * o_ungated * (sigmoid_gate * (1 - sigmoid_gate))
    if gate.shape[-2] == 1:
        dgate = jnp.sum(dgate, axis=-2, keepdims=True)
    do_ungated = do_f32 * sigmoid_gate
    return (
        do_ungated.astype(do.dtype),
        dgate.astype(gate.dtype),
        jnp.sum(do_ungated * o_ungated, axis=-2, keepdims=True),
    )


def _cost(q: Array, gate: Array | None, config: AttentionKernelConfig, backward: bool = False) -> cost.Cost:
    """Cost of all heads; packed segments count as one, since their ids are unknown at trace time."""
    gate_kind = "none" if gate is None else "elementwise" if gate.shape[2] == q.shape[2] else "head"
    return cost.attention(
        B=q.shape[0],
        T=config.T,
        S=config.S,
        H=config.G,
        K=1,
        D=q.shape[2],
        causal=config.causal,
        window=config.window,
        gate=gate_kind,
        itemsize=q.dtype.itemsize,
        backward=backward,
    )


def _pad_to_block(x: Array, block: int) -> Array:
    """Zeros behind the last token, up to a whole block."""
    padding = -x.shape[1] % block
    return jnp.pad(x, [(0, padding if axis == 1 else 0) for axis in range(x.ndim)]) if padding else x


class PackGQA(NamedTuple):
    """Order of the packed queries of a block: [head_groups, q_parts, heads, q]. A subtile is (heads, q)."""

    head_groups: int
    heads: int
    q_parts: int
    q: int


def _pack_gqa_shape(config: AttentionKernelConfig) -> PackGQA:
    block_q, rows = config.block_sizes.block_q, config.block_sizes.block_q_compute
    heads, q_parts = max(1, rows // block_q), max(1, block_q // rows)
    return PackGQA(config.G // heads, heads, q_parts, min(block_q, rows))


def _pack_queries(x: Array, config: AttentionKernelConfig) -> Array:
    """[B, T, H, n] -> [B K, query subtiles, n, rows]."""
    pack, (B, _, H, n) = _pack_gqa_shape(config), x.shape
    K = H // config.G
    x = _pad_to_block(x, config.block_sizes.block_q)
    x = x.reshape(B, -1, pack.q_parts, pack.q, K, pack.head_groups, pack.heads, n)
    return x.transpose(0, 4, 1, 5, 2, 7, 6, 3).reshape(B * K, -1, n, config.block_sizes.block_q_compute)


def _unpack_queries(x: Array, config: AttentionKernelConfig, B: int) -> Array:
    """[B K, query subtiles, n, rows] -> [B, T, H, n]."""
    pack, n = _pack_gqa_shape(config), x.shape[2]
    K = x.shape[0] // B
    x = x.reshape(B, K, -1, pack.head_groups, pack.q_parts, n, pack.heads, pack.q)
    return x.transpose(0, 2, 4, 7, 1, 3, 6, 5).reshape(B, -1, K * config.G, n)[:, : config.T]


def _pack_keys(x: Array, config: AttentionKernelConfig) -> Array:
    """[B, S, K, D] -> [B K, key subtiles, keys, D]."""
    (B, _, K, D), keys = x.shape, config.block_sizes.block_kv_compute
    x = _pad_to_block(x, config.block_sizes.block_kv).reshape(B, -1, keys, K, D)
    return x.transpose(0, 3, 1, 2, 4).reshape(B * K, -1, keys, D)


def _segment_tables(q_ids: Array, kv_ids: Array, K: int, config: AttentionKernelConfig) -> SegmentTables:
    """Lays out the ids in subtiles, and compares the ranges of ids of each pair of blocks."""
    B, pack, sizes = q_ids.shape[0], _pack_gqa_shape(config), config.block_sizes
    padded_q_ids, padded_kv_ids = pad_ids_to_block(q_ids, sizes.block_q), pad_ids_to_block(kv_ids, sizes.block_kv)
    disjoint, same_segment = block_segment_overlap(q_ids, sizes.block_q, kv_ids, sizes.block_kv)
    overlap = jnp.where(disjoint, NO_OVERLAP, jnp.where(same_segment, FULL_OVERLAP, PARTIAL_OVERLAP))

    def repeat_per_head(x: Array) -> Array:
        return jnp.repeat(x.astype(jnp.int32), K, axis=0)

    row_ids = padded_q_ids.reshape(B, -1, 1, pack.q_parts, 1, pack.q)
    row_ids = jnp.broadcast_to(row_ids, (B, row_ids.shape[1], pack.head_groups, pack.q_parts, pack.heads, pack.q))
    return SegmentTables(
        repeat_per_head(row_ids.reshape(B, -1, 1, sizes.block_q_compute)),
        repeat_per_head(padded_kv_ids.reshape(B, -1, 1, sizes.block_kv_compute)),
        repeat_per_head(overlap),
    )
