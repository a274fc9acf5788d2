"""Attention under a boolean mask, for adapters: the mask becomes the causal, window and segment_ids of `attention`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dantinox import kernels

NO_SUCH_MASK = "a mask that no causal, window and segment_ids describe"


class NotMapped(Exception):
    """The operation has no arguments for what a call asks for; the message is the reason."""


@dataclasses.dataclass(frozen=True)
class Form:
    """The arguments of `attention` that have the effect of a mask [b, h, T, S].

    Attributes:
        offset: query t sees no key after t + offset; None: not causal.
        window: number of keys that a query sees, or None.
        q_order, k_order: the queries [T] and keys [S] in the order in which that holds.
        q_valid, k_valid: queries [b, h, T] and keys [b, h, S], in that order, that take part; None: all.
    """

    offset: int | None
    window: int | None
    q_order: np.ndarray
    k_order: np.ndarray
    q_valid: np.ndarray | None
    k_valid: np.ndarray | None


def find_form(mask: np.ndarray) -> Form:
    """Find the form of a mask [b, h, T, S], or raise NotMapped."""
    T, S = mask.shape[-2:]
    queries, keys = np.arange(T), np.arange(S)
    q_valid, k_valid = mask.any(-1), mask.any(-2)
    if (mask == q_valid[..., None] & k_valid[..., None, :]).all():
        everything = q_valid.all() and k_valid.all()
        return Form(None, None, queries, keys, *((None, None) if everything else (q_valid, k_valid)))
    union = mask.any((0, 1))
    by_count = np.argsort(union.sum(1), kind="stable"), np.argsort(-union.sum(0), kind="stable")
    for q_order, k_order in ((queries, keys), by_count):
        ordered = mask[..., q_order, :][..., k_order]
        q_valid, k_valid = ordered.any(-1), ordered.any(-2)
        seen = union[q_order][:, k_order]
        t = np.flatnonzero(seen.any(1))
        first, last = seen[t].argmax(1), S - 1 - seen[t, ::-1].argmax(1)
        offset = int((last - t).max())
        distance = queries[:, None] + offset - keys
        for window in (None, int((t + offset - first).max()) + 1):
            band = (distance >= 0) & (distance < (window or T + S + abs(offset)))
            if (ordered == band).all():
                return Form(offset, window, q_order, k_order, None, None)
            if (ordered == band & q_valid[..., None] & k_valid[..., None, :]).all():
                return Form(offset, window, q_order, k_order, q_valid, k_valid)
    raise NotMapped(NO_SUCH_MASK)


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: np.ndarray | None, **options: Any
) -> tuple[jax.Array, jax.Array]:
    """Run `dantinox.kernels.attention` under a mask that broadcasts to [B, H, T, S]; returns (o, lse)."""
    if mask is None:
        return kernels.attention(q, k, v, causal=False, return_lse=True, **options)
    B, T, H, S = *q.shape[:3], k.shape[1]
    form = find_form(np.broadcast_to(mask, (*mask.shape[:-2], T, S)))
    if form.q_valid is not None and form.q_valid.shape[1] > 1:  # each head has a mask of its own: make it a sequence
        k, v = (jnp.repeat(x, H // x.shape[2], axis=2) for x in (k, v))
        q, k, v = (x.swapaxes(1, 2).reshape(B * H, -1, 1, x.shape[-1]) for x in (q, k, v))
        o, lse = attention(q, k, v, np.broadcast_to(mask, (B, H, T, S)).reshape(B * H, 1, T, S), **options)
        return o.reshape(B, H, T, -1).swapaxes(1, 2), lse.reshape(B, H, T).swapaxes(1, 2)
    q, k, v = _take(q, form.q_order), _take(k, form.k_order), _take(v, form.k_order)
    # Query t is at position keys - T + t of the keys: as many as that, cut off or hidden, give it its offset.
    keys = S if form.offset is None else T + form.offset
    if keys < 1:
        raise NotMapped("no query sees a key")
    k, v = (jnp.pad(x[:, :keys], ((0, 0), (0, max(keys - S, 0)), (0, 0), (0, 0))) for x in (k, v))
    segment_ids = None
    if form.q_valid is not None or keys > S:
        q_valid = np.ones((B, T), bool) if form.q_valid is None else np.broadcast_to(form.q_valid[:, 0], (B, T))
        k_valid = np.ones((B, S), bool) if form.k_valid is None else np.broadcast_to(form.k_valid[:, 0], (B, S))
        k_valid = np.pad(k_valid[:, :keys], ((0, 0), (0, max(keys - S, 0))))
        segment_ids = np.where(q_valid, 1, 2).astype(np.int32), np.where(k_valid, 1, 3).astype(np.int32)
    causal = form.offset is not None
    o, lse = kernels.attention(
        q, k, v, causal=causal, window=form.window, segment_ids=segment_ids, return_lse=True, **options
    )
    back = np.argsort(form.q_order)
    return _take(o, back), _take(lse, back)


def _take(x: jax.Array, order: np.ndarray) -> jax.Array:
    """Return x [B, N, ...] in another order of N, a gather only where that is one."""
    return x if (order == np.arange(len(order))).all() else jnp.take(x, order, axis=1)
