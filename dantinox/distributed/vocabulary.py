"""The embedding and the loss with a vocabulary cut over the axis tensor, and an embedding cut along M too."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dantinox.distributed.collectives import axis_index, axis_size, sum_over, used_axes, whole_weight
from dantinox.kernels.vma import match_vma, varying_axes

Array = jax.Array


def embed(table: Array, tokens: Array, dtype: jnp.dtype) -> Array:
    """Look up the embeddings of this device's tokens.

    Each device looks up the tokens of all devices in its own columns M of the table, and the columns are exchanged:
    that is one activation, and neither the table nor its gradient is ever whole.

    Args:
        table: this device's share of the embedding [V, M].
        tokens: [B, T] int32.
        dtype: dtype of the result.

    Returns:
        [B, T, M].
    """
    devices = used_axes(("fsdp", "expert", "context"))
    table = whole_weight(table, "V", dtype)  # summed over copies, gathered over nothing
    if not devices:
        return _look_up(table, tokens)
    all_tokens = jax.lax.all_gather(tokens, devices)  # [devices, B, T]
    columns = _look_up(table, all_tokens)
    return jax.lax.all_to_all(columns, devices, split_axis=0, concat_axis=3, tiled=True)[0]


def _look_up(table: Array, tokens: Array) -> Array:
    """Return table[tokens] where the table has this device's share of the vocabulary."""
    if not is_cut(table):
        return table[tokens]
    local = tokens - axis_index("tensor") * table.shape[0]
    mine = (local >= 0) & (local < table.shape[0])
    return sum_over(jnp.where(mine[..., None], table[jnp.where(mine, local, 0)], 0), ("tensor",))


def is_cut(w: Array) -> bool:
    """Return whether the vocabulary, the only axis of the parameter that tensor may cut, is cut."""
    return axis_size("tensor") > 1 and "tensor" in varying_axes(w)


def losses_over_vocabulary(
    losses: Callable[[Array, Array, Array], Array],
    w: Array,
    h: Array,
    targets: Array,
    cap: Callable[[Array], Array],
) -> Array:
    """Compute -log p of each target from each device's share of the vocabulary.

    A device's loss of any token of its share is its log-sum-exp minus that token's logit, so its log-sum-exp is the
    loss plus the logit. The log-sum-exps are combined; only they and the targets' logits travel.

    Args:
        losses: (w, h, targets) -> [...] float32, the losses over one share; 0 where the target is negative.
        w: this device's share of the output projection [V, M].
        h: [..., M].
        targets: [...] int32 in the whole vocabulary; negative ones are ignored.
        cap: the soft cap of the logits.

    Returns:
        [...] float32 in nats; 0 where the target is negative.
    """
    if not is_cut(w):
        return losses(w, h, targets)
    h = match_vma(h, w)
    local = targets - axis_index("tensor") * w.shape[0]
    mine = (local >= 0) & (local < w.shape[0]) & (targets >= 0)
    local = jnp.where(mine, local, 0)  # any token of the share
    logit = cap(jnp.sum(h.astype(jnp.float32) * w[local].astype(jnp.float32), axis=-1))
    lse = losses(w, h, local) + logit
    highest = jax.lax.pmax(jax.lax.stop_gradient(lse), "tensor")
    whole_lse = highest + jnp.log(sum_over(jnp.exp(lse - highest), ("tensor",)))
    target_logit = sum_over(jnp.where(mine, logit, 0), ("tensor",))
    return jnp.where(targets >= 0, whole_lse - target_logit, 0)
