"""The best that plain XLA does for attention: banded where there is a window, chunked where S x S would not fit.

Three ways, one core:
    one block   T x S scores at once, for short sequences.
    banded      query blocks of b rows, each against the ceil((W-1)/b)+1 key blocks it can see: T (W + 2b) scores.

                    keys ->   0   1   2   3
                    block 0   ▚   ░   ░   ░       ▚ computed, masked at the edges
                    block 1   ▚   ▚   ░   ░       ░ never built, forward or backward
                    block 2   ░   ▚   ▚   ░       (W <= b + 1)
                    block 3   ░   ░   ▚   ▚

    chunked     a long causal or full attention in at most 8 chunks, each against the keys up to its diagonal, scanned
                over query blocks that the backward pass recomputes: memory linear in S.
"""

import math

import jax
import jax.numpy as jnp

from dantinox.kernels.einsum import einsum

Array = jax.Array

ONE_BLOCK = 2**20  # T * S up to which all scores are built at once
CHUNK_ROWS = 256


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
    ids = segment_ids if segment_ids is not None else (None, None)
    # Heads in front: [B, K, G, T, D] and [B, K, S, D].
    q = q.reshape(B, T, K, H // K, D).transpose(0, 2, 3, 1, 4)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    core = _Core(scale, softcap)
    block = _band_rows(window, T)
    if window is not None and window + 2 * block < S:
        o = _banded(core, q, k, v, *ids, window, block)
    elif T * S <= ONE_BLOCK:
        o = core(q, k, v, *_visible(jnp.arange(T) + S - T, jnp.arange(S), *ids, causal, window))
    else:
        o = _chunked(core, q, k, v, *ids, causal, window)
    o = o.transpose(0, 3, 1, 2, 4).reshape(B, T, H, D)
    if gate is not None:
        o = o * jax.nn.sigmoid(gate.astype(o.dtype))
    return o.astype(k.dtype)


class _Core:
    """Softmax attention of one block: q [..., G, t, D], k and v [..., s, D], mask broadcast to [..., G, t, s]."""

    def __init__(self, scale: float, softcap: float | None) -> None:
        self.scale, self.softcap = scale, softcap

    def __call__(self, q: Array, k: Array, v: Array, mask: Array, seen: Array | None) -> Array:
        """[..., G, t, D] in float32 or wider. `seen` [..., s]: keys that some query sees; the others are cleared."""
        wide = jnp.promote_types(q.dtype, jnp.float32)
        batch = "BKn"[: q.ndim - 3]
        if seen is not None:
            k, v = (jnp.where(seen[..., None], x, 0) for x in (k, v))
        scores = einsum(f"{batch}GTD,{batch}SD->{batch}GTS", q, k, wide) * self.scale
        if self.softcap is not None:
            scores = self.softcap * jnp.tanh(scores / self.softcap)
        scores = jnp.where(mask, scores, -jnp.inf)
        top = jnp.max(scores, axis=-1, keepdims=True, initial=jnp.finfo(wide).min)
        weights = jnp.exp(scores - jax.lax.stop_gradient(top))
        total = jnp.sum(weights, axis=-1, keepdims=True)
        o = einsum(f"{batch}GTS,{batch}SD->{batch}GTD", weights.astype(v.dtype), v, wide)
        return o / jnp.where(total == 0, 1, total)


def _visible(
    q_pos: Array, k_pos: Array, q_ids: Array | None, kv_ids: Array | None, causal: bool, window: int | None
) -> tuple[Array, Array | None]:
    """(mask [B or 1, 1, 1, t, s], seen [B or 1, 1, s] or None where every key has a query)."""
    distance = q_pos[:, None] - k_pos[None]
    mask = jnp.broadcast_to(k_pos >= 0, distance.shape)[None]
    if causal:
        mask &= distance >= 0
    if window is not None:
        mask &= distance < window
    if q_ids is not None:
        mask &= q_ids[:, :, None] == kv_ids[:, None]
    every = q_ids is None and window is None
    return mask[:, None, None], None if every else jnp.any(mask, axis=1)[:, None]


def _band_rows(window: int | None, T: int) -> int:
    """Rows b of a query block: about half the window, so that few of the W + 2b keys are masked."""
    if window is None:
        return T
    return max(1, min(T, max(32, min(256, 2 ** math.ceil(math.log2(max(window / 2, 1)))))))


def _banded(
    core: _Core,
    q: Array,
    k: Array,
    v: Array,
    q_ids: Array | None,
    kv_ids: Array | None,
    window: int,
    block: int,
) -> Array:
    B, K, G, T, D = q.shape
    S = k.shape[2]
    n, back = -(-T // block), -(-(window - 1) // block)  # query blocks; key blocks behind a query's own
    # Key block j of the padded keys holds positions (j - back) * block + S - T ...: query block i sees i .. i + back.
    left, right = back * block - (S - T), n * block - T

    def bands(x: Array, axis: int) -> Array:
        """[..., S, ...] -> [..., n, (back + 1) * block, ...], zero where no key is."""
        x = jax.lax.slice_in_dim(x, max(0, -left), S, axis=axis)
        pad = [(0, 0)] * x.ndim
        pad[axis] = (max(0, left), right)
        x = jnp.pad(x, pad)
        x = x.reshape(*x.shape[:axis], n + back, block, *x.shape[axis + 1 :])
        parts = [jax.lax.slice_in_dim(x, j, j + n, axis=axis) for j in range(back + 1)]
        return jnp.concatenate(parts, axis=axis + 1)

    q = jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, right), (0, 0)))
    q = q.reshape(B, K, G, n, block, D).swapaxes(2, 3)  # [B, K, n, G, b, D]
    width = (back + 1) * block
    distance = jnp.arange(block)[:, None] + back * block - jnp.arange(width)[None]
    first = jnp.arange(n)[:, None] * block + S - T - back * block  # [n, 1] position of each band's first key
    k_pos = first + jnp.arange(width)
    mask = ((distance >= 0) & (distance < window))[None] & ((k_pos >= 0) & (k_pos < S))[:, None]  # [n, b, width]
    mask = mask[None]
    if q_ids is not None:
        q_ids = jnp.pad(q_ids, ((0, 0), (0, right))).reshape(B, n, block)
        mask = mask & (q_ids[..., None] == bands(kv_ids, 1)[:, :, None])
    seen = None if q_ids is None and T == S else jnp.any(mask, axis=2)[:, None]
    o = core(q, bands(k, 2), bands(v, 2), mask[:, None, :, None], seen)
    return o.swapaxes(2, 3).reshape(B, K, G, n * block, D)[:, :, :, :T]


def _chunked(
    core: _Core,
    q: Array,
    k: Array,
    v: Array,
    q_ids: Array | None,
    kv_ids: Array | None,
    causal: bool,
    window: int | None,
) -> Array:
    B, K, G, T, D = q.shape
    S = k.shape[2]
    rows = min(CHUNK_ROWS, T)
    chunk = rows * max(1, -(-T // (8 * rows)))  # at most 8 chunks of whole blocks
    outs = []
    for start in range(0, T, chunk):
        t = min(chunk, T - start)
        n = -(-t // rows)
        stop = min(S, max(1, start + t + S - T)) if causal else S  # keys beyond the diagonal are never touched
        keys, values = k[:, :, :stop], v[:, :, :stop]
        part = jnp.pad(q[:, :, :, start : start + t], ((0, 0), (0, 0), (0, 0), (0, n * rows - t), (0, 0)))
        part = jnp.moveaxis(part.reshape(B, K, G, n, rows, D), 3, 0)
        first = jnp.arange(n) * rows + start + S - T
        blocks = [part, first]
        if q_ids is not None:
            padded = jnp.pad(q_ids[:, start : start + t], ((0, 0), (0, n * rows - t)))
            blocks.append(jnp.moveaxis(padded.reshape(B, n, rows), 1, 0))

        @jax.checkpoint
        def body(keys, values, q_block, first, ids=None, stop=stop):
            mask, seen = _visible(
                first + jnp.arange(rows),
                jnp.arange(stop),
                ids,
                None if ids is None else kv_ids[:, :stop],
                causal,
                window,
            )
            return core(q_block, keys, values, mask, seen)

        _, o = jax.lax.scan(lambda c, xs, kv=(keys, values), f=body: (c, f(*kv, *xs)), None, tuple(blocks))
        outs.append(jnp.moveaxis(o, 0, 3).reshape(B, K, G, n * rows, D)[:, :, :, :t])
    return jnp.concatenate(outs, axis=3)
