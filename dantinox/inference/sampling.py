"""Sampling of the next token: temperature, top-k, top-p and min-p, all traced values that never recompile.

They apply in the order of Hugging Face's `generate`:

    penalty  logits of tokens seen before: divided by the penalty if positive, multiplied by it if negative
    z = logits / temperature                     0: greedy, the largest logit
    top_k    keep the k largest z                None: all
    top_p    of the rest, renormalised, keep the fewest tokens with a mass of p; the token that crosses p stays
    min_p    keep p(token) >= min_p * p(best)    p before any cut; the best token always stays

Equal logits are ranked by id, lower first: top_k = 1 is greedy, and top_k keeps exactly k tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dantinox.config.validation import check_finite, check_int

Array = jax.Array


class Sampling(NamedTuple):
    """Sampling settings, as scalar arguments of a compiled program; `Sampling.create` validates them.

    Attributes:
        temperature: divides the logits, float32; 0: greedy.
        top_k: number of tokens to keep, int32; 0: all.
        top_p: probability mass to keep, float32; 1: all.
        min_p: smallest probability to keep, relative to the best token's, float32; 0: off.
        repetition_penalty: factor that makes seen tokens less likely, float32; 1: off.
    """

    temperature: Array | np.ndarray
    top_k: Array | np.ndarray
    top_p: Array | np.ndarray
    min_p: Array | np.ndarray
    repetition_penalty: Array | np.ndarray

    @classmethod
    def create(
        cls,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
    ) -> "Sampling":
        """Validate the settings; a ValueError names the argument, its value and the allowed values."""
        temperature = check_finite("temperature", temperature, "a finite number, 0 (greedy) or more")
        if temperature < 0:
            raise ValueError(f"temperature is {temperature}; allowed: a finite number, 0 (greedy) or more")
        k = 0 if top_k is None else check_int("top_k", top_k, 1, off="None: all tokens")
        top_p = check_finite("top_p", top_p, "0 < top_p <= 1 (1: off)")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p is {top_p}; allowed: 0 < top_p <= 1 (1: off)")
        min_p = check_finite("min_p", min_p, "0 <= min_p < 1 (0: off)")
        if not 0 <= min_p < 1:
            raise ValueError(f"min_p is {min_p}; allowed: 0 <= min_p < 1 (0: off)")
        largest = float(np.finfo(np.float32).max)
        k = min(k, np.iinfo(np.int32).max)  # more than any vocabulary
        penalty = check_finite("repetition_penalty", repetition_penalty, "a number from 0.01 to 100 (1: off)")
        if not 0.01 <= penalty <= 100:
            raise ValueError(f"repetition_penalty is {penalty}; allowed: a number from 0.01 to 100 (1: off)")
        numbers = np.array([min(temperature, largest), top_p, min_p, penalty], np.float32)
        return cls(numbers[0], np.int32(k), *numbers[1:])


def sample(logits: Array, sampling: Sampling, keys: Array) -> Array:
    """Draw one token per row.

    Args:
        logits: [B, V] float32.
        sampling: the settings of all rows.
        keys: [B] random keys; the draw of a row depends only on its key and logits.

    Returns:
        ids [B] int32.
    """

    def draw() -> Array:
        # Gumbel-max trick: the argmax is a draw from the softmax over the unmasked tokens.
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], jnp.float32))(keys)
        z = scale_logits(logits, sampling.temperature)
        return jnp.argmax(jnp.where(sampling_mask(z, sampling), z + noise, -jnp.inf), axis=-1)

    def greedy() -> Array:
        return jnp.argmax(logits, axis=-1)

    return jax.lax.cond(sampling.temperature > 0, draw, greedy).astype(jnp.int32)


def apply_repetition_penalty(logits: Array, seen: Array, sampling: Sampling) -> Array:
    """Lower the logits [B, V] of the tokens in `seen`, bool [B, V] (Keskar et al., 2019)."""
    penalty = sampling.repetition_penalty
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def scale_logits(logits: Array, temperature: Array) -> Array:
    """Divide the logits [B, V] by the temperature, shifted so that the largest is 0 and nothing overflows."""
    shifted = logits - jnp.max(logits, axis=-1, keepdims=True)
    return shifted / jnp.maximum(temperature, jnp.finfo(jnp.float32).tiny)


def sampling_mask(z: Array, sampling: Sampling) -> Array:
    """Return which tokens may be drawn, bool [B, V], for scaled logits z [B, V]. Sorts only for top-k or top-p."""
    V = z.shape[-1]
    needs_sort = ((sampling.top_k > 0) & (sampling.top_k < V)) | (sampling.top_p < 1)
    mask = jax.lax.cond(needs_sort, lambda: _top_k_top_p_mask(z, sampling), lambda: jnp.ones(z.shape, bool))
    return mask & (jnp.exp(z) >= sampling.min_p)


def _top_k_top_p_mask(z: Array, sampling: Sampling) -> Array:
    """Return the mask of top-k and then top-p: a prefix of the tokens sorted by z."""
    B, V = z.shape
    ids = jnp.broadcast_to(jnp.arange(V, dtype=jnp.int32), (B, V))
    # A stable sort ranks equal logits by id.
    descending, sorted_ids = jax.lax.sort((-z, ids), dimension=-1, is_stable=True, num_keys=1)
    k = jnp.where(sampling.top_k > 0, sampling.top_k, V)
    rank = jnp.arange(V, dtype=jnp.int32)[None]
    in_k = rank < k
    mass = jnp.cumsum(jnp.where(in_k, jnp.exp(-descending), 0), axis=-1)
    mass_before = jnp.pad(mass[:, :-1], ((0, 0), (1, 0)))
    in_p = (mass_before < sampling.top_p * mass[:, -1:]) | (sampling.top_p >= 1) | (rank == 0)
    return jnp.zeros((B, V), bool).at[jnp.arange(B)[:, None], sorted_ids].set(in_k & in_p, unique_indices=True)
