"""What every Pallas attention shares: layout, tiles, segment tables, and the derivative around the two kernels.

The kernels see one entry a (sequence, key head), in whole tiles padded with zeros. Padded queries give zero gradients
because their cotangents are zero; padded keys are behind the diagonal or masked.
"""

import functools

import jax
import jax.numpy as jnp

from dantinox.kernels import cost
from dantinox.kernels.dispatch import current_device
from dantinox.kernels.ops.attention.pallas_tpu import block_sizes, bwd, fwd
from dantinox.kernels.ops.attention.pallas_tpu.common import ALIKE, APART, MIXED, Segments, Static
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
    """See `dantinox.kernels.attention`; arguments are checked there."""
    B, T, H, D = q.shape
    S, K = k.shape[1:3]
    if S == 0:
        return jnp.zeros_like(q)
    k, v, segment_ids = zero_unattended_keys(k, v, segment_ids, T=T, causal=causal, window=window)
    S = k.shape[1]

    G, here = H // K, current_device()
    sizes = {"heads": B * K, "G": G, "T": T, "S": S, "D": D, "itemsize": q.dtype.itemsize}
    chosen = block_sizes.choose(here, causal=causal, window=window, **sizes)
    static = Static(T, S, G, causal, window, scale, softcap, chosen, here.platform == "cpu")
    segments = None if segment_ids is None else _segments(*segment_ids, K, static)
    gate = None if gate is None else _queries(gate, static)
    o = _attend(_queries(q, static), _keys(k, static), _keys(v, static).swapaxes(-1, -2), gate, segments, static)
    return _from_queries(o, static, B)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q: Array, k: Array, v: Array, gate: Array | None, segments: Segments | None, static: Static) -> Array:
    return fwd.forward(q, k, v, gate, segments, static, residuals=False, cost=_cost(q, gate, static))["o"]


def _attend_forward(q, k, v, gate, segments, static):
    out = fwd.forward(q, k, v, gate, segments, static, residuals=True, cost=_cost(q, gate, static))
    return out["o"], (q, k, v, gate, segments, out["ungated"], out["max"], out["share"])


def _attend_backward(static: Static, kept: tuple, do: Array) -> tuple:
    q, k, v, gate, segments, ungated, largest, share = kept
    do, dgate, delta = _before_backward(do, ungated, gate)
    dq, dk, dv = bwd.backward(
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


def _segments(q_ids: Array, kv_ids: Array, K: int, static: Static) -> Segments:
    """Ids in pieces, and what a tile's ids have in common, by the ranges they lie in."""
    B, (groups, heads, parts, width) = q_ids.shape[0], _packing(static)
    q_tiles, k_tiles = pad_ids_to_block(q_ids, static.tiles.q), pad_ids_to_block(kv_ids, static.tiles.k)
    apart, alike = block_segment_overlap(q_ids, static.tiles.q, kv_ids, static.tiles.k)
    shared = jnp.where(apart, APART, jnp.where(alike, ALIKE, MIXED))
    by_head = lambda x: jnp.repeat(x.astype(jnp.int32), K, axis=0)
    rows = q_tiles.reshape(B, -1, 1, parts, 1, width)
    rows = jnp.broadcast_to(rows, (B, rows.shape[1], groups, parts, heads, width))
    return Segments(
        by_head(rows.reshape(B, -1, 1, static.tiles.rows)),
        by_head(k_tiles.reshape(B, -1, 1, static.tiles.keys)),
        by_head(shared),
    )
