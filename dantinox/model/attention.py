"""The attention layer: projections, positions and gate around `dantinox.kernels`."""

import jax
import jax.numpy as jnp
from flax import nnx

from dantinox import kernels
from dantinox.config import ModelConfig
from dantinox.distributed.shard_map import shard_map_over_batch
from dantinox.model.layers import dense, filled_parameter, parameter, rms_norm
from dantinox.model.rope import apply_rope

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
        M, H, K, D = config.dim, config.n_heads, config.n_kv_heads, config.head_dim
        self.config, self.window = config, config.layer_window(layer)
        self.q = parameter(key(), "MHD", (M, H, D), 0.02)
        self.k = parameter(key(), "MKD", (M, K, D), 0.02)
        self.v = parameter(key(), "MKD", (M, K, D), 0.02)
        self.o = parameter(key(), "HDM", (H, D, M), out_std)
        gate_width = {"none": 0, "head": 1, "elementwise": D}[config.attn_gate]
        self.gate = parameter(key(), "MHD", (M, H, gate_width), 0.02) if gate_width else None
        self.q_scale = filled_parameter(1, "D", (D,)) if config.qk_norm else None
        self.k_scale = filled_parameter(1, "D", (D,)) if config.qk_norm else None

    def project(self, x: Array, rope: tuple[Array, Array] | None) -> tuple[Array, Array, Array, Array | None]:
        """x [B, T, M] -> q [B, T, H, D], k and v [B, T, K, D], gate logits [B, T, H, D or 1] or None."""
        with jax.named_scope("qkv"):
            q, k, v = dense(x, self.q), dense(x, self.k), dense(x, self.v)
            gate = None if self.gate is None else dense(x, self.gate)
        if self.q_scale is not None:
            q = rms_norm(q, self.q_scale, self.config.norm_eps)
            k = rms_norm(k, self.k_scale, self.config.norm_eps)
        if rope is not None:
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)
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
                o = shard_map_over_batch(self.attend)(q, k, v, *gates)
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
