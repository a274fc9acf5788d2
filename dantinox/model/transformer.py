"""The Transformer: pre-norm blocks of windowed, gated, grouped-query attention and a dense or sparse MLP."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dantinox import kernels
from dantinox.config import ModelConfig
from dantinox.model.attention import Attention, Past, _Keys
from dantinox.model.layers import MLP, dense, dropout, filled_parameter, parameter, rms_norm
from dantinox.model.moe import MoE, RouterStats, mean_over_layers
from dantinox.model.rope import rope_cos_sin

Array = jax.Array


class Block(nnx.Module):
    """h + attention(norm(h)), then h + mlp(norm(h))."""

    def __init__(self, config: ModelConfig, layer: int, key: _Keys) -> None:
        out_std = 0.02 / (2 * config.n_layers) ** 0.5  # keeps the residual stream's variance flat in depth
        self.config = config
        self.attention_norm = filled_parameter(1, "M", (config.dim,))
        self.attention = Attention(config, layer, key, out_std)
        self.mlp_norm = filled_parameter(1, "M", (config.dim,))
        self.mlp = (MoE if config.n_experts else MLP)(config, key, out_std)

    def __call__(
        self, h: Array, rope: tuple[Array, Array] | None, key: Array | None = None, past: Past | None = None
    ) -> tuple[Array, RouterStats | None, tuple[Array, Array]]:
        """h [B, T, M], after `past` -> (h, router losses, (keys, values) [B, T, K, D])."""
        keys = (None, None) if key is None else jax.random.split(key)
        with jax.named_scope("attention"):
            o, k, v = self.attention(rms_norm(h, self.attention_norm, self.config.norm_eps), rope, past)
            h = h + dropout(o, self.config.dropout, keys[0])
        h, losses = self.feed_forward(h, keys[1])
        return h, losses, (k, v)

    def step(self, h: Array, rope: tuple[Array, Array] | None, cache: kernels.KVCache) -> tuple[Array, kernels.KVCache]:
        """One decoding step: h [B, 1, M]."""
        with jax.named_scope("attention"):
            o, cache = self.attention.step(rms_norm(h, self.attention_norm, self.config.norm_eps), rope, cache)
            h = h + o
        return self.feed_forward(h, None)[0], cache

    def feed_forward(self, h: Array, key: Array | None) -> tuple[Array, RouterStats | None]:
        """The MLP branch, dense or sparse."""
        losses = None
        with jax.named_scope("moe" if self.config.n_experts else "mlp"):
            x = rms_norm(h, self.mlp_norm, self.config.norm_eps)
            if self.config.n_experts:
                y, losses = self.mlp(x)
            else:
                y = self.mlp(x)
            return h + dropout(y, self.config.dropout, key), losses


_REMAT = {
    "none": lambda f: f,
    "block": jax.checkpoint,
    "dots": lambda f: jax.checkpoint(f, policy=jax.checkpoint_policies.dots_saveable),
}


class Transformer(nnx.Module):
    """A decoder-only language model.

    Args:
        config: the network's toggles.
        rngs: `nnx.Rngs(seed)`; initial weights are drawn from its "params" stream.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        key = _Keys(rngs)
        self.config = config
        self.embedding = parameter(key(), "VM", (config.vocab_size, config.dim), 0.02)
        learned = config.pos_encoding == "learned"
        self.position = parameter(key(), "TM", (config.max_context, config.dim), 0.02) if learned else None
        self.blocks = nnx.List([Block(config, layer, key) for layer in range(config.n_layers)])
        self.norm = filled_parameter(1, "M", (config.dim,))
        self.head = None if config.tie_embeddings else parameter(key(), "MV", (config.dim, config.vocab_size), 0.02)

    def __call__(self, tokens: Array) -> Array:
        """Logits [B, T, V] float32 of tokens [B, T] int32, in evaluation mode.

        Raises:
            ValueError: tokens are no [B, T] integers or hold an id out of range (which compiled code cannot tell), or T
                is past max_context with learned positions.
        """
        return self.logits(self.hidden(tokens)[0])

    def hidden(self, tokens: Array, *, key: Array | None = None) -> tuple[Array, RouterStats | None]:
        """(final hidden states [B, T, M], router losses `mean_over_layers`); `key` turns dropout on."""
        h, losses, _ = self.forward(tokens, key=key)
        return h, losses

    def forward(
        self,
        tokens: Array,
        *,
        key: Array | None = None,
        start: int | Array = 0,
        past: Sequence[Past] | None = None,
    ) -> tuple[Array, RouterStats | None, list[tuple[Array, Array]]]:
        """Of tokens [B, T] at positions `start` and on, which see the `past` of each layer too.

        Returns:
            (final hidden states [B, T, M], router losses `mean_over_layers`, per layer (keys, values) [B, T, K, D]).
        """
        tokens = jnp.asarray(tokens)
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(f"tokens are {tokens.dtype}{list(tokens.shape)}; allowed: integers [B, T]")
        V = self.config.vocab_size
        # XLA would read another token's embedding. What is being compiled has no values yet.
        if not isinstance(tokens, jax.core.Tracer):
            bad = (held := np.asarray(tokens))[(held < 0) | (held >= V)]
            if bad.size:
                raise ValueError(f"tokens hold id {bad[0]}; allowed: 0 to {V - 1}")
        h, rope = self.embed(tokens, start + jnp.arange(tokens.shape[1])[None])
        losses, kv = [], []
        for layer, block in enumerate(self.blocks):
            layer_key = None if key is None else jax.random.fold_in(key, layer)
            with jax.named_scope(f"block{layer}"):
                h, loss, layer_kv = _REMAT[self.config.remat](block)(h, rope, layer_key, past and past[layer])
            losses.append(loss)
            kv.append(layer_kv)
        every = mean_over_layers(losses) if self.config.n_experts else None
        return rms_norm(h, self.norm, self.config.norm_eps), every, kv

    @jax.named_scope("embed")
    def embed(self, tokens: Array, positions: Array) -> tuple[Array, tuple[Array, Array] | None]:
        """(embedded tokens [B, T, M], rotary cos and sin) at int32 positions [B or 1, T]."""
        limit = self.config.max_context
        if self.position is not None and tokens.shape[1] > limit:
            raise ValueError(f"tokens are {tokens.shape[1]} long; learned positions allow max_context {limit}")
        dtype = jnp.dtype(self.config.dtype)
        h = self.embedding[...].astype(dtype)[tokens]
        if self.position is not None:
            # Padding may stand past the last position.
            h = h + self.position[...].astype(dtype)[jnp.minimum(positions, limit - 1)]
        rope = rope_cos_sin(self.config, positions) if self.config.pos_encoding == "rope" else None
        return h, rope

    @jax.named_scope("logits")
    def logits(self, h: Array) -> Array:
        """[..., V] float32 of final hidden states [..., M]."""
        w = self.embedding[...].T if self.head is None else self.head[...]
        logits = dense(h, w, jnp.float32)
        cap = self.config.logit_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)
