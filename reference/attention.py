"""The specification of attention: all scores, one mask, one softmax.

Every step rounds to the precision of the inputs. In float16 it keeps float32's range, because scores and their
gradients can be beyond 65504 where the results are not.
"""

import functools
import math
from typing import Any

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


def _tanh_below_cap(s: Float[Array, "..."], cap: float) -> tuple[Float[Array, "..."], Bool[Array, "..."]]:
    """Return (tanh(s / cap), whether cap * tanh(s / cap) rounds to s, where it gives 0 because s / cap may vanish)."""
    is_linear = jnp.abs(s) < cap * float(jnp.finfo(s.dtype).eps) ** 0.5
    shrink = 16 if cap > 1 else 1  # 1 / cap may vanish too
    return jnp.tanh(jnp.where(is_linear, 0, s / shrink) / (cap / shrink)), is_linear


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def soft_cap(s: Float[Array, "..."], cap: float) -> Float[Array, "..."]:
    """Return cap * tanh(s / cap)."""
    t, is_linear = _tanh_below_cap(s, cap)
    return jnp.where(is_linear, s, cap * t)


@soft_cap.defjvp
def _soft_cap_jvp(cap: float, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    t, _ = _tanh_below_cap(*primals, cap)
    return soft_cap(*primals, cap), tangents[0] * (1 - t * t)


@jax.custom_jvp
def sigmoid(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return 1 / (1 + exp(-x)), whose derivative does not round to zero for a large x."""
    return jax.nn.sigmoid(x)


@sigmoid.defjvp
def _sigmoid_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    return sigmoid(x), dx * (sigmoid(x) * sigmoid(-x))


def attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K Dv"],
    *,
    gate: Float[Array, "B T H #Dv"] | None = None,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    segment_ids: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
    sinks: Float[Array, "H"] | None = None,
    return_lse: bool = False,
) -> Any:
    """Compute o = sigmoid(gate) * softmax(softcap * tanh(scale * q k^T / softcap) + mask) v.

    Args:
        q: queries [B, T, H, D].
        k: keys [B, S, K, D]; H is a multiple of K.
        v: values [B, S, K, Dv].
        gate: logits [B, T, H, Dv] or [B, T, H, 1], or None for no gate.
        causal: whether a query sees no later key; query t is at position S - T + t of the keys (bottom-right).
        window: number of keys that a query sees, its own included; needs causal. None: no limit.
        scale: factor on the scores; None: D**-0.5.
        softcap: caps the scores s at softcap * tanh(s / softcap); None: no cap.
        segment_ids: (q_ids [B, T], kv_ids [B, S]); a query sees only keys of its own segment. None: one segment.
        sinks: logits [H], each the score of one more key of its head, which every query sees and whose value is zero.
        return_lse: whether to return the log-sum-exp of the scores too.

    Returns:
        o [B, T, H, Dv] in q's dtype; zeros for a query that sees no key. With `return_lse`, (o, lse [B, T, H]): natural
        logarithms, -inf for a query that sees neither a key nor a sink.
    """
    B, T, H, D = q.shape
    S, K, Dv = k.shape[1], k.shape[2], v.shape[3]
    dtype = q.dtype
    scale = D**-0.5 if scale is None else scale
    if dtype == jnp.float16:
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    if 0 < abs(scale) < 2**-12:  # half its power of two for q and for k, or their product may not fit
        half = 2.0 ** (math.frexp(scale)[1] // 2)
        q, k, scale = q * half, k * half, scale / half**2

    def rounded(x: Array) -> Array:
        return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=10) if dtype == jnp.float16 else x

    mask = visible(T, S, causal=causal, window=window)[None]
    if segment_ids is not None:
        q_ids, kv_ids = segment_ids
        mask = mask & (q_ids[:, :, None] == kv_ids[:, None, :])
    mask = mask[:, None, None]  # [B, 1, 1, T, S]

    # Keys that no query attends to may hold NaN, and 0 * NaN is NaN: zero them.
    attended = jnp.any(mask, axis=(1, 2, 3))[:, :, None, None]  # [B or 1, S, 1, 1]
    k, v = jnp.where(attended, k, 0), jnp.where(attended, v, 0)
    scores = rounded(jnp.einsum("BTKGD,BSKD->BKGTS", q.reshape(B, T, K, H // K, D), k))
    scores = rounded(scores * scale)
    if softcap is not None:
        scores = rounded(soft_cap(jnp.where(mask, scores, 0), softcap))
    scores = jnp.where(mask, scores, -jnp.inf)
    sink = jnp.full(H, -jnp.inf) if sinks is None else sinks
    sink = sink.astype(scores.dtype).reshape(1, K, H // K, 1, 1)
    row_max = jnp.max(scores, axis=-1, keepdims=True, initial=jnp.finfo(scores.dtype).min)
    row_max = jax.lax.stop_gradient(jnp.maximum(row_max, sink))
    weights = rounded(jnp.exp(scores - row_max))
    total = rounded(jnp.sum(weights, axis=-1, keepdims=True) + jnp.exp(sink - row_max))
    # The weight of a masked value has a gradient too, which may be infinite: the mask removes it.
    weights = rounded(jnp.where(mask, weights / jnp.where(total == 0, 1, total), 0))
    o = rounded(jnp.einsum("BKGTS,BSKD->BTKGD", weights, v).reshape(B, T, H, Dv))
    if gate is not None:
        o = o * sigmoid(gate.astype(o.dtype))
    if not return_lse:
        return o.astype(dtype)
    lse = jnp.where(total == 0, -jnp.inf, row_max + jnp.log(jnp.where(total == 0, 1, total)))
    lse = jnp.moveaxis(lse[..., 0], 3, 1).reshape(B, T, H)
    return o.astype(dtype), lse.astype(jnp.promote_types(dtype, jnp.float32))
