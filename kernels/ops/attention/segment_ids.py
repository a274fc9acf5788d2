"""Segment ids of packed sequences: attended keys, and blocks that share a segment.

The Pallas kernels skip a pair of blocks whose ranges of ids are disjoint. That is exact for ascending ids, as packed
documents have; in any other order a kernel may visit blocks that share no segment, and their mask hides every pair.
"""

import jax
import jax.numpy as jnp

from dantinox.kernels.vma import match_vma

Array = jax.Array
SegmentIds = tuple[Array, Array]  # q_ids [B, T], kv_ids [B, S]
Q_STEP = 128  # queries compared with all keys at a time


def zero_unattended_keys(
    k: Array, v: Array, segment_ids: SegmentIds | None, *, T: int, causal: bool, window: int | None
) -> tuple[Array, Array, SegmentIds | None]:
    """Remove keys that no query attends to, so that their contents, NaN included, have no effect.

    Keys before every window are cut off; keys of no query's segment become zeros.

    Args:
        k: keys [B, S, K, D].
        v: values [B, S, K, D].
        segment_ids: (q_ids [B, T], kv_ids [B, S]) or None. The same array twice means that every query attends to its
            own key.
        T: number of queries.
        causal: whether a query sees no later key.
        window: keys that a query sees, or None.

    Returns:
        Keys, values and segment ids without the keys that were cut off.
    """
    if window is not None and (num_attended := T + window - 1) < k.shape[1]:
        k, v = k[:, -num_attended:], v[:, -num_attended:]
        segment_ids = None if segment_ids is None else (segment_ids[0], segment_ids[1][:, -num_attended:])
    if segment_ids is not None and segment_ids[0] is not segment_ids[1]:
        attended = attended_keys(*segment_ids, causal=causal, window=window)[:, :, None, None]
        k, v = jnp.where(attended, k, 0), jnp.where(attended, v, 0)
    return k, v, segment_ids


def attended_keys(q_ids: Array, kv_ids: Array, *, causal: bool, window: int | None) -> Array:
    """Return which keys some query attends to, [B, S]; the steps keep memory linear in T + S."""
    (B, T), S = q_ids.shape, kv_ids.shape[1]
    k_pos = jnp.arange(S)

    def add_q_step(n: Array, attended: Array) -> Array:
        t = n * Q_STEP + jnp.arange(Q_STEP)
        ids = jnp.take(q_ids, t, axis=1, mode="clip")
        visible = (ids[:, :, None] == kv_ids[:, None]) & (t < T)[None, :, None]
        distance = (t + S - T)[:, None] - k_pos[None]
        if causal:
            visible &= (distance >= 0)[None]
        if window is not None:
            visible &= (distance < window)[None]
        return attended | visible.any(1)

    return jax.lax.fori_loop(0, -(-T // Q_STEP), add_q_step, match_vma(jnp.zeros((B, S), bool), q_ids, kv_ids))


def block_segment_overlap(ids: Array, block: int, other_ids: Array, other_block: int) -> tuple[Array, Array]:
    """Compare the ids of every pair of blocks.

    Args:
        ids: [B, n], in blocks of `block`.
        block: tokens per block of `ids`.
        other_ids: [B, m], in blocks of `other_block`.
        other_block: tokens per block of `other_ids`.

    Returns:
        (disjoint, same_segment) [B, blocks, other blocks]: the ranges of ids are disjoint; both blocks hold one id, and
        it is the same.
    """
    low, high = (x[:, :, None] for x in _id_ranges(ids, block))
    other_low, other_high = (x[:, None] for x in _id_ranges(other_ids, other_block))
    disjoint = (low > other_high) | (other_low > high)
    return disjoint, (low == other_high) & (other_low == high)


def kv_block_ranges(ids: Array, block: int, other_ids: Array, other_block: int) -> Array:
    """Return the blocks of `other_ids` that a block of `ids` must visit; see `block_segment_overlap` for the arguments.

    Returns:
        int32 [B, blocks, 4], (start, interior_start, interior_end, end): all blocks that may share a segment are in
        [start, end); those in [interior_start, interior_end) hold only the segment of the block. If no block shares a
        segment, start is the number of blocks and end is 0.
    """
    disjoint, same_segment = block_segment_overlap(ids, block, other_ids, other_block)
    num_blocks = disjoint.shape[2]
    j = jnp.arange(num_blocks)
    start, end = jnp.min(jnp.where(disjoint, num_blocks, j), axis=2), jnp.max(jnp.where(disjoint, 0, j + 1), axis=2)
    interior_start = jnp.argmax(same_segment, axis=2)
    interior_end = jnp.min(jnp.where(same_segment | (j < interior_start[:, :, None]), num_blocks, j), axis=2)
    return jnp.stack([start, interior_start, interior_end, end], axis=2).astype(jnp.int32)


def pad_ids_to_block(ids: Array, block: int) -> Array:
    """Pad [B, n] to a multiple of the block with the last id, which widens no range."""
    return jnp.pad(ids, ((0, 0), (0, -ids.shape[1] % block)), mode="edge")


def _id_ranges(ids: Array, block: int) -> tuple[Array, Array]:
    """Return the smallest and the largest id of each block, [B, blocks]."""
    blocks = pad_ids_to_block(ids, block).reshape(ids.shape[0], -1, block)
    return blocks.min(2), blocks.max(2)
