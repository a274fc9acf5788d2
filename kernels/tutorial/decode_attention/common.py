"""Shared by all steps: the slots that a query sees, argument checks and small operations."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dantinox.kernels import validation
from dantinox.kernels.ops.decode_attention.kv_cache import KVCache
from dantinox.kernels.precision import matmul_precision
from dantinox.kernels.tutorial.common import interpret as interpret
from dantinox.kernels.tutorial.common import iota as iota
from dantinox.kernels.tutorial.common import refuse

Array = jax.Array
M_INIT = -1e30  # start of a running maximum: finite, so that exp(-inf - M_INIT) is 0 while no slot has been visible
NT, NN = 1, 0  # the axis of b, counted from its second to last, that a product contracts: a b^T and a b
TILE_BYTES = 32  # slots x bytes per value in a memory tile of a TPU: 8 of float32, 16 of bfloat16, 32 of int8
LANES = 128  # slots in a memory tile of an array [..., K, C], such as the scales of an 8-bit cache


class Ring(NamedTuple):
    """A ring buffer of C slots in blocks: the token at position p is in slot p % C.

    Attributes:
        C: slots.
        max_visible: most tokens that a query sees: C, or the window.
        block: slots per block; the last block may be partial.
    """

    C: int
    max_visible: int
    block: int

    @property
    def num_blocks(self) -> int:
        """Blocks of the ring buffer, the partial one included."""
        return -(-self.C // self.block)

    def newest(self, length: Array) -> tuple[Array, Array]:
        """(slot of the new token, number of tokens that the query sees, the new one included), of each sequence [B]."""
        return length % self.C, jnp.minimum(length + 1, self.max_visible)

    def is_visible(self, slot: Array, newest: Array, num_visible: Array, min_age: int = 0) -> Array:
        """Whether the query sees a slot: the token in it is younger than num_visible, and the newest has age 0.

        Args:
            slot: slots, an array of any shape.
            newest: slot of the newest token.
            num_visible: tokens that the query sees.
            min_age: 1 leaves out the newest token.
        """
        age = jnp.where(slot <= newest, newest - slot, newest - slot + self.C)
        return (min_age <= age) & (age < num_visible) & (slot < self.C)


def dot(a: Array, b: Array, contract: int) -> Array:
    """Multiply the tiles of every head, a [K, n, m] by b [K, ...], in their own dtype; accumulate in float32."""
    dims = (((2,), (1 + contract,)), ((0,), (0,)))
    return jax.lax.dot_general(a, b, dims, precision=matmul_precision(a, b), preferred_element_type=jnp.float32)


def check(
    q: Array,
    k: Array,
    v: Array,
    cache: KVCache,
    window: int | None,
    scale: float | None,
    block: int,
    eight_bits: bool = False,
    **unsupported: Any,
) -> tuple[Ring, float]:
    """Check the arguments of a step.

    Args:
        q: queries [B, H, D].
        k: key of the new token [B, K, D].
        v: value of the new token [B, K, D].
        cache: the cache, k and v [B, K, C, D].
        window: tokens that a query sees, or None.
        scale: factor on the scores, or None for D**-0.5.
        block: slots per block.
        eight_bits: whether the step reads an int8 cache, and no other.
        **unsupported: arguments that the step does not support; each must be None.

    Returns:
        The ring buffer and the scale.

    Raises:
        ValueError: a shape, dtype or value is not allowed.
        NotImplementedError: the step does not support an argument.
    """
    B, H, D = validation.as_array("q", q, "BHD").shape
    K, C = validation.as_array("k", k, "BKD").shape[1], validation.as_array("cache.k", cache.k, "BKCD").shape[2]
    arrays = {"k": (k, (B, K, D)), "v": (v, (B, K, D)), "cache.length": (cache.length, (B,))}
    arrays |= {"cache.k": (cache.k, (B, K, C, D)), "cache.v": (cache.v, (B, K, C, D))}
    if eight_bits and cache.k.dtype == jnp.int8:
        for name, x in (("cache.k_scale", cache.k_scale), ("cache.v_scale", cache.v_scale)):
            if x is None:
                raise ValueError(f"{name} is None; allowed: float32 {(B, K, C)}")
            arrays[name] = (x, (B, K, C))
    for name, (x, shape) in arrays.items():
        validation.check_shape(name, x, shape)
    validation.check_floating(q=q, k=k, v=v)
    validation.check_heads(H, K)
    window, scale = validation.check_window(window, causal=True), validation.check_scale(scale, D)
    if C < 1:
        raise ValueError("cache has 0 slots; allowed: 1 or more")
    tile = LANES if eight_bits else 16  # slots of scales, or of bfloat16, in a memory tile
    if block < tile or block % tile:
        raise ValueError(f"block is {block}; allowed: a multiple of {tile}")
    refuse(unsupported)
    if q.dtype == jnp.float64:
        raise NotImplementedError("float64 is not supported: the kernels accumulate in float32")
    dtype = jnp.dtype(jnp.int8) if eight_bits else q.dtype
    if (cache.k.dtype, cache.v.dtype) != (dtype, dtype):
        raise NotImplementedError(f"the cache is {cache.k.dtype} and {cache.v.dtype}; this step reads {dtype}")
    return Ring(C, C if window is None else min(C, window), block), scale
