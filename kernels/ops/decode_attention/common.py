"""Scores, masks and online softmax of one grid step of the decode attention kernels of TPUs and CPUs.

Both kernels start a sequence with its new tokens and then add the slots of the cache, so no softmax is empty. The rows
of a KV head are the T * G queries of `rows.py`; row r belongs to the new token r // G.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dantinox.kernels import cost
from dantinox.kernels.ops.decode_attention.block_table import BlockTable
from dantinox.kernels.ops.decode_attention.kv_cache import KVCache, dequantize, quantize
from dantinox.kernels.ops.decode_attention.numbers import narrow_weights
from dantinox.kernels.precision import matmul_precision
from dantinox.kernels.softcap import cap_scores

Array = jax.Array
Ref = Any  # a reference in VMEM or SMEM
LOWEST = float(jnp.finfo(jnp.float32).min)


class TokenInputs(NamedTuple):
    """Inputs of one decode step: arrays, their block specs, or references to those of one sequence.

    Attributes:
        q: queries [B, K, T * G, D].
        new_k, new_v: the new tokens as later steps read them from the cache, [B, K, T, D] in q's dtype.
        gate: logits [B, K, T * G, D] or [B, K, T * G, 1], or None.
        sinks: logits [1, K, T * G, 1] float32, or None.
    """

    q: Any
    new_k: Any
    new_v: Any
    gate: Any = None
    sinks: Any = None


class NewTokens(NamedTuple):
    """Static parameters of the new tokens of a sequence.

    Attributes:
        T: their number.
        G: queries of each per KV head.
        window: tokens that a query sees, its own included, or None for all that are in the ring buffer.
    """

    T: int
    G: int
    window: int | None


class ScoreOptions(NamedTuple):
    """Static options of the scores of q, from which `split_scale` has taken the sign and powers of two of the scale.

    Attributes:
        scale: the rest of the scale, at least 0.
        softcap: bound of the scores, or None.
    """

    scale: float
    softcap: float | None

    @property
    def exp_scale(self) -> float:
        """Factor on the results of `attention_scores`, in the exponent of the softmax."""
        return self.scale if self.softcap is None else 1.0


class QuantizedToken(NamedTuple):
    """The new tokens as the cache stores them: k and v [B, K, T, D]; an 8-bit cache has scales, [B, K, T] float32."""

    k: Any
    k_scale: Any
    v: Any
    v_scale: Any


def quantize_tokens(k: Array, v: Array, cache: KVCache) -> QuantizedToken:
    """Convert the new tokens, k and v [B, K, D] or [B, T, K, D], to the cache's dtype."""

    def by_head(x: Array) -> Array:
        return x.swapaxes(1, 2) if x.ndim == 4 else x[:, :, None]

    return QuantizedToken(*quantize(by_head(k), cache.k.dtype), *quantize(by_head(v), cache.v.dtype))


def token_inputs(q: Array, token: QuantizedToken, gate: Array | None, sinks: Array | None = None) -> TokenInputs:
    """Lay out q and gate [B, K, T * G, n] and the new tokens, with the rounding of the cache's dtype."""

    def read_back(x: Array, scale: Array | None) -> Array:
        return x if scale is None else dequantize(x, scale, q.dtype)

    return TokenInputs(q, read_back(token.k, token.k_scale), read_back(token.v, token.v_scale), gate, sinks)


def whole_spec(x: Array) -> pl.BlockSpec:
    """Return the spec of an array that all sequences share."""
    return pl.BlockSpec(x.shape, lambda *_: (0,) * x.ndim)


def sequence_spec(x: Array) -> pl.BlockSpec:
    """Return the spec of the part of an array [B, ...] that belongs to the step's sequence."""
    return pl.BlockSpec((1, *x.shape[1:]), lambda n, table, *_: (table.sequence[n], *(0,) * (x.ndim - 1)))


def estimate_cost(q: Array, cache: KVCache, gate: Array | None, max_visible: int) -> cost.Cost:
    """Return an upper bound of the cost: the lengths are not known at trace time."""
    (B, *tokens, H, D), (K, C) = q.shape, cache.k.shape[1:3]
    return cost.decode_attention(
        H=H,
        K=K,
        D=D,
        C=C,
        lengths=[max_visible - 1] * B,
        gate="none" if gate is None else "elementwise" if gate.shape[-1] == D else "head",
        itemsize=q.dtype.itemsize,
        kv_itemsize=cache.k.dtype.itemsize + (0 if cache.k_scale is None else 4 / D),
        T=math.prod(tokens),
    )


def dot_heads(a: Array, b: Array, contract: int) -> Array:
    """Compute a b^T (contract = 1) or a b (0) over the last two axes, in float32; the axes before them are heads."""
    n = a.ndim - 2
    heads = tuple(range(n))
    dims = (((n + 1,), (n + contract,)), (heads, heads))
    return jax.lax.dot_general(a, b, dims, precision=matmul_precision(a, b), preferred_element_type=jnp.float32)


def attention_scores(
    q: Array, k: Array, scores: ScoreOptions, k_scale: Array | None = None, *, tokens_in_lanes: bool = False
) -> Array:
    """Compute q k^T [..., G, slots], or the capped scores; `k_scale` [..., 1, slots] scales an 8-bit cache's keys.

    The keys are [..., slots, D], or [..., D, slots] with `tokens_in_lanes`.
    """
    qk = dot_heads(q, k.astype(q.dtype), 0 if tokens_in_lanes else 1)
    qk = qk if k_scale is None else qk * k_scale
    return qk if scores.softcap is None else cap_scores(qk, scale=scores.scale, softcap=scores.softcap)


def weigh_values(
    weights: Array, v: Array, v_scale: Array | None, dtype: jnp.dtype, *, tokens_in_lanes: bool = False
) -> Array:
    """Compute weights v in float32, multiplied in `dtype`; `v_scale` are the scales of an 8-bit cache's values."""
    weights, factor = narrow_weights(weights if v_scale is None else weights * v_scale, dtype)
    o = dot_heads(weights, v.astype(dtype), 1 if tokens_in_lanes else 0)
    return o if factor is None else o * factor


def cached_token_mask(
    shape: tuple[int, int], start: Array, first: Array, *, slot: Array, num_visible: Array, C: int, T: int = 1
) -> Array:
    """Return a mask of the slots that hold visible tokens other than the T new ones.

    Args:
        shape: [1, slots] or [slots, 1].
        start: the slot of the first element.
        first: slots before this one are masked.
        slot: slot of the newest token.
        num_visible: tokens that a query attends to, the new ones included.
        C: slots of a ring buffer.
        T: new tokens.
    """
    slots = start + jax.lax.broadcasted_iota(jnp.int32, shape, int(shape[0] == 1))
    age = _age(slots, slot, C)
    visible = (age < num_visible) & (slots >= first) & (slots < C)
    return visible if T == 1 else visible & (age >= T)


def window_mask(start: Array, size: int, *, slot: Array, C: int, tokens: NewTokens) -> Array | None:
    """Return which of `size` slots from `start` on are in the window of each row, [T * G, size]; None: all.

    The window of one new token is that of `cached_token_mask`.
    """
    if tokens.T == 1 or tokens.window is None:
        return None
    shape = (tokens.T * tokens.G, size)
    slots = start + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    return _age(slots, slot, C) - (tokens.T - 1 - _token_of_row(shape, tokens.G)) < tokens.window


def _age(slots: Array, slot: Array, C: int) -> Array:
    """Return how many tokens are newer than that of each slot; C for the newest token itself, in `slot`."""
    return jnp.where(slots < slot, slot - slots, slot - slots + C)


def _token_of_row(shape: tuple[int, int], G: int) -> Array:
    """Return the new token of each row, r // G; a TPU core divides no vectors of integers."""
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return row if G == 1 else ((row.astype(jnp.float32) + 0.5) * (1 / G)).astype(jnp.int32)


def is_first_step(table: BlockTable, step: Array, b: Array) -> Array:
    """Return whether a grid step is the first of its sequence b."""
    return step == jnp.where(b == 0, 0, table.ends[jnp.maximum(b - 1, 0)])


class OnlineSoftmax(NamedTuple):
    """References to the state of one sequence's softmax, float32.

    The output is normalized after each step, since a sum of values can overflow where their mean does not.

    Attributes:
        m: largest score so far, before `ScoreOptions.exp_scale`, [K, G, 1].
        l: sum of the exponentials, [K, G, 1].
        o: weighted mean of the values, [K, G, D].
    """

    m: Ref
    l: Ref
    o: Ref

    @staticmethod
    def scratch_shapes(q: Array) -> list[Any]:
        """Return the scratch memory of the state, for queries [B, K, G, D]."""
        _, K, G, D = q.shape
        return [pltpu.VMEM(shape, jnp.float32) for shape in ((K, G, 1), (K, G, 1), (K, G, D))]

    def init_with_token(self, s: Array, v: Array) -> None:
        """Initialize with one token: its scores [K, G, 1] and its values [K, 1, D]."""
        self.m[...] = s
        self.l[...] = jnp.ones(self.l.shape, jnp.float32)
        self.o[...] = jnp.broadcast_to(v.astype(jnp.float32), self.o.shape)

    def init_with_tokens(self, s: Array, v: Array, tokens: NewTokens, exp_scale: float, dtype: jnp.dtype) -> None:
        """Initialize with the new tokens, of which a row sees its own and those before it.

        Args:
            s: scores [K, T * G, T].
            v: values [K, T, D].
            tokens: their static parameters.
            exp_scale: factor on the scores.
            dtype: dtype of the product with the values.
        """
        if tokens.T == 1:
            self.init_with_token(s, v)
            return
        shape = s.shape[1:]
        distance = _token_of_row(shape, tokens.G) - jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        visible = distance >= 0
        if tokens.window is not None:
            visible &= distance < tokens.window
        s = jnp.where(visible, s, LOWEST)
        m = jnp.max(s, axis=-1, keepdims=True)
        p = jnp.where(visible, jnp.exp((s - m) * exp_scale), 0)
        l = jnp.sum(p, axis=-1, keepdims=True)
        self.m[...], self.l[...] = m, l
        self.o[...] = weigh_values(p / l, v, None, dtype)

    def add_slots(
        self, head: Any, s: Array, visible: Array | None, exp_scale: float, weigh: Callable[[Array], Array]
    ) -> None:
        """Add slots of one head, or of a slice of heads.

        Args:
            head: index of the heads.
            s: scores [..., G, slots].
            visible: mask of the slots that count, broadcastable to s; None: all. Scores of others may be NaN.
            exp_scale: factor on the scores.
            weigh: maps the weights [..., G, slots] to their products with the values, [..., G, D].
        """
        s = s if visible is None else jnp.where(visible, s, LOWEST)
        m_old = self.m[head]
        m = jnp.maximum(m_old, jnp.max(s, axis=-1, keepdims=True))
        # The difference is scaled, not the scores, which may overflow with float16 operands.
        p, decay = (jnp.exp(d if exp_scale == 1 else d * exp_scale) for d in (s - m, m_old - m))
        p = p if visible is None else jnp.where(visible, p, 0)  # scores may be as low as `LOWEST`
        l_old = decay * self.l[head]
        l = l_old + jnp.sum(p, axis=-1, keepdims=True)
        self.m[head], self.l[head] = m, l
        self.o[head] = l_old / l * self.o[head] + weigh(p / l)

    def output(self, gate: Ref | None, sinks: Ref | None = None, exp_scale: float = 1.0) -> Array:
        """Return the gated output [K, T * G, D] in float32.

        Args:
            gate: refers to [1, K, T * G, n], or None.
            sinks: refers to [1, K, T * G, 1], or None.
            exp_scale: factor on the scores.
        """
        o = self.o[...]
        if sinks is not None:
            l = self.l[...]
            o *= l / (l + jnp.exp(sinks[0] - self.m[...] * exp_scale))  # 0 if the exponential is infinite
        return o if gate is None else o * jax.nn.sigmoid(gate[0].astype(jnp.float32))
