"""The rows of one KV head: the T * G queries of its G query heads, token by token; G alone for one new token."""

import jax
import jax.numpy as jnp

Array = jax.Array


def group_rows(x: Array, K: int) -> Array:
    """Rearrange [B, H, n] to [B, K, G, n], or [B, T, H, n] to [B, K, T * G, n]."""
    if x.ndim == 4:
        B, T, H, n = x.shape
        return x.reshape(B, T, K, H // K, n).swapaxes(1, 2).reshape(B, K, T * (H // K), n)
    return x.reshape(x.shape[0], K, x.shape[1] // K, x.shape[2])


def ungroup_rows(x: Array, shape: tuple[int, ...]) -> Array:
    """Rearrange the rows [B, K, T * G, D] of queries back to their shape, [B, H, D] or [B, T, H, D]."""
    if len(shape) == 3:
        return x.reshape(shape)
    B, T, H, D = shape
    K = x.shape[1]
    return x.reshape(B, K, T, H // K, D).swapaxes(1, 2).reshape(shape)


def group_sinks(sinks: Array, K: int, T: int) -> Array:
    """Rearrange sinks [H] to one per row, [1, K, T * G, 1]."""
    G = sinks.shape[0] // K
    return jnp.broadcast_to(sinks.reshape(1, K, 1, G), (1, K, T, G)).reshape(1, K, T * G, 1)
