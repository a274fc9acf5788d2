"""The specification of linear cross-entropy: all logits of a projection, then the loss of each row."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

Array = jax.Array


def linear_cross_entropy(
    h: Float[Array, "N M"],
    w: Float[Array, "V M"],
    targets: Int[Array, "N"],
    *,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> Float[Array, "N"]:
    """Compute logsumexp(s[n]) - s[n, targets[n]] + z_loss * logsumexp(s[n])^2, where s = cap(h w^T).

    Args:
        h: rows [N, M].
        w: projection [V, M] to the vocabulary.
        targets: index of each row's target [N] int32; a row with one outside [0, V) takes no part.
        softcap: bound of the logits, cap(s) = softcap * tanh(s / softcap); None: cap(s) = s.
        z_loss: weight of the squared logsumexp.

    Returns:
        [N] float32 (float64 for float64), in nats; 0 for a row that takes no part.
    """
    dtype = jnp.promote_types(h.dtype, jnp.float32)
    takes_part = (targets >= 0) & (targets < w.shape[0])
    # Other rows are zeroed before the product, so that a NaN in them does not reach w's gradient.
    s = jnp.where(takes_part[:, None], h, 0).astype(dtype) @ w.astype(dtype).T
    if softcap is not None:
        s = softcap * jnp.tanh(s / softcap)
    lse = jax.nn.logsumexp(s, axis=1)
    target = jnp.take_along_axis(s, jnp.where(takes_part, targets, 0)[:, None], axis=1)[:, 0]
    return jnp.where(takes_part, lse - target + z_loss * lse**2, 0)
