"""The attention layer: projections, rotary positions and the gate around `dantinox.kernels.attention`."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dantinox import kernels
from dantinox.config import ModelConfig
from dantinox.distributed.context import attend_over_context
from dantinox.distributed.inference import call_kernel
from dantinox.model.layers import dense, filled_parameter, norm, norm_scale, parameter, value_of, zero_bias
from dantinox.model.rope import Ropes, apply_rope

Array = jax.Array
PastKeyValues = tuple[Array, Array, Array]
"""(keys, values, valid): keys and values [B, P, K, D] of P earlier positions, and which of these exist, bool [B, P]."""


class _KeyStream:
    """A stream of random keys: call n returns key n, so a parameter's values depend only on its position and the seed.

    The keys use XLA's own bit generator; a threefry draw of each shape takes twice as long to compile.
    """

    def __init__(self, rngs: nnx.Rngs) -> None:
        seed = jax.random.key_data(rngs.params()).reshape(-1)
        self.root, self.count = jnp.concatenate([seed, seed]), 0

    def __call__(self) -> Array:
        self.count += 1
        return jax.random.wrap_key_data(self.root.at[3].add(self.count), impl="unsafe_rbg")


def _head_norm(config: ModelConfig, letter: str, heads: int) -> nnx.Param | None:
    """Return the scale of the norm of queries or keys, per head or for all `heads`; None without qk_norm."""
    if not config.qk_norm:
        return None
    D = config.resolved_head_dim
    return norm_scale(config, f"{letter}D", (heads, D)) if config.qk_norm_all_heads else norm_scale(config, "D", (D,))


class Attention(nnx.Module):
    """Grouped-query attention with optional window, gate, QK-norm, biases, sinks and soft cap."""

    def __init__(self, config: ModelConfig, layer: int, key: _KeyStream, out_std: float) -> None:
        M, H, K, D = config.dim, config.n_heads, config.n_kv_heads, config.resolved_head_dim
        self.config, self.window, self.rope = config, config.layer_window(layer), config.layer_rope(layer)
        self.q = parameter(key(), "MHD", (M, H, D), 0.02)
        self.k = parameter(key(), "MKD", (M, K, D), 0.02)
        self.v = parameter(key(), "MKD", (M, K, D), 0.02)
        self.o = parameter(key(), "HDM", (H, D, M), out_std)
        gate_width = {"none": 0, "head": 1, "elementwise": D}[config.attn_gate]
        self.gate = parameter(key(), "MHD", (M, H, gate_width), 0.02) if gate_width else None
        self.q_norm = _head_norm(config, "H", H)
        self.k_norm = _head_norm(config, "K", K)
        self.q_bias = zero_bias(config.attn_bias, "HD", (H, D))
        self.k_bias = zero_bias(config.attn_bias, "KD", (K, D))
        self.v_bias = zero_bias(config.attn_bias, "KD", (K, D))
        self.o_bias = zero_bias(config.attn_bias and config.attn_out_bias, "M", (M,))
        self.sinks = filled_parameter(0, "H", (H,)) if config.attn_sinks else None

    def qkv_proj(self, x: Array, ropes: Ropes) -> tuple[Array, Array, Array, Array | None]:
        """Project x [B, T, M] to q [B, T, H, D], k and v [B, T, K, D], and gate logits [B, T, H, D or 1] or None."""
        with jax.named_scope("qkv"):
            q = dense(x, self.q, bias=self.q_bias)
            k = dense(x, self.k, bias=self.k_bias)
            v = dense(x, self.v, bias=self.v_bias)
            gate = None if self.gate is None else dense(x, self.gate)
        q, k = norm(q, self.q_norm, self.config), norm(k, self.k_norm, self.config)
        if self.rope is not None:
            q, k = apply_rope(q, *ropes[self.rope]), apply_rope(k, *ropes[self.rope])
        return q, k, v, gate

    @jax.named_scope("out")
    def out_proj(self, o: Array) -> Array:
        """Project the heads [..., H, D] back to the residual width [..., M]."""
        return dense(o, self.o, bias=self.o_bias, num_summed=2)

    def __call__(
        self, x: Array, ropes: Ropes, past: PastKeyValues | None = None, segment_ids: Array | None = None
    ) -> tuple[Array, Array, Array]:
        """Attend causally over `past` and x.

        Args:
            x: [B, T, M].
            ropes: of the positions of x.
            past: keys and values of earlier positions.
            segment_ids: [B, T] int32, without `past`; a token attends to its own segment only. None: one segment.

        Returns:
            (output [B, T, M], keys and values [B, T, K, D] of x, for a cache).
        """
        q, k, v, gate = self.qkv_proj(x, ropes)
        sinks = value_of(self.sinks)
        with jax.named_scope("attend"):
            if segment_ids is not None:
                o = self.attend(sinks, q, k, v, gate, segment_ids=(segment_ids, segment_ids))
            elif past is None:
                o = attend_over_context(self.attend, sinks, q, k, v, gate, self.window)
            else:
                past_keys, past_values, past_valid = past
                keys = jnp.concatenate([past_keys, k], axis=1)
                values = jnp.concatenate([past_values, v], axis=1)
                # Positions that do not exist are in a segment of their own, which no query attends to.
                q_ids = jnp.zeros(x.shape[:2], jnp.int32)
                kv_ids = jnp.concatenate([jnp.where(past_valid, 0, 1), q_ids], axis=1)
                o = self.attend(sinks, q, keys, values, gate, segment_ids=(q_ids, kv_ids))
        return self.out_proj(o), k, v

    def attend(
        self,
        sinks: Array | None,
        q: Array,
        k: Array,
        v: Array,
        gate: Array | None,
        segment_ids: tuple[Array, Array] | None = None,
    ) -> Array:
        """Attend from q [B, T, H, D] to the k and v [B, S, K, D] inside the layer's window and the query's segment."""
        config = self.config

        def run(sinks: Array | None, q: Array, k: Array, v: Array, gate: Array | None, ids: Any) -> Array:
            return kernels.attention(
                q,
                k,
                v,
                gate=gate,
                window=self.window,
                scale=config.attn_scale,
                softcap=config.attn_softcap,
                segment_ids=ids,
                sinks=sinks,
                implementation=config.attn,
            )

        letters = ["H", "BTHD", "BSKD", "BSKD", "BTHD", ("BT", "BS")]
        return call_kernel(run, [sinks, q, k, v, gate, segment_ids], letters, "BTHD")

    def decode_step(self, x: Array, ropes: Ropes, cache: kernels.KVCache) -> tuple[Array, kernels.KVCache]:
        """Decode T tokens per sequence: x [B, T, M] -> (output [B, T, M], cache with the tokens appended)."""
        q, k, v, gate = self.qkv_proj(x, ropes)
        window = self.window
        if window is not None and window + x.shape[1] - 1 > cache.k.shape[2]:
            window = None  # the cache has room for the whole text, which is shorter than the window
        with jax.named_scope("attend"):
            sinks = value_of(self.sinks)
            cuts = kernels.KVCache("BKCD", "BKCD", "B", *["BKC" if x is not None else None for x in cache[3:]])
            arguments, letters = [sinks, q, k, v, gate, cache], ["H", "BTHD", "BTKD", "BTKD", "BTHD", cuts]
            o, cache = call_kernel(functools.partial(self._decode, window), arguments, letters, ("BTHD", cuts))
        return self.out_proj(o), cache

    def _decode(
        self,
        window: int | None,
        sinks: Array | None,
        q: Array,
        k: Array,
        v: Array,
        gate: Array | None,
        cache: kernels.KVCache,
    ) -> tuple[Array, kernels.KVCache]:
        return kernels.decode_attention(
            q,
            k,
            v,
            cache,
            gate=gate,
            window=window,
            scale=self.config.attn_scale,
            softcap=self.config.attn_softcap,
            sinks=sinks,
            implementation=self.config.decode,
        )
