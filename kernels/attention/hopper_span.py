"""Which key tiles a range of queries sees, in Hopper's forward kernel."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from kernels.attention.hopper_static import Static


class Span(NamedTuple):
    """Key tiles of a range of queries: all in [start, stop), those without a mask in [left, right)."""

    start: Any
    left: Any
    right: Any
    stop: Any

    def within(self, other: "Span") -> "Span":
        """What lies in both."""
        start = lax.max(self.start, other.start)
        stop = lax.max(start, lax.min(self.stop, other.stop))
        left = lax.clamp(start, lax.max(self.left, other.left), stop)
        return Span(start, left, lax.max(left, lax.min(lax.min(self.right, other.right), stop)), stop)


def span(first: Any, rows: int, k: int, static: Static) -> Span:
    """The key tiles that queries first .. first + rows see; those past T see none."""
    offset = static.S - static.T
    past = lax.min(first + rows, jnp.int32(static.T))
    tile = lambda key: lax.div(lax.max(key, jnp.int32(0)), jnp.int32(k))
    high, right = jnp.int32(static.S), jnp.int32(static.S // k)
    if static.causal:
        high, right = lax.min(high, past + offset), lax.min(right, tile(first + offset + 1))
    start = left = jnp.int32(0)
    if static.window is not None:
        start = tile(first + offset - static.window + 1)
        left = tile(past + offset - static.window + k - 1)
    stop = jnp.where(first < static.T, lax.max(start, tile(high + k - 1)), start)
    left = lax.max(start, lax.min(left, stop))
    return Span(start, left, lax.max(left, lax.min(right, stop)), stop)
