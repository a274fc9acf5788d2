"""The Transformer: pre-norm blocks of windowed, gated, grouped-query attention and a dense or sparse MLP."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import kernels
from dantinox.config import ModelConfig
from dantinox.layers import MLP, constant, dense, dropout, parameter, rms_norm
from dantinox.moe import MoE, RouterLosses, over_layers
from dantinox.per_device import by_sequence
from dantinox.rope import rotate, rotation

Array = jax.Array
Past = tuple[Array, Array, Array]
"""Keys and values [B, P, K, D] of earlier positions, and which of them there are, bool [B, P]."""


class _Keys:
    """Fresh random keys, one a call, so that each parameter's draw depends on its place and the seed alone.

    Of XLA's own bit generator: a threefry draw of each shape takes twice as long to compile.
    """

    def __init__(self, rngs: nnx.Rngs) -> None:
        seed = jax.random.key_data(rngs.params()).reshape(-1)
        self.root, self.count = jnp.concatenate([seed, seed]), 0

    def __call__(self) -> Array:
        self.count += 1
        return jax.random.wrap_key_data(self.root.at[3].add(self.count), impl="unsafe_rbg")


class Attention(nnx.Module):
    """Grouped-query attention with optional window, gate, QK-norm and soft cap."""

    def __init__(self, config: ModelConfig, layer: int, key: _Keys, out_std: float) -> None:
        M, H, K, D = config.dim, config.n_heads, config.kv_heads, config.head_dim
        self.config, self.window = config, config.layer_window(layer)
        self.q = parameter(key(), "MHD", (M, H, D), 0.02)
        self.k = parameter(key(), "MKD", (M, K, D), 0.02)
        self.v = parameter(key(), "MKD", (M, K, D), 0.02)
        self.o = parameter(key(), "HDM", (H, D, M), out_std)
        gate_width = {"none": 0, "head": 1, "elementwise": D}[config.gate]
        self.gate = parameter(key(), "MHD", (M, H, gate_width), 0.02) if gate_width else None
        self.q_scale = constant(1, "D", (D,)) if config.qk_norm else None
        self.k_scale = constant(1, "D", (D,)) if config.qk_norm else None

    def project(self, x: Array, rope: tuple[Array, Array] | None) -> tuple[Array, Array, Array, Array | None]:
        """x [B, T, M] -> q [B, T, H, D], k and v [B, T, K, D], gate logits [B, T, H, D or 1] or None."""
        with jax.named_scope("qkv"):
            q, k, v = dense(x, self.q), dense(x, self.k), dense(x, self.v)
            gate = None if self.gate is None else dense(x, self.gate)
        if self.q_scale is not None:
            q = rms_norm(q, self.q_scale, self.config.norm_eps)
            k = rms_norm(k, self.k_scale, self.config.norm_eps)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        return q, k, v, gate

    @jax.named_scope("out")
    def merge(self, o: Array) -> Array:
        """Heads [..., H, D] back to the residual width [..., M]."""
        w = self.o[...]
        return dense(o.reshape(*o.shape[:-2], -1), w.reshape(-1, w.shape[-1]))

    def __call__(
        self, x: Array, rope: tuple[Array, Array] | None, past: Past | None = None
    ) -> tuple[Array, Array, Array]:
        """x [B, T, M], after `past` -> (output [B, T, M], its own keys, values [B, T, K, D] for a cache)."""
        q, k, v, gate = self.project(x, rope)
        gates = () if gate is None else (gate,)
        with jax.named_scope("attend"):
            if past is None:
                o = by_sequence(self.attend)(q, k, v, *gates)
            else:
                keys, values = (jnp.concatenate(both, axis=1) for both in ((past[0], k), (past[1], v)))
                own = jnp.zeros(x.shape[:2], jnp.int32)
                ids = own, jnp.concatenate([jnp.where(past[2], 0, 1), own], axis=1)
                o = self.attend(q, keys, values, *gates, segment_ids=ids)
        return self.merge(o), k, v

    def attend(
        self,
        q: Array,
        k: Array,
        v: Array,
        gate: Array | None = None,
        segment_ids: tuple[Array, Array] | None = None,
    ) -> Array:
        """q [B, T, H, D] to all of k and v [B, S, K, D] that the layer's window and the segments show."""
        config = self.config
        return kernels.attention(
            q,
            k,
            v,
            gate=gate,
            window=self.window,
            softcap=config.attn_softcap,
            segment_ids=segment_ids,
            implementation=config.attn,
        )

    def step(self, x: Array, rope: tuple[Array, Array] | None, cache: kernels.KVCache) -> tuple[Array, kernels.KVCache]:
        """One new token a sequence: x [B, 1, M] -> (output [B, 1, M], cache with the token appended)."""
        q, k, v, gate = self.project(x, rope)
        with jax.named_scope("attend"):
            o, cache = kernels.decode_attention(
                q[:, 0],
                k[:, 0],
                v[:, 0],
                cache,
                gate=None if gate is None else gate[:, 0],
                window=self.window,
                softcap=self.config.attn_softcap,
                implementation=self.config.decode,
            )
        return self.merge(o)[:, None], cache


class Block(nnx.Module):
    """h + attention(norm(h)), then h + mlp(norm(h))."""

    def __init__(self, config: ModelConfig, layer: int, key: _Keys) -> None:
        out_std = 0.02 / (2 * config.n_layers) ** 0.5  # keeps the residual stream's variance flat in depth
        self.config = config
        self.attention_norm = constant(1, "M", (config.dim,))
        self.attention = Attention(config, layer, key, out_std)
        self.mlp_norm = constant(1, "M", (config.dim,))
        self.mlp = (MoE if config.n_experts else MLP)(config, key, out_std)

    def __call__(
        self, h: Array, rope: tuple[Array, Array] | None, key: Array | None = None, past: Past | None = None
    ) -> tuple[Array, RouterLosses | None, tuple[Array, Array]]:
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

    def feed_forward(self, h: Array, key: Array | None) -> tuple[Array, RouterLosses | None]:
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
        learned = config.positions == "learned"
        self.position = parameter(key(), "TM", (config.max_context, config.dim), 0.02) if learned else None
        self.blocks = nnx.List([Block(config, layer, key) for layer in range(config.n_layers)])
        self.norm = constant(1, "M", (config.dim,))
        self.head = None if config.tie else parameter(key(), "MV", (config.dim, config.vocab_size), 0.02)

    def __call__(self, tokens: Array) -> Array:
        """Logits [B, T, V] float32 of tokens [B, T] int32, in evaluation mode.

        Raises:
            ValueError: tokens are no [B, T] integers or hold an id out of range (which compiled code cannot tell), or T
                is past max_context with learned positions.
        """
        return self.logits(self.hidden(tokens)[0])

    def hidden(self, tokens: Array, *, key: Array | None = None) -> tuple[Array, RouterLosses | None]:
        """(final hidden states [B, T, M], router losses `over_layers`); `key` turns dropout on."""
        h, losses, _ = self.forward(tokens, key=key)
        return h, losses

    def forward(
        self,
        tokens: Array,
        *,
        key: Array | None = None,
        start: int | Array = 0,
        past: Sequence[Past] | None = None,
    ) -> tuple[Array, RouterLosses | None, list[tuple[Array, Array]]]:
        """Of tokens [B, T] at positions `start` and on, which see the `past` of each layer too.

        Returns:
            (final hidden states [B, T, M], router losses `over_layers`, per layer (keys, values) [B, T, K, D]).
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
        every = over_layers(losses) if self.config.n_experts else None
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
        rope = rotation(self.config, positions) if self.config.positions == "rope" else None
        return h, rope

    @jax.named_scope("logits")
    def logits(self, h: Array) -> Array:
        """[..., V] float32 of final hidden states [..., M]."""
        w = self.embedding[...].T if self.head is None else self.head[...]
        logits = dense(h, w, jnp.float32)
        cap = self.config.logit_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)
