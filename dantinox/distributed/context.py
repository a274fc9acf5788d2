"""Attention over sequences whose tokens are cut over the axis context.

    window W   a device needs the last W - 1 keys before its own tokens: its left neighbours send them (a halo exchange)
    none       every device gathers all keys and ignores those after its own

The halo is 2 (W - 1) K D values per sequence and layer, however long the sequence; all keys are 2 T K D.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dantinox.distributed.collectives import axis_index, axis_size

Array = jax.Array


def attend_over_context(
    attend: Callable[..., Array],
    sinks: Array | None,
    q: Array,
    k: Array,
    v: Array,
    gate: Array | None,
    window: int | None,
) -> Array:
    """Attend causally from this device's queries to the keys of the whole sequence.

    Args:
        attend: (sinks, q, k, v, gate, segment_ids) -> o; causal, with queries at the end of the keys.
        sinks: [H] or None.
        q: this device's queries [B, T, H, D].
        k: its keys [B, T, K, D].
        v: its values [B, T, K, D].
        gate: [B, T, H, D or 1] or None.
        window: keys per query; None: all.

    Returns:
        [B, T, H, D].
    """
    if axis_size("context") == 1:
        return attend(sinks, q, k, v, gate)
    B, T = q.shape[:2]
    if window is not None and window - 1 < T * (axis_size("context") - 1):
        k, v = (keys_with_halo(x, window - 1) for x in (k, v))
        exists = axis_index("context") * T - (window - 1) + jnp.arange(T + window - 1) >= 0
    else:
        k, v = (all_keys(x) for x in (k, v))
        exists = jnp.arange(k.shape[1]) >= (axis_size("context") - 1 - axis_index("context")) * T
    # Keys that do not exist are in a segment of their own, which no query attends to.
    kv_ids = jnp.broadcast_to(jnp.where(exists, 0, 1).astype(jnp.int32), (B, k.shape[1]))
    return attend(sinks, q, k, v, gate, segment_ids=(jnp.zeros((B, T), jnp.int32), kv_ids))


def keys_with_halo(x: Array, size: int) -> Array:
    """Return the last `size` rows of the left neighbours, then this device's: [B, T, ...] -> [B, size + T, ...].

    Rows before the first of the sequence are zeros.
    """
    devices, T = axis_size("context"), x.shape[1]
    parts = [x]
    for distance in range(1, -(-size // T) + 1):
        rows = min(T, size - (distance - 1) * T)
        pairs = [(device, device + distance) for device in range(devices - distance)]
        parts.insert(0, jax.lax.ppermute(x[:, T - rows :], "context", pairs))
    return jnp.concatenate(parts, axis=1)


def all_keys(x: Array) -> Array:
    """Return the rows of all devices, those after this device's own first: [B, T, ...] -> [B, devices * T, ...]."""
    x = jax.lax.all_gather(x, "context", axis=1, tiled=True)
    return jnp.roll(x, -(axis_index("context") + 1) * (x.shape[1] // axis_size("context")), axis=1)
