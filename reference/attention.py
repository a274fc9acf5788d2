"""The specification of attention: all scores, one mask, one softmax."""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

Array = jax.Array


def visible(T: int, S: int, *, causal: bool, window: int | None) -> Bool[Array, "T S"]:
    """Return which keys each query attends to, aligned bottom-right: query t is at position S - T + t of the keys."""
    distance = (jnp.arange(T)[:, None] + S - T) - jnp.arange(S)[None, :]
    mask = jnp.ones((T, S), bool)
    if causal:
        mask &= distance >= 0
    if window is not None:
        mask &= distance < window
    return mask


def attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    *,
    gate: Float[Array, "B T H #D"] | None = None,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    segment_ids: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
) -> Float[Array, "B T H D"]:
    """Compute o = sigmoid(gate) * softmax(softcap * tanh(scale * q k^T / softcap) + mask) v.

    Args:
        q: queries [B, T, H, D].
        k: keys [B, S, K, D]; H is a multiple of K.
        v: values [B, S, K, D].
        gate: logits [B, T, H, D] or [B, T, H, 1], or None for no gate.
        causal: whether a query sees no later key; query t is at position S - T + t of the keys (bottom-right).
        window: number of keys that a query sees, its own included; needs causal. None: no limit.
        scale: factor on the scores; None: D**-0.5.
        softcap: caps the scores s at softcap * tanh(s / softcap); None: no cap.
        segment_ids: (q_ids [B, T], kv_ids [B, S]); a query sees only keys of its own segment. None: one segment.

    Returns:
        [B, T, H, D] in q's dtype; zeros for a query that sees no key.
    """
    B, T, H, D = q.shape
    S, K = k.shape[1], k.shape[2]
    scale = D**-0.5 if scale is None else scale
    mask = visible(T, S, causal=causal, window=window)[None]
    if segment_ids is not None:
        q_ids, kv_ids = segment_ids
        mask = mask & (q_ids[:, :, None] == kv_ids[:, None, :])
    mask = mask[:, None, None]  # [B, 1, 1, T, S]

    # Keys that no query attends to may hold NaN, and 0 * NaN is NaN: zero them.
    attended = jnp.any(mask, axis=(1, 2, 3))[:, :, None, None]  # [B or 1, S, 1, 1]
    k, v = jnp.where(attended, k, 0), jnp.where(attended, v, 0)
    scores = jnp.einsum("BTKGD,BSKD->BKGTS", q.reshape(B, T, K, H // K, D), k) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(mask, scores, -jnp.inf)
    row_max = jnp.max(scores, axis=-1, keepdims=True, initial=jnp.finfo(scores.dtype).min)
    weights = jnp.where(mask, jnp.exp(scores - jax.lax.stop_gradient(row_max)), 0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(total == 0, 1, total)
    o = jnp.einsum("BKGTS,BSKD->BTKGD", weights, v).reshape(B, T, H, D)
    if gate is not None:
        o = o * jax.nn.sigmoid(gate)
    return o.astype(q.dtype)
