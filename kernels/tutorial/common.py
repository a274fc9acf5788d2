"""What is not an idea of any rung, and the same in all: the mask, the checks and small operations."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dantinox.kernels import validation
from dantinox.kernels.dispatch import current_device

Array = jax.Array
FLOOR = -1e30  # where a running maximum starts: finite, so that exp(-inf - FLOOR) is 0 in a row that sees no key
VMEM_BYTES = 100 * 2**20  # of the 128 MiB of a v6e; without being asked the compiler takes a fraction
NT, NN = ((1,), (1,)), ((1,), (0,))  # a b^T and a b


class Mask(NamedTuple):
    """Who sees what. Query t stands at key S - T + t and sees one interval of keys; so do neighbours together."""

    T: int
    S: int
    causal: bool
    window: int | None

    def interval(self, first: Any, last: Any) -> tuple[Any, Any]:
        """(lowest, highest) key that the queries at positions first..last see between them, numbers or arrays."""
        low = 0 if self.window is None else first - self.window + 1
        return low, last if self.causal else self.S - 1

    def hide(self, s: Array, query: Array, key: Array) -> Array:
        """The scores, -inf where the query at that position may not see the key."""
        low, high = self.interval(query, query)
        return jnp.where((low <= key) & (key <= high), s, -jnp.inf)

    def clear(self, v: Array, first_key: Any) -> Array:
        """Values of the keys from first_key on, zero where no query looks: 0 * NaN would be NaN."""
        low, high = self.interval(self.S - self.T, self.S - 1)
        if low <= 0 and self.S % v.shape[0] == 0:
            return v  # every key of every tile is there, and somebody sees it
        key = first_key + iota((v.shape[0], 1), 0)
        return jnp.where((low <= key) & (key <= high), v, 0)


def dot(a: Array, b: Array, contract: tuple[tuple[int], tuple[int]]) -> Array:
    """A product of two tiles. Operands go in as they are, sums are float32: so the MXU runs at full speed."""
    return jax.lax.dot_general(a, b, (contract, ((), ())), preferred_element_type=jnp.float32)


def iota(shape: tuple[int, ...], axis: int) -> Array:
    """0, 1, 2, ... along an axis."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def heads_first(x: Array) -> Array:
    """[B, T, H, D] -> [B, H, T, D] and back: a tile's two axes must be the last ones."""
    return x.swapaxes(1, 2)


def interpreted() -> bool:
    """Whether the kernel is run by XLA, operation by operation.

    Raises:
        NotImplementedError: this device can do neither.
    """
    platform = current_device().platform
    if platform not in ("cpu", "tpu"):
        raise NotImplementedError(f"the ladder is for TPUs, and interpreted on a CPU; this device is a {platform}")
    return platform == "cpu"


def check(
    q: Array,
    k: Array,
    v: Array,
    causal: bool,
    window: int | None,
    scale: float | None,
    tiles: dict[str, int] | None = None,
    **absent: Any,
) -> tuple[Mask, float]:
    """(the mask, the scale): arguments are what the docstrings say, or it is said what they are.

    Args:
        tiles: sizes of tiles by name. absent: what this rung does not know, by name; None where it is not asked for.

    Raises:
        ValueError: a shape, dtype or value is not allowed.
        NotImplementedError: the rung cannot do this.
    """
    B, T, H, D = validation.as_array("q", q, "BTHD").shape
    S, K = validation.as_array("k", k, "BSKD").shape[1:3]
    for name, x in (("k", k), ("v", v)):
        validation.check_shape(name, x, (B, S, K, D))
    validation.check_floating(q=q, k=k, v=v)
    validation.check_heads(H, K)
    validation.check_window(window, causal)
    validation.check_scalars(scale=scale, softcap=None)
    for name, size in (tiles or {}).items():
        if size < 16 or size % 16:  # 16 rows of bfloat16 are one register
            raise ValueError(f"{name} is {size}; allowed: a multiple of 16")
    for name, value in absent.items():
        if value is not None:
            raise NotImplementedError(f"this rung has no {name}")
    if q.dtype == jnp.float64:
        raise NotImplementedError("q has dtype float64; the ladder adds up in float32")
    return Mask(T, S, causal, window), D**-0.5 if scale is None else scale
