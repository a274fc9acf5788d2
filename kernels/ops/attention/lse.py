"""What the log-sum-exp of attention's scores is for: attention sinks, and attention to parts of the keys.

A sink is the score of one more key, whose value is zero. With lse = log(sum over the keys of exp(s)), it keeps a share

    o' = o exp(lse) / (exp(lse) + exp(sink)) = o sigmoid(lse - sink),    lse' = log(exp(lse) + exp(sink))

of the output, so that no kernel needs to know of it; the derivative of lse carries the rest.

Source  Xiao et al., Efficient Streaming Language Models with Attention Sinks (arXiv:2309.17453), for sinks that are
        learned logits; Dao et al., FlashAttention (arXiv:2205.14135), for sums of parts.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Float

from dantinox.kernels import validation
from dantinox.kernels.einsum import accumulation_dtype

Array = jax.Array
LARGEST_LSE = 1e38  # a GPU kernel's lse of a row without a key is beyond it, so that the row's weights are zero


def natural_lse(lse: Array) -> Array:
    """Return [B, T, H] natural logarithms from a GPU kernel's [B, H, T] to base 2."""
    return jnp.where(lse > LARGEST_LSE, -jnp.inf, lse * math.log(2)).swapaxes(1, 2)


def add_sinks(o: Array, lse: Array, sinks: Array) -> tuple[Array, Array]:
    """Return (o [B, T, H, Dv], lse [B, T, H]) of attention whose heads have sinks [H] too."""
    sinks = jnp.broadcast_to(sinks.astype(lse.dtype), lse.shape)
    sees_key = lse > -jnp.inf
    some_lse = jnp.where(sees_key, lse, 0)  # -inf - -inf is NaN, also in derivatives
    share = jnp.where(sees_key, jax.nn.sigmoid(some_lse - sinks), 0)
    o = (o.astype(lse.dtype) * share[..., None]).astype(o.dtype)
    return o, jnp.where(sees_key, jnp.logaddexp(some_lse, sinks), sinks)


def merge_attention(
    o_a: Float[Array, "B T H Dv"],
    lse_a: Float[Array, "B T H"],
    o_b: Float[Array, "B T H Dv"],
    lse_b: Float[Array, "B T H"],
) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B T H"]]:
    """Merge attention to two disjoint sets of keys into attention to both, differentiable in all arguments.

    The order of the sets has no effect, and the result can be merged with a third. Gated outputs merge if both have the
    same gate. Sinks belong to one of the sets only.

    Args:
        o_a: output [B, T, H, Dv] of `attention` to the one set.
        lse_a: its log-sum-exp [B, T, H], of `return_lse=True`.
        o_b: output for the other set, in the dtype of `o_a`.
        lse_b: its log-sum-exp, in the dtype of `lse_a`.

    Returns:
        (o, lse) as `attention` returns them; zeros and -inf for a query that sees no key of either set.

    Raises:
        ValueError: an argument's shape or dtype is not allowed.
    """
    o_a, o_b = validation.as_array("o_a", o_a, "BTHD"), validation.as_array("o_b", o_b, "BTHD")
    lse_a, lse_b = validation.as_array("lse_a", lse_a, "BTH"), validation.as_array("lse_b", lse_b, "BTH")
    validation.check_floating(o_a=o_a, o_b=o_b)
    validation.check_floating(lse_a=lse_a, lse_b=lse_b)
    validation.check_shape("o_b", o_b, o_a.shape)
    validation.check_shape("lse_a", lse_a, o_a.shape[:3])
    validation.check_shape("lse_b", lse_b, o_a.shape[:3])
    o_dtype, dtype = o_a.dtype, accumulation_dtype(o_a.dtype)
    o_a, o_b, lse_a, lse_b = (x.astype(dtype) for x in (o_a, o_b, lse_a, lse_b))
    largest = jax.lax.stop_gradient(jnp.maximum(lse_a, lse_b))
    largest = jnp.where(largest > -jnp.inf, largest, 0)
    a, b = jnp.exp(lse_a - largest), jnp.exp(lse_b - largest)
    sees_key = a + b > 0
    total = jnp.where(sees_key, a + b, 1)
    o = o_a * (a / total)[..., None] + o_b * (b / total)[..., None]
    return o.astype(o_dtype), jnp.where(sees_key, largest + jnp.log(total), -jnp.inf)
