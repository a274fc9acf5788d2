"""What every Pallas attention shares: layout, tiles, segment tables, and the derivative around the two kernels.

The kernels see [heads, ...] arrays, one entry a (sequence, key head), padded with zeros to whole tiles; padded queries
give zero gradients because their cotangents are zero, padded keys are behind the diagonal or masked.
"""

import functools

import jax
import jax.numpy as jnp

from kernels.attention import mosaic_tpu, tiles
from kernels.attention.mosaic_tpu import Segments, Static
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
    G = H // K
    interpret = device().platform == "cpu"
    if S == 0:
        return jnp.zeros_like(q)
    chosen = tiles.choose(heads=B * K, G=G, T=T, S=S, D=D, window=window, interpret=interpret)
    static = Static(T, S, causal, window, scale, softcap, chosen, interpret)

    def queries(x: Array) -> Array:
        """[B, T, H, n] -> [heads, G, whole tiles of T, n]."""
        x = x.reshape(B, T, K, G, -1).transpose(0, 2, 3, 1, 4).reshape(B * K, G, T, -1)
        return _whole(x, 2, chosen.q)

    def keys(x: Array) -> Array:
        """[B, S, K, D] -> [heads, whole tiles of S, D]."""
        return _whole(x.swapaxes(1, 2).reshape(B * K, S, D), 1, chosen.k)

    segments = None if segment_ids is None else _segments(*segment_ids, K, G, static)
    o = _attend(queries(q), keys(k), keys(v), None if gate is None else queries(gate), segments, static)
    return o[:, :, :T].reshape(B, K, G, T, D).transpose(0, 3, 1, 2, 4).reshape(B, T, H, D)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q: Array, k: Array, v: Array, gate: Array | None, segments: Segments | None, static: Static) -> Array:
    return mosaic_tpu.forward(q, k, v, gate, segments, static, residuals=False)[0]


def _attend_forward(q, k, v, gate, segments, static):
    o, ungated, lse = mosaic_tpu.forward(q, k, v, gate, segments, static, residuals=True)
    return o, (q, k, v, gate, segments, ungated, lse)


def _attend_backward(static: Static, kept: tuple, do: Array) -> tuple:
    q, k, v, gate, segments, ungated, lse = kept
    do, dgate, delta = _before_backward(do, ungated, gate)
    dq, dk, dv = mosaic_tpu.backward(q, k, v, do, lse, _rows(delta, static.tiles.q), segments, static)
    return dq, dk, dv, dgate, None


_attend.defvjp(_attend_forward, _attend_backward)


def _before_backward(do: Array, ungated: Array, gate: Array | None) -> tuple[Array, Array | None, Array]:
    """(cotangent of the ungated output, dgate, delta [heads, G, T]): one pass over do and o, which XLA fuses."""
    wide, ungated = do.astype(jnp.float32), ungated.astype(jnp.float32)
    if gate is None:
        return do, None, jnp.sum(wide * ungated, axis=-1)
    open_ = jax.nn.sigmoid(gate.astype(jnp.float32))
    dgate = wide * ungated * (open_ * (1 - open_))
    if gate.shape[-1] == 1:
        dgate = jnp.sum(dgate, axis=-1, keepdims=True)
    inner = wide * open_
    return inner.astype(do.dtype), dgate.astype(gate.dtype), jnp.sum(inner * ungated, axis=-1)


def _whole(x: Array, axis: int, tile: int) -> Array:
    """Zeros behind the last row, up to a whole tile."""
    missing = -x.shape[axis] % tile
    if not missing:
        return x
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])


def _rows(x: Array, bq: int) -> Array:
    """[heads, G, T] -> [heads, query tiles, 1, R]: as the rows of a packed tile lie."""
    heads, G, T = x.shape
    return x.reshape(heads, G, T // bq, bq).swapaxes(1, 2).reshape(heads, T // bq, 1, G * bq)


def _segments(q_ids: Array, kv_ids: Array, K: int, G: int, static: Static) -> Segments:
    """Ids in tiles, and which tiles of the plan may hold a shared segment: where the ranges of their ids overlap."""
    B = q_ids.shape[0]
    _, bq, bk = static.tiles
    # Padding repeats the last id, so that it widens no range.
    grow = lambda x, tile: jnp.pad(x, ((0, 0), (0, -x.shape[1] % tile)), mode="edge")
    q_tiles = grow(q_ids, bq).reshape(B, -1, bq)
    k_tiles = grow(kv_ids, bk).reshape(B, -1, bk)
    plan = static.plan()
    low_q, high_q = q_tiles.min(-1)[:, plan.q], q_tiles.max(-1)[:, plan.q]
    low_k, high_k = k_tiles.min(-1)[:, plan.k], k_tiles.max(-1)[:, plan.k]
    run = (low_q <= high_k) & (low_k <= high_q)
    heads = lambda x: jnp.repeat(x.astype(jnp.int32), K, axis=0)
    return Segments(heads(jnp.tile(q_tiles, (1, 1, G)))[:, :, None], heads(k_tiles)[:, :, None], heads(run))
