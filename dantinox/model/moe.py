"""Sparse mixture of experts: a router picks k of E experts for each token, two losses keep the load even."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dantinox import kernels
from dantinox.config import ModelConfig
from dantinox.model.layers import MLP, dense, parameter

Array = jax.Array


class RouterStats(NamedTuple):
    """Unweighted auxiliary losses of a router, float32 scalars, and what it did.

    Attributes:
        balance: E * sum_e f_e P_e, f_e the share of tokens sent to e, P_e its mean probability; k when even.
        z: mean of logsumexp(logits)^2, which keeps the logits small.
        load: [E], the f_e; of a model [L, E].
        entropy: mean over the tokens of the entropy of their probabilities, over log E: 1 undecided, 0 certain; of a
            model [L].
    """

    balance: Array
    z: Array
    load: Array
    entropy: Array


def mean_over_layers(losses: Sequence[RouterStats]) -> RouterStats:
    """Of a model: the mean losses, and the figures of each layer."""
    mean = lambda parts: sum(parts) / len(parts)
    balance, z, load, entropy = zip(*losses)
    return RouterStats(mean(balance), mean(z), jnp.stack(load), jnp.stack(entropy))


def router_metrics(losses: RouterStats, k: int) -> dict[str, Array]:
    """What the routers of a model did with k experts a token, float32 scalars named router/KIND.LAYER.

    load_max, load_min: tokens of the busiest and of the idlest expert over the even share. entropy: see
    `RouterStats`. dropped: share of the k slots of all tokens that no expert served.
    """
    L, E = losses.load.shape
    kinds = {
        "load_max": jnp.max(losses.load, axis=1) * (E / k),
        "load_min": jnp.min(losses.load, axis=1) * (E / k),
        "entropy": losses.entropy,
        "dropped": 1 - jnp.sum(losses.load, axis=1) / k,
    }
    return {f"router/{kind}.{layer}": values[layer] for kind, values in kinds.items() for layer in range(L)}


def route(logits: Array, k: int) -> tuple[Array, Array, RouterStats]:
    """Pick k experts a token and renormalise their probabilities.

    Args:
        logits: [N, E] float32.

    Returns:
        (expert ids [N, k] int32, weights [N, k] float32 summing to 1, the losses).
    """
    N, E = logits.shape
    log_z = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    probabilities = jnp.exp(logits - log_z)
    weights, ids = jax.lax.top_k(probabilities, k)
    weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    share = jnp.sum(ids.reshape(-1)[:, None] == jnp.arange(E), axis=0) / N  # f_e, sums to k
    balance = E * jnp.sum(share * jnp.mean(probabilities, axis=0))
    entropy = -jnp.mean(jnp.sum(probabilities * (logits - log_z), axis=-1)) / math.log(max(2, E))
    return ids.astype(jnp.int32), weights, RouterStats(balance, jnp.mean(log_z**2), share, entropy)


class MoE(nnx.Module):
    """[..., M] -> [..., M] through k of E SwiGLU experts a token; dropless, so no token is ever left out."""

    def __init__(self, config: ModelConfig, key: Callable[[], Array], out_std: float) -> None:
        E, M, F = config.n_experts, config.dim, config.hidden
        self.k, self.implementation = config.experts_per_token, config.moe
        self.router = parameter(key(), "ME", (M, E), 0.02)
        self.gate = parameter(key(), "EMF", (E, M, F), 0.02)
        self.up = parameter(key(), "EMF", (E, M, F), 0.02)
        self.down = parameter(key(), "EFM", (E, F, M), out_std)
        self.shared = MLP(config, key, out_std) if config.shared_expert else None

    def __call__(self, x: Array) -> tuple[Array, RouterStats]:
        tokens = x.reshape(-1, x.shape[-1])
        with jax.named_scope("router"):
            ids, weights, losses = route(dense(tokens, self.router, jnp.float32), self.k)
        with jax.named_scope("experts"):
            experts = (w[...].astype(x.dtype) for w in (self.gate, self.up, self.down))
            y = kernels.moe_mlp(tokens, *experts, ids, weights, implementation=self.implementation)
        y = y.reshape(x.shape)
        if self.shared is not None:
            with jax.named_scope("shared"):
                y = y + self.shared(x)
        return y, losses
