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

    L counts the layers with experts. Sigmoid scores count as probabilities after a division by their sum.
    """

    balance: Array
    z: Array
    load: Array
    entropy: Array


def mean_over_layers(layers: Sequence[RouterStats | None]) -> RouterStats:
    """Average the losses over the layers with experts and stack the load and the entropy."""
    balance, z, load, entropy = zip(*[stats for stats in layers if stats is not None])
    L = len(load)
    return RouterStats(sum(balance) / L, sum(z) / L, jnp.stack(load), jnp.stack(entropy))


def router_metrics(stats: RouterStats, k: int, first_layer: int = 0) -> dict[str, Array]:
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
    return {
        f"router/{name}.{first_layer + layer}": values[layer] for name, values in metrics.items() for layer in range(L)
    }


def move_selection_biases(params: dict[str, Array], load: Array, config: ModelConfig) -> dict[str, Array]:
    """Move the selection bias of each expert by the sign of its load error (DeepSeek-V3).

    Args:
        params: the parameters by name.
        load: fraction of tokens per expert [layers with experts, E], as in `RouterStats`.
        config: the settings of the model.
    """
    moved, even = {}, config.experts_per_token / config.n_experts
    for layer in range(config.n_dense_layers, config.n_layers):
        name = f"blocks.{layer}.mlp.selection_bias"
        moved[name] = params[name] + config.selection_bias_rate * jnp.sign(even - load[layer - config.n_dense_layers])
    return params | moved


def route(
    logits: Array,
    k: int,
    *,
    kind: str = "softmax",
    selection_bias: Array | None = None,
    renormalise: bool = True,
    scale: float = 1.0,
) -> tuple[Array, Array, RouterStats]:
    """Pick the k experts of the highest scores per token; their weights are the scores, by default over their sum.

    On a mesh the statistics are those of the tokens of all devices.

    Args:
        logits: router logits [N, E] float32.
        k: experts per token.
        kind: of the scores: softmax or sigmoid.
        selection_bias: [E], added to the scores for the selection only; it has no gradient.
        renormalise: divide the weights by their sum.
        scale: factor on the weights.

    Returns:
        (expert ids [N, k] int32, weights [N, k] float32, router statistics).
    """
    N, E = logits.shape
    log_z = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    log_p = logits - log_z
    if kind == "sigmoid":
        log_p = jax.nn.log_softmax(jax.nn.log_sigmoid(logits), axis=-1)
    probabilities = jnp.exp(log_p)
    scores = jax.nn.sigmoid(logits) if kind == "sigmoid" else probabilities
    if selection_bias is None:
        weights, ids = jax.lax.top_k(scores, k)
    else:
        _, ids = jax.lax.top_k(jax.lax.stop_gradient(scores + selection_bias), k)
        weights = jnp.take_along_axis(scores, ids, axis=-1)
    if renormalise:
        total = jnp.sum(weights, axis=-1, keepdims=True)
        weights = weights / (total + 1e-20 if kind == "sigmoid" else total)  # sigmoids may all be zero
    weights = weights if scale == 1 else weights * scale
    chosen = ids.reshape(-1)[:, None] == jnp.arange(E, dtype=ids.dtype)[None]
    load = mean_over_tokens(jnp.sum(chosen, axis=0, dtype=jnp.float32) / N)  # f_e, sums to k
    balance = E * jnp.sum(load * mean_over_tokens(jnp.mean(probabilities, axis=0)))
    entropy = -mean_over_tokens(jnp.mean(jnp.sum(probabilities * log_p, axis=-1))) / math.log(max(2, E))
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
        self.selection_bias = zero_bias(config.selection_bias, "E", (E,))
        self.shared = MLP(config, key, out_std, config.shared_hidden) if config.shared_expert else None

    def __call__(self, x: Array) -> tuple[Array, RouterStats]:
        """Return the output for x [..., M] and the statistics of the router."""
        tokens = x.reshape(-1, x.shape[-1])
        with jax.named_scope("router"):
            logits = dense(tokens, self.router, jnp.float32, bias=self.router_bias)
            ids, weights, stats = route(
                logits,
                self.config.experts_per_token,
                kind=self.config.router,
                selection_bias=value_of(self.selection_bias),
                renormalise=self.config.router_renormalise,
                scale=self.config.router_scale,
            )
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
