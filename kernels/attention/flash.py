"""What every Pallas attention shares: layout, tiles, segment tables, and the derivative around the two kernels.

The kernels see one entry a (sequence, key head), in whole tiles padded with zeros. Padded queries give zero gradients
because their cotangents are zero; padded keys are behind the diagonal or masked. Keys that no query sees are cut off or
cleared here, so that what they hold, NaN included, reaches nobody.
"""

import functools

import jax
import jax.numpy as jnp

from kernels import cost
from kernels.attention import mosaic_tpu, mosaic_tpu_backward, tiles
from kernels.attention.scores import ALIKE, APART, MIXED, Segments, Static
from kernels.dispatch import device

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
    """See `kernels.attention`; arguments are checked there."""
    B, T, H, D = q.shape
    S, K = k.shape[1:3]
    if S == 0:
        return jnp.zeros_like(q)
    if window is not None and T + window - 1 < S:
        seen = T + window - 1
        k, v, S = k[:, -seen:], v[:, -seen:], seen
        segment_ids = None if segment_ids is None else (segment_ids[0], segment_ids[1][:, -seen:])
    if segment_ids is not None and segment_ids[0] is not segment_ids[1]:
        seen = _seen(*segment_ids, causal=causal, window=window)[:, :, None, None]
        k, v = jnp.where(seen, k, 0), jnp.where(seen, v, 0)

    G, here = H // K, device()
    sizes = {"heads": B * K, "G": G, "T": T, "S": S, "D": D, "itemsize": q.dtype.itemsize}
    chosen = tiles.choose(here, causal=causal, window=window, **sizes)
    static = Static(T, S, G, causal, window, scale, softcap, chosen, here.platform == "cpu")
    segments = None if segment_ids is None else _segments(*segment_ids, K, static)
    gate = None if gate is None else _queries(gate, static)
    o = _attend(_queries(q, static), _keys(k, static), _keys(v, static).swapaxes(-1, -2), gate, segments, static)
    return _from_queries(o, static, B)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q: Array, k: Array, v: Array, gate: Array | None, segments: Segments | None, static: Static) -> Array:
    return mosaic_tpu.forward(q, k, v, gate, segments, static, residuals=False, cost=_cost(q, gate, static))["o"]


def _attend_forward(q, k, v, gate, segments, static):
    out = mosaic_tpu.forward(q, k, v, gate, segments, static, residuals=True, cost=_cost(q, gate, static))
    return out["o"], (q, k, v, gate, segments, out["ungated"], out["max"], out["share"])


def _attend_backward(static: Static, kept: tuple, do: Array) -> tuple:
    q, k, v, gate, segments, ungated, largest, share = kept
    do, dgate, delta = _before_backward(do, ungated, gate)
    dq, dk, dv = mosaic_tpu_backward.backward(
        q,
        k,
        v.swapaxes(-1, -2),
        do,
        largest,
        share,
        delta,
        segments,
        static,
        cost=_cost(q, gate, static, backward=True),
    )
    return dq, dk.swapaxes(-1, -2), dv, dgate, None


_attend.defvjp(_attend_forward, _attend_backward)


def _before_backward(do: Array, ungated: Array, gate: Array | None) -> tuple[Array, Array | None, Array]:
    """(cotangent of the ungated output, dgate, delta [..., 1, rows]): one pass over do and o, which XLA fuses."""
    wide, ungated = do.astype(jnp.float32), ungated.astype(jnp.float32)
    if gate is None:
        return do, None, jnp.sum(wide * ungated, axis=-2, keepdims=True)
    open_ = jax.nn.sigmoid(gate.astype(jnp.float32))
    dgate = wide * ungated * (open_ * (1 - open_))
    if gate.shape[-2] == 1:
        dgate = jnp.sum(dgate, axis=-2, keepdims=True)
    inner = wide * open_
    return inner.astype(do.dtype), dgate.astype(gate.dtype), jnp.sum(inner * ungated, axis=-2, keepdims=True)


def _cost(q: Array, gate: Array | None, static: Static, backward: bool = False) -> cost.Cost:
    """Of all heads; packed segments count as one, for their ids are not known here."""
    kind = "none" if gate is None else "elementwise" if gate.shape[2] == q.shape[2] else "head"
    return cost.attention(
        B=q.shape[0],
        T=static.T,
        S=static.S,
        H=static.G,
        K=1,
        D=q.shape[2],
        causal=static.causal,
        window=static.window,
        gate=kind,
        itemsize=q.dtype.itemsize,
        backward=backward,
    )


def _whole(x: Array, tile: int) -> Array:
    """Zeros behind the last token, up to a whole tile."""
    missing = -x.shape[1] % tile
    return jnp.pad(x, [(0, missing if axis == 1 else 0) for axis in range(x.ndim)]) if missing else x


def _packing(static: Static) -> tuple[int, int, int, int]:
    """A piece of packed queries holds `heads` heads of `width` queries: G q = (G / heads) x parts x (heads x width)."""
    q, rows = static.tiles.q, static.tiles.rows
    heads, parts = max(1, rows // q), max(1, q // rows)
    return static.G // heads, heads, parts, min(q, rows)


def _queries(x: Array, static: Static) -> Array:
    """[B, T, H, n] -> [B K, pieces, n, rows]."""
    (groups, heads, parts, width), (B, _, H, n) = _packing(static), x.shape
    K = H // static.G
    x = _whole(x, static.tiles.q).reshape(B, -1, parts, width, K, groups, heads, n)
    return x.transpose(0, 4, 1, 5, 2, 7, 6, 3).reshape(B * K, -1, n, static.tiles.rows)


def _from_queries(x: Array, static: Static, B: int) -> Array:
    """[B K, pieces, n, rows] -> [B, T, H, n]."""
    (groups, heads, parts, width), n = _packing(static), x.shape[2]
    K = x.shape[0] // B
    x = x.reshape(B, K, -1, groups, parts, n, heads, width).transpose(0, 2, 4, 7, 1, 3, 6, 5)
    return x.reshape(B, -1, K * static.G, n)[:, : static.T]


def _keys(x: Array, static: Static) -> Array:
    """[B, S, K, D] -> [B K, pieces, keys, D]."""
    B, _, K, D = x.shape
    x = _whole(x, static.tiles.k).reshape(B, -1, static.tiles.keys, K, D)
    return x.transpose(0, 3, 1, 2, 4).reshape(B * K, -1, static.tiles.keys, D)


def _seen(q_ids: Array, kv_ids: Array, *, causal: bool, window: int | None) -> Array:
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


def _segments(q_ids: Array, kv_ids: Array, K: int, static: Static) -> Segments:
    """Ids in pieces, and what a tile's ids have in common, by the ranges they lie in."""
    B, (groups, heads, parts, width) = q_ids.shape[0], _packing(static)
    # Padding repeats the last id, so that it widens no range.
    grow = lambda x, tile: jnp.pad(x, ((0, 0), (0, -x.shape[1] % tile)), mode="edge")
    q_tiles = grow(q_ids, static.tiles.q).reshape(B, -1, static.tiles.q)
    k_tiles = grow(kv_ids, static.tiles.k).reshape(B, -1, static.tiles.k)
    low_q, high_q = q_tiles.min(-1)[:, :, None], q_tiles.max(-1)[:, :, None]
    low_k, high_k = k_tiles.min(-1)[:, None], k_tiles.max(-1)[:, None]
    apart = (low_q > high_k) | (low_k > high_q)
    alike = (low_q == high_k) & (low_k == high_q)  # both ranges hold one id, the same
    shared = jnp.where(apart, APART, jnp.where(alike, ALIKE, MIXED))
    by_head = lambda x: jnp.repeat(x.astype(jnp.int32), K, axis=0)
    rows = q_tiles.reshape(B, -1, 1, parts, 1, width)
    rows = jnp.broadcast_to(rows, (B, rows.shape[1], groups, parts, heads, width))
    return Segments(
        by_head(rows.reshape(B, -1, 1, static.tiles.rows)),
        by_head(k_tiles.reshape(B, -1, 1, static.tiles.keys)),
        by_head(shared),
    )
