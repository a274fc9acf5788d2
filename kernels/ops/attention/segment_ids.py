"""Segments of packed sequences: which keys some query sees, and which tiles share a segment.

The Pallas kernels skip a pair of tiles by the ranges that their ids lie in: exact where the ids ascend, as those of
packed documents do; in any other order a tile too many may be visited, and its mask clears it.
"""

import jax
import jax.numpy as jnp

Array = jax.Array
Ids = tuple[Array, Array]


def zero_unattended_keys(
    k: Array, v: Array, segment_ids: Ids | None, *, T: int, causal: bool, window: int | None
) -> tuple[Array, Array, Ids | None]:
    """k, v [B, S, K, D] and the ids without what no query sees: keys before every window are cut off, keys of no
    query's segment are zeros. What they held, NaN included, reaches nobody.

    Args:
        T: number of queries.
        segment_ids: (q_ids [B, T], kv_ids [B, S]) or None; the same array twice says that a key is its query's.
    """
    if window is not None and (seen := T + window - 1) < k.shape[1]:
        k, v = k[:, -seen:], v[:, -seen:]
        segment_ids = None if segment_ids is None else (segment_ids[0], segment_ids[1][:, -seen:])
    if segment_ids is not None and segment_ids[0] is not segment_ids[1]:
        here = attended_keys(*segment_ids, causal=causal, window=window)[:, :, None, None]
        k, v = jnp.where(here, k, 0), jnp.where(here, v, 0)
    return k, v, segment_ids


def attended_keys(q_ids: Array, kv_ids: Array, *, causal: bool, window: int | None) -> Array:
    """[B, S]: keys that some query sees. Two comparisons a pair, in steps that keep memory linear."""
    (B, T), S = q_ids.shape, kv_ids.shape[1]
    step = 128
    key = jnp.arange(S)

    def look(n: Array, seen: Array) -> Array:
        t = n * step + jnp.arange(step)
        ids = jnp.take(q_ids, t, axis=1, mode="clip")
        visible = (ids[:, :, None] == kv_ids[:, None]) & (t < T)[:, None]
        distance = (t + S - T)[:, None] - key
        if causal:
            visible &= distance >= 0
        if window is not None:
            visible &= distance < window
        return seen | visible.any(1)

    return jax.lax.fori_loop(0, -(-T // step), look, jnp.zeros((B, S), bool))


def block_segment_overlap(of: Array, tile: int, other: Array, other_tile: int) -> tuple[Array, Array]:
    """(apart, alike) [B, tiles of `of`, tiles of `other`]: two tiles share no id; both hold one id, the same."""
    low, high = (x[:, :, None] for x in _ranges(of, tile))
    other_low, other_high = (x[:, None] for x in _ranges(other, other_tile))
    apart = (low > other_high) | (other_low > high)
    return apart, (low == other_high) & (other_low == high)


def kv_block_ranges(of: Array, tile: int, other: Array, other_tile: int) -> Array:
    """int32 [B, tiles of `of`, 4]: of the tiles of `other`, all that are not apart from a tile lie in [start, stop),
    and those in [left, right) are alike. (start, left, right, stop); start is their number and stop 0 where none is.
    """
    apart, alike = block_segment_overlap(of, tile, other, other_tile)
    n = apart.shape[2]
    at = jnp.arange(n)
    start, stop = jnp.min(jnp.where(apart, n, at), axis=2), jnp.max(jnp.where(apart, 0, at + 1), axis=2)
    left = jnp.argmax(alike, axis=2)
    right = jnp.min(jnp.where(alike | (at < left[:, :, None]), n, at), axis=2)
    return jnp.stack([start, left, right, stop], axis=2).astype(jnp.int32)


def pad_ids_to_block(ids: Array, tile: int) -> Array:
    """[B, n] up to a multiple of the tile; padding repeats the last id, so that it widens no range."""
    return jnp.pad(ids, ((0, 0), (0, -ids.shape[1] % tile)), mode="edge")


def _ranges(ids: Array, tile: int) -> tuple[Array, Array]:
    """The least and the greatest id of each tile, [B, tiles]."""
    tiles = pad_ids_to_block(ids, tile).reshape(ids.shape[0], -1, tile)
    return tiles.min(2), tiles.max(2)
