"""Sparse mixture of experts: a router picks k of E experts per token; two auxiliary losses balance the load."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dantinox import kernels
from dantinox.config import ModelConfig
from dantinox.distributed import collectives
from dantinox.distributed.collectives import mean_over_tokens
from dantinox.distributed.experts import send_to_experts
from dantinox.distributed.inference import call_kernel
from dantinox.model.layers import MLP, dense, parameter, value_of, zero_bias

Array = jax.Array


class RouterStats(NamedTuple):
    """Statistics of one router, or of all routers of a model.

    Attributes:
        balance: load-balancing loss E * sum_e f_e P_e, float32 scalar: f_e is the fraction of tokens sent to expert e,
            P_e its mean probability; k when the load is even.
        z: router z-loss, mean of logsumexp(logits)^2, float32 scalar; it keeps the logits small.
        load: [E], the f_e. [L, E] of a model.
        entropy: entropy of the probabilities over log E, averaged over tokens: 1 is uniform, 0 certain. [L] of a model.
    """

    balance: Array
    z: Array
    load: Array
    entropy: Array


def mean_over_layers(layers: Sequence[RouterStats]) -> RouterStats:
    """Average the losses over the layers and stack the load and the entropy."""
    balance, z, load, entropy = zip(*layers)
    L = len(layers)
    return RouterStats(sum(balance) / L, sum(z) / L, jnp.stack(load), jnp.stack(entropy))


def router_metrics(stats: RouterStats, k: int) -> dict[str, Array]:
    """Per-layer metrics of a model's routers with k experts per token, float32 scalars named router/METRIC.LAYER.

    load_max and load_min are the load of the busiest and of the least busy expert over the even load; entropy as in
    `RouterStats`; dropped is the fraction of (token, expert) assignments that no expert processed.
    """
    L, E = stats.load.shape
    metrics = {
        "load_max": jnp.max(stats.load, axis=1) * (E / k),
        "load_min": jnp.min(stats.load, axis=1) * (E / k),
        "entropy": stats.entropy,
        "dropped": 1 - jnp.sum(stats.load, axis=1) / k,
    }
    return {f"router/{name}.{layer}": values[layer] for name, values in metrics.items() for layer in range(L)}


def route(logits: Array, k: int) -> tuple[Array, Array, RouterStats]:
    """Pick the k likeliest experts per token and renormalise their probabilities.

    On a mesh the statistics are those of the tokens of all devices.

    Args:
        logits: router logits [N, E] float32.
        k: experts per token.

    Returns:
        (expert ids [N, k] int32, weights [N, k] float32 that sum to 1 per token, router statistics).
    """
    N, E = logits.shape
    log_z = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    probabilities = jnp.exp(logits - log_z)
    weights, ids = jax.lax.top_k(probabilities, k)
    weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    chosen = ids.reshape(-1)[:, None] == jnp.arange(E, dtype=ids.dtype)[None]
    load = mean_over_tokens(jnp.sum(chosen, axis=0, dtype=jnp.float32) / N)  # f_e, sums to k
    balance = E * jnp.sum(load * mean_over_tokens(jnp.mean(probabilities, axis=0)))
    entropy = -mean_over_tokens(jnp.mean(jnp.sum(probabilities * (logits - log_z), axis=-1))) / math.log(max(2, E))
    z = mean_over_tokens(jnp.mean(log_z**2))
    return ids.astype(jnp.int32), weights, RouterStats(balance, z, load, entropy)


class MoE(nnx.Module):
    """k of E SwiGLU experts per token: [..., M] -> [..., M]. Dropless: every token reaches all of its k experts."""

    def __init__(self, config: ModelConfig, key: Callable[[], Array], out_std: float) -> None:
        E, M, F = config.n_experts, config.dim, config.hidden
        self.config = config
        self.router = parameter(key(), "ME", (M, E), 0.02)
        self.gate = parameter(key(), "EMF", (E, M, F), 0.02)
        self.up = parameter(key(), "EMF", (E, M, F), 0.02)
        self.down = parameter(key(), "EFM", (E, F, M), out_std)
        self.router_bias = zero_bias(config.moe_bias, "E", (E,))
        self.gate_bias = zero_bias(config.moe_bias, "EF", (E, F))
        self.up_bias = zero_bias(config.moe_bias, "EF", (E, F))
        self.down_bias = zero_bias(config.moe_bias, "EM", (E, M))
        self.shared = MLP(config, key, out_std) if config.shared_expert else None

    def __call__(self, x: Array) -> tuple[Array, RouterStats]:
        """Return the output for x [..., M] and the statistics of the router."""
        tokens = x.reshape(-1, x.shape[-1])
        with jax.named_scope("router"):
            logits = dense(tokens, self.router, jnp.float32, bias=self.router_bias)
            ids, weights, stats = route(logits, self.config.experts_per_token)
        with jax.named_scope("experts"):
            matrices = [value_of(w, x.dtype) for w in (self.gate, self.up, self.down)]
            biases = [value_of(b, x.dtype) for b in (self.gate_bias, self.up_bias, self.down_bias)]
            y = send_to_experts(self.run_experts, (*matrices, *biases), tokens, ids, weights, self.config.n_experts)
            y = collectives.sum_over(y, ("tensor",)).reshape(x.shape)
        if self.shared is not None:
            with jax.named_scope("shared"):
                y = y + self.shared(x)
        return y, stats

    def run_experts(self, *arguments: Array | None) -> Array:
        """Call `experts`; without a training mesh perhaps on a mesh of inference."""
        letters = ["EMF", "EMF", "EFM", "EF", "EF", "EM", "NM", "Nk", "Nk"]
        return call_kernel(self.experts, arguments, letters, "NM", summed=True)

    def experts(
        self,
        w_gate: Array,
        w_up: Array,
        w_down: Array,
        b_gate: Array | None,
        b_up: Array | None,
        b_down: Array | None,
        tokens: Array,
        ids: Array,
        weights: Array,
    ) -> Array:
        """Apply the chosen experts to tokens [N, M]; on a mesh the result is a partial sum over the axis tensor."""
        config = self.config
        b_down = collectives.once_over(b_down, "tensor")
        clamped = ("swiglu_clamped", config.mlp_limit, config.mlp_alpha)
        return kernels.moe_mlp(
            tokens,
            w_gate,
            w_up,
            w_down,
            ids,
            weights,
            b_gate=b_gate,
            b_up=b_up,
            b_down=b_down,
            activation=clamped if config.mlp == "swiglu_clamped" else "swiglu",
            implementation=config.moe,
        )
