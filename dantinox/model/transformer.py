"""The Transformer: blocks of windowed, gated, grouped-query attention and a dense or sparse MLP."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dantinox import kernels
from dantinox.config import ModelConfig
from dantinox.distributed import collectives, vocabulary
from dantinox.distributed.inference import call_kernel
from dantinox.kernels.einsum import einsum
from dantinox.model import layer_loop
from dantinox.model.attention import Attention, PastKeyValues, _KeyStream
from dantinox.model.layers import MLP, branch_norm, dropout, norm, norm_scale, parameter, value_of
from dantinox.model.moe import MoE, RouterStats, mean_over_layers
from dantinox.model.rope import Ropes, positions_in_segments, ropes_at

Array = jax.Array


class Block(nnx.Module):
    """h + norm(attention(norm(h))), then h + norm(mlp(norm(h))), with the norms that the settings have."""

    def __init__(self, config: ModelConfig, layer: int, key: _KeyStream) -> None:
        out_std = 0.02 / (2 * config.n_layers) ** 0.5  # keeps the residual stream's variance flat in depth
        self.config = config
        self.attention_norm, self.attention_post_norm = branch_norm(config, "pre"), branch_norm(config, "post")
        self.attention = Attention(config, layer, key, out_std)
        self.mlp_norm, self.mlp_post_norm = branch_norm(config, "pre"), branch_norm(config, "post")
        is_sparse = config.is_sparse(layer)
        self.mlp = MoE(config, key, out_std) if is_sparse else MLP(config, key, out_std, config.dense_hidden)

    def __call__(
        self,
        h: Array,
        ropes: Ropes,
        key: Array | None = None,
        past: PastKeyValues | None = None,
        segment_ids: Array | None = None,
    ) -> tuple[Array, RouterStats | None, tuple[Array, Array]]:
        """Apply both branches to h [B, T, M], given `past` -> (h, router statistics, (keys, values) [B, T, K, D])."""
        keys = (None, None) if key is None else jax.random.split(key)
        with jax.named_scope("attention"):
            o, k, v = self.attention(norm(h, self.attention_norm, self.config), ropes, past, segment_ids)
            h = h + dropout(norm(o, self.attention_post_norm, self.config), self.config.dropout, keys[0])
        h, router_stats = self.feed_forward(h, keys[1])
        return h, router_stats, (k, v)

    def decode_step(self, h: Array, ropes: Ropes, cache: kernels.KVCache) -> tuple[Array, kernels.KVCache]:
        """Decode T tokens per sequence: h [B, T, M] -> (h, cache with the tokens appended)."""
        with jax.named_scope("attention"):
            o, cache = self.attention.decode_step(norm(h, self.attention_norm, self.config), ropes, cache)
            h = h + norm(o, self.attention_post_norm, self.config)
        return self.feed_forward(h, None)[0], cache

    def feed_forward(self, h: Array, key: Array | None) -> tuple[Array, RouterStats | None]:
        """Add the MLP branch, dense or sparse: h [B, T, M] -> (h, router statistics or None)."""
        router_stats = None
        with jax.named_scope("moe" if isinstance(self.mlp, MoE) else "mlp"):
            x = norm(h, self.mlp_norm, self.config)
            if isinstance(self.mlp, MoE):
                y, router_stats = self.mlp(x)
            else:
                y = self.mlp(x)
            y = norm(y, self.mlp_post_norm, self.config)
            return h + dropout(y, self.config.dropout, key), router_stats


class Transformer(nnx.Module):
    """A decoder-only language model.

    Args:
        config: the settings of the network; dtype auto becomes that of the current device.
        rngs: `nnx.Rngs(seed)`; initial weights are drawn from its "params" stream.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        key = _KeyStream(rngs)
        self.config = config = config.with_resolved_dtype()
        self.token_embedding = parameter(key(), "VM", (config.vocab_size, config.dim), 0.02)
        learned = config.pos_encoding == "learned"
        self.pos_embedding = parameter(key(), "TM", (config.max_context, config.dim), 0.02) if learned else None
        self.blocks = nnx.List([Block(config, layer, key) for layer in range(config.n_layers)])
        self.final_norm = norm_scale(config, "M", (config.dim,))
        self.lm_head = None if config.tie_embeddings else parameter(key(), "MV", (config.dim, config.vocab_size), 0.02)

    def __call__(self, tokens: Array) -> Array:
        """Return the logits [B, T, V] float32 of tokens [B, T] int32, with dropout off.

        Raises:
            ValueError: tokens are not [B, T] integers, contain an id out of range (not checked in compiled code), or T
                exceeds max_context with learned positions.
        """
        return self.logits(self.hidden(tokens)[0])

    def hidden(
        self, tokens: Array, *, key: Array | None = None, segment_ids: Array | None = None
    ) -> tuple[Array, RouterStats | None]:
        """Return (final hidden states [B, T, M], `mean_over_layers` of the router statistics).

        Args:
            tokens: [B, T] int32.
            key: random key of dropout; None turns dropout off.
            segment_ids: [B, T] int32, texts packed into one row: each attends to itself alone and begins at position 0.
                None: each row is one text.
        """
        h, router_stats, _ = self.forward(tokens, key=key, with_kv=False, segment_ids=segment_ids)
        return h, router_stats

    def forward(
        self,
        tokens: Array,
        *,
        key: Array | None = None,
        start: int | Array = 0,
        past: Sequence[PastKeyValues] | None = None,
        with_kv: bool = True,
        segment_ids: Array | None = None,
    ) -> tuple[Array, RouterStats | None, list[tuple[Array, Array]]]:
        """Run all blocks.

        Args:
            tokens: [B, T] int32.
            key: random key of dropout; None turns dropout off.
            start: position of the first token.
            past: per layer, the keys and values of earlier positions.
            with_kv: return the keys and values; False, without a past, lets a deep model run as a loop.
            segment_ids: as in `hidden`, without a past.

        Returns:
            (final hidden states [B, T, M], `mean_over_layers` of the router statistics, per layer the keys and values
            [B, T, K, D] of the tokens).
        """
        tokens = jnp.asarray(tokens)
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(f"tokens are {tokens.dtype}{list(tokens.shape)}; allowed: integers [B, T]")
        V = self.config.vocab_size
        # An id out of range would read the embedding of another token. Traced tokens have no values to check.
        if not isinstance(tokens, jax.core.Tracer):
            ids = np.asarray(tokens)
            bad = ids[(ids < 0) | (ids >= V)]
            if bad.size:
                raise ValueError(f"tokens contain id {bad[0]}; allowed: 0 to {V - 1}")
        start = start + collectives.first_position(tokens.shape[1])
        positions = start + jnp.arange(tokens.shape[1])[None]
        h, ropes = self.embed(tokens, positions if segment_ids is None else positions_in_segments(segment_ids))
        if with_kv or not layer_loop.runs_as_loop(self.config):
            h, layer_stats, kv = layer_loop.run_blocks(self.blocks, self.config, h, ropes, key, past, segment_ids)
        else:
            h, layer_stats = layer_loop.loop_over_blocks(self.blocks, self.config, h, ropes, key, segment_ids)
            kv = []
        router_stats = mean_over_layers(layer_stats) if self.config.n_experts else None
        return norm(h, self.final_norm, self.config), router_stats, kv

    @jax.named_scope("embed")
    def embed(self, tokens: Array, positions: Array) -> tuple[Array, Ropes]:
        """Return (embedded tokens [B, T, M], rotary positions) at int32 positions [B or 1, T]."""
        limit = self.config.max_context
        if self.pos_embedding is not None and tokens.shape[1] > limit:
            raise ValueError(
                f"the length of tokens is {tokens.shape[1]}; allowed: max_context {limit} with learned positions"
            )
        dtype = jnp.dtype(self.config.dtype)
        h = vocabulary.embed(self.token_embedding[...], tokens, dtype)
        if self.config.scale_embeddings:
            h = h * jnp.asarray(self.config.dim**0.5, dtype)
        if self.pos_embedding is not None:
            # Padding may be past the last position.
            h = h + value_of(self.pos_embedding, dtype)[jnp.minimum(positions, limit - 1)]
        return h, ropes_at(self.config, positions)

    @jax.named_scope("logits")
    def logits(self, h: Array) -> Array:
        """Return the logits [..., V] float32 of final hidden states [..., M]."""
        w = self.output_projection(h.dtype)
        return self.cap_logits(einsum("NM,VM->NV", h.reshape(-1, h.shape[-1]), w, jnp.float32)).reshape(
            *h.shape[:-1], -1
        )

    def cap_logits(self, logits: Array) -> Array:
        """Apply the soft cap of the settings to logits."""
        cap = self.config.logit_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def output_projection(self, dtype: jnp.dtype) -> Array:
        """Return the weights [V, M] of the logits in `dtype`."""
        if self.lm_head is None:
            return value_of(self.token_embedding, dtype)
        return value_of(self.lm_head, dtype).T

    @jax.named_scope("loss")
    def token_losses(self, h: Array, targets: Array) -> Array:
        """Compute -log p of each target without keeping the logits of all tokens.

        Args:
            h: final hidden states [B, T, M].
            targets: [B, T] int32; negative ones are ignored.

        Returns:
            [B, T] float32 in nats; 0 where the target is negative.
        """

        def losses(w: Array, h: Array, targets: Array) -> Array:
            flat = kernels.linear_cross_entropy(
                h.reshape(-1, h.shape[-1]),
                w,
                targets.reshape(-1),
                softcap=self.config.logit_softcap,
                implementation=self.config.loss,
            )
            return flat.reshape(targets.shape)

        def run(*arguments: Array) -> Array:
            return call_kernel(losses, arguments, ["VM", "BTM", "BT"], "BT")

        w = self.output_projection(h.dtype)
        return vocabulary.losses_over_vocabulary(run, w, h, targets, self.cap_logits)
