"""Decode attention in plain XLA: a write into the ring buffer, then one masked attention over its slots.

A softmax does not depend on the order of its terms, so the slots are never put in order: with T new tokens, slot c
holds the token of age (length + T - 1 - c) mod C. Query t has age T - 1 - t; it sees the slots that are at least as
old, and less than a window older. The T * G queries of a KV head are the rows of one product.

Traffic   reads all C slots for any length; writes T slots. The write is in place if the cache is donated.
Limits    the scaled scores of float32 and bfloat16 operands have to fit float32; float16 has no such limit.
"""

import functools

import jax
import jax.numpy as jnp

from dantinox.kernels.einsum import accumulation_dtype
from dantinox.kernels.ops.decode_attention.kv_cache import KVCache, append_token, append_tokens
from dantinox.kernels.ops.decode_attention.numbers import narrow_weights, split_scale
from dantinox.kernels.ops.decode_attention.rows import group_rows, group_sinks, ungroup_rows
from dantinox.kernels.softcap import soft_cap

Array = jax.Array


def decode_attention(
    q: Array,
    k: Array,
    v: Array,
    cache: KVCache,
    *,
    gate: Array | None,
    window: int | None,
    scale: float,
    softcap: float | None,
    sinks: Array | None = None,
) -> tuple[Array, KVCache]:
    """See `dantinox.kernels.decode_attention`, which checks the arguments."""
    K, T = cache.k.shape[1], 1 if q.ndim == 3 else q.shape[1]
    new_cache = append_token(cache, k, v) if q.ndim == 3 else append_tokens(cache, k, v)
    visible, visible_rows = _visible_slots(cache, T, q.shape[-2] // K, window)
    k_scale, v_scale = (
        None if x is None else jnp.where(visible, x, 0)[:, :, None] for x in (new_cache.k_scale, new_cache.v_scale)
    )

    q_heads, scale = split_scale(group_rows(q, K), scale)
    scores = _product("BKGD,BKCD->BKGC", q_heads, new_cache.k.astype(q.dtype), visible)
    # Slots past the length may hold anything, NaN included. Selections on both sides keep it out of gradients too.
    scores = jnp.where(visible_rows, scores, 0)
    scores = scores if k_scale is None else scores * k_scale
    if softcap is not None:
        scores, scale = soft_cap(scores * scale, softcap), 1.0
    lowest = jnp.finfo(scores.dtype).min
    row_max = jax.lax.stop_gradient(jnp.max(jnp.where(visible_rows, scores, lowest), axis=-1, keepdims=True))
    # The difference is scaled, not the scores, which may overflow with float16 operands.
    exponents = (jnp.where(visible_rows, scores, row_max) - row_max) * scale
    weights = jnp.where(visible_rows, jnp.exp(exponents), 0)
    total = jnp.sum(weights, axis=-1, keepdims=True)  # not 0: a new token attends to itself
    if sinks is not None:
        sink_rows = group_sinks(sinks, K, T).astype(total.dtype)
        largest = jnp.finfo(total.dtype).max
        top = jnp.clip(row_max * scale, -largest, largest)
        decay = jnp.exp(top - (peak := jax.lax.stop_gradient(jnp.maximum(top, sink_rows))))
        weights, total = weights * decay, total * decay + jnp.exp(sink_rows - peak)
    weights = weights / total
    weights = weights if v_scale is None else weights * v_scale
    weights, factor = narrow_weights(weights, q.dtype)
    visible_v = jnp.where(visible[..., None], new_cache.v, 0).astype(q.dtype)
    o = _product("BKGC,BKCD->BKGD", weights, visible_v, visible)
    o = ungroup_rows(o if factor is None else o * factor, q.shape)
    if gate is not None:
        o = o * jax.nn.sigmoid(gate.astype(o.dtype))
    return o.astype(q.dtype), new_cache


def _visible_slots(cache: KVCache, T: int, G: int, window: int | None) -> tuple[Array, Array]:
    """Return which slots any new token sees, [B, 1, C], and which each row sees, [B, 1, T * G or 1, C]."""
    C, length = cache.k.shape[2], cache.length[:, None]
    newest = length % C if T == 1 else (length % C + (T - 1)) % C
    age = newest - jnp.arange(C, dtype=length.dtype)[None]  # [B, C]
    age = jnp.where(age < 0, age + C, age)  # a remainder per slot would take longer
    if T == 1:
        visible = (age <= length if window is None else (age <= length) & (age < window))[:, None]  # [B, 1, C]
        return visible, visible[:, :, None]
    holds_token = age - (T - 1) <= length
    age_of_query = jnp.arange(T - 1, -1, -1, dtype=length.dtype)[None, :, None]
    distance = age[:, None] - age_of_query  # [B, T, C]
    rows = holds_token[:, None] & (distance >= 0)
    if window is not None:
        rows, holds_token = rows & (distance < window), holds_token & (age - (T - 1) < window)
    return holds_token[:, None], jnp.repeat(rows, G, axis=1)[:, None]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _product(spec: str, a: Array, b: Array, visible: Array) -> Array:
    """Compute an einsum of a and b [B, K, C, D] in float32, whose derivatives do not read b where it is not visible.

    The result is `jnp.einsum`'s: a masked copy of the keys takes as long as the product. The derivatives are products
    of float32 operands, since those of float16 can overflow.
    """
    return jnp.einsum(spec, a, b, preferred_element_type=accumulation_dtype(a.dtype))


@_product.defjvp
def _product_jvp(
    spec: str, primals: tuple[Array, Array, Array], tangents: tuple[Array, Array, Array]
) -> tuple[Array, Array]:
    a, b, visible = primals
    out = _product(spec, a, b, visible)
    a, b, da, db = (x.astype(out.dtype) for x in (a, jnp.where(visible[..., None], b, 0), *tangents[:2]))
    return out, jnp.einsum(spec, da, b) + jnp.einsum(spec, a, db)
