"""The layout of the attention kernels' arrays: grouped heads packed into rows, blocks split into subtiles.

Arrays have one entry per sequence and key head, padded with zeros to a multiple of the block. The CPU kernels have all
queries in rows (`pack_queries`). The TPU kernels pack on the chip (`group_queries`): XLA would transpose the array in
HBM, and only numbers per row come in rows (`pack_rows`). Padded queries give zero
gradients because their cotangents are zero; padded keys are past the diagonal or masked.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dantinox.kernels.ops.attention.common import (
    FULL_OVERLAP,
    NO_OVERLAP,
    PARTIAL_OVERLAP,
    AttentionConfig,
    SegmentTables,
)
from dantinox.kernels.ops.attention.segment_ids import block_segment_overlap, pad_ids_to_block

Array = jax.Array


def _pad_to_block(x: Array, block: int) -> Array:
    """Append zeros after the last token, up to a multiple of the block."""
    padding = -x.shape[1] % block
    return jnp.pad(x, [(0, padding if axis == 1 else 0) for axis in range(x.ndim)]) if padding else x


class PackGQA(NamedTuple):
    """Order of the packed queries of a block: [head_groups, q_parts, heads, q]. A subtile is (heads, q)."""

    head_groups: int
    heads: int
    q_parts: int
    q: int


def _pack_gqa_shape(config: AttentionConfig) -> PackGQA:
    block_q, (rows, _) = config.block_sizes.block_q, config.block_sizes.subtile(config.G)
    heads, q_parts = max(1, rows // block_q), max(1, block_q // rows)
    return PackGQA(config.G // heads, heads, q_parts, min(block_q, rows))


def pack_queries(x: Array, config: AttentionConfig) -> Array:
    """Rearrange [B, T, H, n] to [B K, query subtiles, n, rows]."""
    pack, (B, _, H, n) = _pack_gqa_shape(config), x.shape
    K = H // config.G
    x = _pad_to_block(x, config.block_sizes.block_q)
    x = x.reshape(B, -1, pack.q_parts, pack.q, K, pack.head_groups, pack.heads, n)
    return x.transpose(0, 4, 1, 5, 2, 7, 6, 3).reshape(B * K, -1, n, pack.heads * pack.q)


def unpack_queries(x: Array, config: AttentionConfig, B: int) -> Array:
    """Rearrange [B K, query subtiles, n, rows] to [B, T, H, n]."""
    pack, n = _pack_gqa_shape(config), x.shape[2]
    K = x.shape[0] // B
    x = x.reshape(B, K, -1, pack.head_groups, pack.q_parts, n, pack.heads, pack.q)
    return x.transpose(0, 2, 4, 7, 1, 3, 6, 5).reshape(B, -1, K * config.G, n)[:, : config.T]


def group_queries(x: Array, config: AttentionConfig) -> Array:
    """Rearrange [B, T, H, D] to [B K, G, T, D], by a transpose that moves the axis of heads only."""
    B, _, H, D = x.shape
    x = _pad_to_block(x, config.block_sizes.block_q).transpose(0, 2, 1, 3)
    return x.reshape(B * H // config.G, config.G, -1, D)


def ungroup_queries(x: Array, config: AttentionConfig, B: int) -> Array:
    """Rearrange [B K, G, T, D] to [B, T, H, D]."""
    _, _, T, D = x.shape
    return x.reshape(B, -1, T, D).transpose(0, 2, 1, 3)[:, : config.T]


def is_elementwise_gate(gate: Array, o: Array | jax.ShapeDtypeStruct) -> bool:
    """Return whether a gate has the layout of the output, and not that of one number per row."""
    return gate.shape == o.shape


def pack_rows(x: Array, config: AttentionConfig) -> Array:
    """Rearrange [heads, G, T, 1] to [heads, query subtiles, 1, rows]."""
    pack, heads = _pack_gqa_shape(config), x.shape[0]
    x = x.reshape(heads, pack.head_groups, pack.heads, -1, pack.q_parts, pack.q)
    return x.transpose(0, 3, 1, 4, 2, 5).reshape(heads, -1, 1, pack.heads * pack.q)


def unpack_rows(x: Array, config: AttentionConfig) -> Array:
    """Rearrange [heads, query subtiles, 1, rows] to [heads, G, T, 1]."""
    pack, heads = _pack_gqa_shape(config), x.shape[0]
    x = x.reshape(heads, -1, pack.head_groups, pack.q_parts, pack.heads, pack.q)
    return x.transpose(0, 2, 4, 1, 3, 5).reshape(heads, config.G, -1, 1)


def pack_keys(x: Array, config: AttentionConfig) -> Array:
    """Rearrange [B, S, K, D] to [B K, key subtiles, keys, D]."""
    (B, _, K, D), (_, keys) = x.shape, config.block_sizes.subtile(config.G)
    x = _pad_to_block(x, config.block_sizes.block_kv).reshape(B, -1, keys, K, D)
    return x.transpose(0, 3, 1, 2, 4).reshape(B * K, -1, keys, D)


def segment_tables(q_ids: Array, kv_ids: Array, K: int, config: AttentionConfig) -> SegmentTables:
    """Lay out the ids in subtiles and compare the ranges of ids of each pair of blocks."""
    B, pack, sizes = q_ids.shape[0], _pack_gqa_shape(config), config.block_sizes
    rows, keys = sizes.subtile(config.G)
    padded_q_ids, padded_kv_ids = pad_ids_to_block(q_ids, sizes.block_q), pad_ids_to_block(kv_ids, sizes.block_kv)
    disjoint, same_segment = block_segment_overlap(q_ids, sizes.block_q, kv_ids, sizes.block_kv)
    overlap = jnp.where(disjoint, NO_OVERLAP, jnp.where(same_segment, FULL_OVERLAP, PARTIAL_OVERLAP))

    def repeat_per_head(x: Array) -> Array:
        return jnp.repeat(x.astype(jnp.int32), K, axis=0)

    row_ids = padded_q_ids.reshape(B, -1, 1, pack.q_parts, 1, pack.q)
    row_ids = jnp.broadcast_to(row_ids, (B, row_ids.shape[1], pack.head_groups, pack.q_parts, pack.heads, pack.q))
    return SegmentTables(
        repeat_per_head(row_ids.reshape(B, -1, 1, rows)),
        repeat_per_head(padded_kv_ids.reshape(B, -1, 1, keys)),
        overlap.astype(jnp.int32),
    )
