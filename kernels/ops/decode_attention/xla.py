"""Decode attention in plain XLA: a write into the ring buffer, then one masked attention over its slots.

A softmax does not depend on the order of its terms, so the slots are never put in order: slot c holds the token of age
(length - c) mod C and is visible if that age is at most length and less than the window.

Traffic   reads all C slots for any length; writes one slot. The write is in place if the cache is donated.
Limits    the scaled scores of float32 and bfloat16 operands have to fit float32; float16 has no such limit.
"""

import functools

import jax
import jax.numpy as jnp

from dantinox.kernels.einsum import accumulation_dtype
from dantinox.kernels.ops.decode_attention.kv_cache import KVCache, append_token
from dantinox.kernels.ops.decode_attention.numbers import narrow_weights, split_scale
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
) -> tuple[Array, KVCache]:
    """See `dantinox.kernels.decode_attention`, which checks the arguments."""
    B, H, D = q.shape
    K, C = cache.k.shape[1:3]
    new_cache = append_token(cache, k, v)

    length = cache.length[:, None]
    age = length % C - jnp.arange(C, dtype=length.dtype)[None]  # [B, C]
    age = jnp.where(age < 0, age + C, age)  # a remainder per slot would take longer
    visible = (age <= length if window is None else (age <= length) & (age < window))[:, None]  # [B, 1, C]
    k_scale, v_scale = (
        None if x is None else jnp.where(visible, x, 0)[:, :, None] for x in (new_cache.k_scale, new_cache.v_scale)
    )

    q_heads, scale = split_scale(q.reshape(B, K, H // K, D), scale)
    scores = _product("BKGD,BKCD->BKGC", q_heads, new_cache.k.astype(q.dtype), visible)
    # Slots past the length may hold anything, NaN included. Selections on both sides keep it out of gradients too.
    visible_heads = visible[:, :, None]
    scores = jnp.where(visible_heads, scores, 0)
    scores = scores if k_scale is None else scores * k_scale
    if softcap is not None:
        scores, scale = soft_cap(scores * scale, softcap), 1.0
    lowest = jnp.finfo(scores.dtype).min
    row_max = jax.lax.stop_gradient(jnp.max(jnp.where(visible_heads, scores, lowest), axis=-1, keepdims=True))
    # The difference is scaled, not the scores, which may overflow with float16 operands.
    exponents = (jnp.where(visible_heads, scores, row_max) - row_max) * scale
    weights = jnp.where(visible_heads, jnp.exp(exponents), 0)
    weights = weights / jnp.sum(weights, axis=-1, keepdims=True)  # not 0: the new token attends to itself
    weights = weights if v_scale is None else weights * v_scale
    weights, factor = narrow_weights(weights, q.dtype)
    visible_v = jnp.where(visible[..., None], new_cache.v, 0).astype(q.dtype)
    o = _product("BKGC,BKCD->BKGD", weights, visible_v, visible)
    o = (o if factor is None else o * factor).reshape(B, H, D)
    if gate is not None:
        o = o * jax.nn.sigmoid(gate.astype(o.dtype))
    return o.astype(q.dtype), new_cache


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
