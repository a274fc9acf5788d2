"""Shared by the forms that keep no logits: the sum over splits of the vocabulary, and gradients chunk by chunk."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

Array = jax.Array

MAX_CHUNK_LOGITS = 2**24  # gradients of logits in memory: 32 MiB in 16 bits, which the L2 of most cards holds
MIN_CHUNK = 256


def lse_gradient(dloss: Array, lse: Array, z_loss: float) -> Array:
    """Return the gradient of each row's logsumexp, for the gradient of its loss."""
    return (1 + 2 * z_loss * lse) * dloss if z_loss else dloss


def combine_splits(
    maxima: Array, totals: Array, target_logits: Array, targets: Array, z_loss: float
) -> tuple[Array, Array, Array]:
    """Return (losses, maxima m of the logits, their sums of exponentials l), [N], from those of the splits.

    The logsumexp stays in two parts, because the rounding error of one number would scale every weight of the row.

    Args:
        maxima: maximum of each row in each split of the vocabulary [splits, N].
        totals: sum of exp(s - maximum) [splits, N].
        target_logits: the target's logit in the split that has it, 0 in the others [splits, N].
        targets: [N] int32, below 0 in rows that take no part.
        z_loss: weight of the squared logsumexp.
    """
    row_max = jnp.max(maxima, axis=0)
    total = jnp.sum(totals * jnp.exp(maxima - row_max[None]), axis=0)
    log_total = jnp.log(total)
    loss = row_max - jnp.sum(target_logits, axis=0) + log_total
    if z_loss:
        lse = row_max + log_total
        loss += z_loss * lse * lse
    return jnp.where(targets >= 0, loss, 0), row_max, total


def chunk_size(N: int, V: int, block_v: int) -> int:
    """Return the words whose logits have gradients in memory at a time: V, or whole tiles in chunks of one size."""
    most = max(MIN_CHUNK, MAX_CHUNK_LOGITS // N) // block_v * block_v
    if most >= V:
        return V
    num_chunks = pl.cdiv(V, most)
    return pl.cdiv(pl.cdiv(V, num_chunks), block_v) * block_v


def gradient_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Return the dtype of the logits' gradients: those of float16 need float32's range."""
    return jnp.dtype(jnp.float32) if dtype == jnp.float16 else dtype


def chunked_gradients(
    h: Array, w: Array, targets: Array, chunk: int, logit_gradients: Callable[[Array, Array], Array]
) -> tuple[Array, Array]:
    """Return (dh, dw): dh = ds w and dw = ds^T h, chunk by chunk of the vocabulary, by XLA's products.

    Args:
        h: [N, M]; zeros in rows that take no part.
        w: [V, M].
        targets: [N] int32.
        chunk: words per chunk; the last one may have fewer.
        logit_gradients: returns ds [N, words] from the words' rows of w and the targets relative to the first.
    """
    (N, M), V = h.shape, w.shape[0]
    dtype = gradient_dtype(h.dtype)
    h_operand = h.astype(dtype)

    def add_chunk(start: Array | int, size: int, dh: Array, dw: Array) -> tuple[Array, Array]:
        w_chunk = jax.lax.dynamic_slice_in_dim(w, start, size)
        ds = logit_gradients(w_chunk, targets - start)
        dh += jnp.matmul(ds, w_chunk.astype(dtype), preferred_element_type=jnp.float32)
        dw_chunk = jnp.matmul(ds.T, h_operand, preferred_element_type=jnp.float32).astype(w.dtype)
        return dh, jax.lax.dynamic_update_slice_in_dim(dw, dw_chunk, start, 0)

    num_chunks, rest = V // chunk, V % chunk
    gradients = jnp.zeros((N, M), jnp.float32), jnp.zeros_like(w)
    bounds = np.int32(0), np.int32(num_chunks)  # 32 bits like the targets, with 64-bit defaults too
    gradients = jax.lax.fori_loop(*bounds, lambda i, carry: add_chunk(i * chunk, chunk, *carry), gradients)
    if rest:
        gradients = add_chunk(V - rest, rest, *gradients)
    return gradients[0].astype(h.dtype), gradients[1]
