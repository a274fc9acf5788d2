"""Attention in plain XLA: banded under a window, chunked if T x S scores would not fit.

Three algorithms share one softmax:
    one block   T x S scores at once, for short sequences.
    banded      query blocks of b rows, each against the ceil((W-1)/b)+1 key blocks it sees: T (W + 2b) scores.

                    keys ->   0   1   2   3
                    block 0   ▚   ░   ░   ░       ▚ computed, masked at the edges
                    block 1   ▚   ▚   ░   ░       ░ never computed, forward or backward
                    block 2   ░   ▚   ▚   ░       (W <= b + 1)
                    block 3   ░   ░   ▚   ▚

    chunked     a long causal or full attention in at most 8 chunks, each against the keys up to its diagonal, scanned
                over query blocks that the backward pass recomputes: memory linear in S.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dantinox.kernels.einsum import accumulation_dtype, einsum
from dantinox.kernels.ops.attention.common import split_small_scale
from dantinox.kernels.softcap import soft_cap

Array = jax.Array

MAX_DENSE_SCORES = 2**20  # T * S up to which all scores are built at once
CHUNK_BLOCK_Q = 256  # queries per block of a chunk


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
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:
    """See `dantinox.kernels.attention`, which checks the arguments."""
    B, T, H, D = q.shape
    S, K = k.shape[1:3]
    ids = segment_ids if segment_ids is not None else (None, None)
    q, k, scale = split_small_scale(q, k, scale)
    # Heads first: [B, K, G, T, D] and [B, K, S, D].
    q = q.reshape(B, T, K, H // K, D).transpose(0, 2, 3, 1, 4)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    core = _SoftmaxAttention(scale, softcap, return_lse)
    is_symbolic = not (isinstance(T, int) and isinstance(S, int))
    block = T if is_symbolic else _band_block_q(window, T)
    if window is not None and not is_symbolic and window + 2 * block < S:
        out = _banded(core, q, k, v, *ids, window, block)
    elif is_symbolic or T * S <= MAX_DENSE_SCORES:
        out = core(q, k, v, *_visible_mask(jnp.arange(T) + S - T, jnp.arange(S), *ids, causal, window))
    else:
        out = _chunked(core, q, k, v, *ids, causal, window)
    out = jax.tree.map(lambda x: x.transpose(0, 3, 1, 2, 4).reshape(B, T, H, x.shape[-1]), out)
    o = out.o if gate is None else out.o * _sigmoid(gate.astype(out.o.dtype))
    o = o.astype(k.dtype)
    return o if out.lse is None else (o, out.lse[..., 0])


class BlockOutput(NamedTuple):
    """Results for one block of queries, in float32 or wider.

    Attributes:
        o: [..., t, Dv].
        lse: [..., t, 1], or None.
    """

    o: Array
    lse: Array | None


class _SoftmaxAttention:
    """Softmax attention of one block: q [..., G, t, D], k and v [..., s, D], mask broadcast to [..., G, t, s]."""

    def __init__(self, scale: float, softcap: float | None, return_lse: bool) -> None:
        self.scale, self.softcap, self.return_lse = scale, softcap, return_lse

    def __call__(self, q: Array, k: Array, v: Array, mask: Array, attended: Array | None) -> BlockOutput:
        """Return the results of [..., G, t] queries; keys outside `attended` [..., s] become zeros."""
        acc_dtype = accumulation_dtype(q.dtype)
        batch = "BKn"[: q.ndim - 3]
        if attended is not None:
            k, v = (jnp.where(attended[..., None], x, 0) for x in (k, v))
        scores = einsum(f"{batch}GTD,{batch}SD->{batch}GTS", q, k, acc_dtype) * self.scale
        if self.softcap is not None:
            # Masked scores may be infinite or NaN, and the cap's derivative there too.
            scores = soft_cap(jnp.where(mask, scores, 0), self.softcap)
        scores = jnp.where(mask, scores, -jnp.inf)
        m = jnp.max(scores, axis=-1, keepdims=True, initial=jnp.finfo(acc_dtype).min)
        m = jax.lax.stop_gradient(m)
        p = jnp.exp(scores - m)
        l = jnp.sum(p, axis=-1, keepdims=True)
        if v.dtype == jnp.bfloat16:
            # v p, so that the gradient of p stays in float32: the softmax subtracts two of them, and a query that sees
            # one key has none.
            o = einsum(f"{batch}SD,{batch}GTS->{batch}GTD", v, p, acc_dtype)
        else:  # float16 has no room for small weights: p v in float32, or TF32 on a GPU
            o = einsum(f"{batch}GTS,{batch}SD->{batch}GTD", p, v, acc_dtype)
        safe_l = jnp.where(l == 0, 1, l)
        return BlockOutput(o / safe_l, jnp.where(l == 0, -jnp.inf, m + jnp.log(safe_l)) if self.return_lse else None)


@jax.custom_jvp
def _sigmoid(x: Array) -> Array:
    return jax.nn.sigmoid(x)


@_sigmoid.defjvp
def _sigmoid_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    sigmoid = _sigmoid(x)
    return sigmoid, dx * (sigmoid * _sigmoid(-x))  # 1 - sigmoid rounds to zero from x = 17 on


def _visible_mask(
    q_pos: Array, k_pos: Array, q_ids: Array | None, kv_ids: Array | None, causal: bool, window: int | None
) -> tuple[Array, Array | None]:
    """Return (mask [B or 1, 1, 1, t, s], attended [B or 1, 1, s] or None if every key is attended)."""
    distance = q_pos[:, None] - k_pos[None]
    mask = jnp.broadcast_to(k_pos >= 0, distance.shape)[None]
    if causal:
        mask &= (distance >= 0)[None]
    if window is not None:
        mask &= (distance < window)[None]
    if q_ids is not None:
        mask &= q_ids[:, :, None] == kv_ids[:, None]
    all_attended = q_ids is None and window is None
    return mask[:, None, None], None if all_attended else jnp.any(mask, axis=1)[:, None]


def _band_block_q(window: int | None, T: int) -> int:
    """Return the queries b per block: about half the window, so that few of the W + 2b keys are masked."""
    if window is None:
        return T
    return max(1, min(T, max(32, min(256, 2 ** math.ceil(math.log2(max(window / 2, 1)))))))


def _banded(
    core: _SoftmaxAttention,
    q: Array,
    k: Array,
    v: Array,
    q_ids: Array | None,
    kv_ids: Array | None,
    window: int,
    block: int,
) -> BlockOutput:
    B, K, G, T, D = q.shape
    S = k.shape[2]
    num_q_blocks, num_past_blocks = -(-T // block), -(-(window - 1) // block)  # the latter before a query's own
    # Padded key block j starts at position (j - num_past_blocks) * block + S - T, so query block i sees key blocks
    # i .. i + num_past_blocks.
    pad_left, pad_right = num_past_blocks * block - (S - T), num_q_blocks * block - T

    def gather_bands(x: Array, axis: int) -> Array:
        """Rearrange [..., S, ...] to [..., num_q_blocks, band, ...], with zeros in place of missing keys."""
        x = jax.lax.slice_in_dim(x, max(0, -pad_left), S, axis=axis)
        pad = [(0, 0)] * x.ndim
        pad[axis] = (max(0, pad_left), pad_right)
        x = jnp.pad(x, pad)
        x = x.reshape(*x.shape[:axis], num_q_blocks + num_past_blocks, block, *x.shape[axis + 1 :])
        shifted = [jax.lax.slice_in_dim(x, j, j + num_q_blocks, axis=axis) for j in range(num_past_blocks + 1)]
        return jnp.concatenate(shifted, axis=axis + 1)

    q = jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, pad_right), (0, 0)))
    q = q.reshape(B, K, G, num_q_blocks, block, D).swapaxes(2, 3)  # [B, K, num_q_blocks, G, block, D]
    band = (num_past_blocks + 1) * block
    distance = jnp.arange(block)[:, None] + num_past_blocks * block - jnp.arange(band)[None]
    band_start = jnp.arange(num_q_blocks) * block + S - T - num_past_blocks * block
    k_pos = band_start[:, None] + jnp.arange(band)[None]
    mask = ((distance >= 0) & (distance < window))[None] & ((k_pos >= 0) & (k_pos < S))[:, None]
    mask = mask[None]  # [1, num_q_blocks, block, band]
    if q_ids is not None:
        q_ids = jnp.pad(q_ids, ((0, 0), (0, pad_right))).reshape(B, num_q_blocks, block)
        mask = mask & (q_ids[..., None] == gather_bands(kv_ids, 1)[:, :, None])
    attended = None if q_ids is None and T == S else jnp.any(mask, axis=2)[:, None]
    out = core(q, gather_bands(k, 2), gather_bands(v, 2), mask[:, None, :, None], attended)
    return jax.tree.map(
        lambda x: x.swapaxes(2, 3).reshape(B, K, G, num_q_blocks * block, x.shape[-1])[:, :, :, :T], out
    )


def _chunked(
    core: _SoftmaxAttention,
    q: Array,
    k: Array,
    v: Array,
    q_ids: Array | None,
    kv_ids: Array | None,
    causal: bool,
    window: int | None,
) -> BlockOutput:
    B, K, G, T, D = q.shape
    S = k.shape[2]
    block = min(CHUNK_BLOCK_Q, T)
    chunk = block * max(1, -(-T // (8 * block)))  # at most 8 chunks of whole blocks
    chunk_outputs = []
    for start in range(0, T, chunk):
        chunk_T = min(chunk, T - start)
        num_blocks = -(-chunk_T // block)
        kv_end = min(S, max(1, start + chunk_T + S - T)) if causal else S  # keys past the diagonal are never read
        keys, values = k[:, :, :kv_end], v[:, :, :kv_end]
        q_chunk = jnp.pad(
            q[:, :, :, start : start + chunk_T], ((0, 0), (0, 0), (0, 0), (0, num_blocks * block - chunk_T), (0, 0))
        )
        q_chunk = jnp.moveaxis(q_chunk.reshape(B, K, G, num_blocks, block, D), 3, 0)
        q_start = jnp.arange(num_blocks) * block + start + S - T
        scan_inputs = [q_chunk, q_start]
        if q_ids is not None:
            ids_chunk = jnp.pad(q_ids[:, start : start + chunk_T], ((0, 0), (0, num_blocks * block - chunk_T)))
            scan_inputs.append(jnp.moveaxis(ids_chunk.reshape(B, num_blocks, block), 1, 0))

        @jax.checkpoint
        def attend_block(keys, values, q_block, q_start, ids=None, kv_end=kv_end):
            mask, attended = _visible_mask(
                q_start + jnp.arange(block),
                jnp.arange(kv_end),
                ids,
                None if ids is None else kv_ids[:, :kv_end],
                causal,
                window,
            )
            return core(q_block, keys, values, mask, attended)

        _, out = jax.lax.scan(
            lambda c, xs, kv=(keys, values), f=attend_block: (c, f(*kv, *xs)), None, tuple(scan_inputs)
        )

        def join_blocks(x, length=num_blocks * block, chunk_T=chunk_T):
            return jnp.moveaxis(x, 0, 3).reshape(B, K, G, length, x.shape[-1])[:, :, :, :chunk_T]

        chunk_outputs.append(jax.tree.map(join_blocks, out))
    return jax.tree.map(lambda *chunks: jnp.concatenate(chunks, axis=3), *chunk_outputs)
