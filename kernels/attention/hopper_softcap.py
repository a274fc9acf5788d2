"""The soft cap of Hopper's attention, exact: where gradients are wanted, both directions make their weights of it."""

import jax
import jax.numpy as jnp

from kernels.attention.hopper_static import Static

LOG2E = 1.4426950408889634


def capped(products: jax.Array, static: Static) -> jax.Array:
    """tanh(scale q k^T / softcap) in float32 of products q k^T; a score is softcap times as large.

    The hardware's own tanh takes one instruction for these two and is good to 2^-11 of a score: enough for an output,
    but weights made of the exact scores and of a log-sum-exp of such scores do not add up to one. In float16, at a cap
    of 50 and scores near it, that moves gradients further than the rule of the tests allows.
    """
    # Large products: 2^x is infinite, and the quotient 0.
    return 1.0 - 2.0 / (jnp.exp2(products * (2 * LOG2E * static.scale / static.softcap)) + 1.0)
