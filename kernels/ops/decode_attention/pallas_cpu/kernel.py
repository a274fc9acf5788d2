"""Decode attention in a form that a CPU interprets fast: XLA appends, one kernel attends.

Math      s = cap(scale q k^T);  o = sigmoid(gate) * softmax(s over the last min(length + 1, C, window) tokens) v
Tiling    one grid step per block of slots that holds visible tokens, as in `pallas_tpu/kernel.py`; but if every ring
          buffer is at least half full, one step processes the slots of all sequences under a mask:

              slots ->             0           C / 2         C
              sequence 0           █████████████████░░░░░░░░░     ░ read, multiplied and masked
              sequence 1           ████████████████████░░░░░░

State     m, l [K, T G, 1] and the output [K, T G, D] of one sequence, or of all, in float32.
Traffic   reads the visible blocks of k and v once, for any C and T, or all C slots; 4 H D FLOPs per slot read and new
          token. XLA writes the new tokens to their slots, in place.
Limits    float32, bfloat16, float16; caches of int8 and float8_e4m3fn too; any B, H, K, D, C. The scaled scores of
          float32 and bfloat16 operands have to fit float32; float16 has no such limit. No gradient.
Source    that of the TPU kernel.

The interpreter copies an output that is aliased to an input in every step, so the kernel only reads the ring buffers.
They are scalar-prefetch operands, since the interpreter would copy blocks in every step. XLA's CPU compiler also
copies each slice that a step reads, but not an unsliced array; hence the single step for ring buffers that are half
full.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dantinox.kernels.cost import Cost
from dantinox.kernels.ops.decode_attention.block_table import BlockTable, make_block_table
from dantinox.kernels.ops.decode_attention.common import (
    NewTokens,
    OnlineSoftmax,
    ScoreOptions,
    TokenInputs,
    attention_scores,
    cached_token_mask,
    estimate_cost,
    is_first_step,
    quantize_tokens,
    sequence_spec,
    token_inputs,
    weigh_values,
    whole_spec,
    window_mask,
)
from dantinox.kernels.ops.decode_attention.kv_cache import KVCache, append_token, append_tokens
from dantinox.kernels.ops.decode_attention.numbers import split_scale
from dantinox.kernels.ops.decode_attention.rows import group_rows, group_sinks, ungroup_rows
from dantinox.kernels.tuning import tunable
from dantinox.kernels.vma import varying_shape

Array = jax.Array
Ref = Any
MAX_BLOCK_SIZE = 512  # slots


class DecodeConfig(NamedTuple):
    """Static parameters of the kernel.

    Attributes:
        C: slots of a ring buffer.
        block_size: slots per step, unless it processes all sequences.
        scores: options of the scores.
        tokens: the new tokens.
        batched: whether one step processes all slots of all sequences, with their heads along one axis.
    """

    C: int
    block_size: int
    scores: ScoreOptions
    tokens: NewTokens
    batched: bool = False


@tunable
def choose_block_size(C: int, max_visible: int, itemsize: int, eight_bits: bool) -> int:
    """Return the slots per block: all of a short ring buffer, otherwise a power of two.

    Args:
        C: slots of a ring buffer.
        max_visible: upper bound on the tokens that a query attends to.
        itemsize: bytes per value of the cache.
        eight_bits: whether the cache has scales.
    """
    if C <= MAX_BLOCK_SIZE:
        return C
    smallest = 128 if eight_bits else 32 // itemsize
    return min(MAX_BLOCK_SIZE, max(smallest, 1 << (max_visible - 1).bit_length()))


def xla_is_faster(C: int) -> bool:
    """Return whether plain XLA is faster even if the ring buffers are half full.

    Measured on 2 cores, relative to `xla.py`: one full ring buffer of 4096 slots 0.8, of 32768 0.7, eight of 4096 0.7;
    3000 of 4096 slots 0.8, eight times 1500 0.5; 512 of 32768 1 / 13.
    """
    return C < 1024


def decode_attention(
    q: Array,
    k: Array,
    v: Array,
    cache: KVCache,
    *,
    gate: Array | None,
    max_visible: int,
    scale: float,
    softcap: float | None,
    sinks: Array | None = None,
) -> tuple[Array, KVCache]:
    """Append tokens and attend to the last `max_visible` ones of each; see `dantinox.kernels.decode_attention`."""
    K, C, T = *cache.k.shape[1:3], 1 if q.ndim == 3 else q.shape[1]
    tokens = NewTokens(T, q.shape[-2] // K, None if max_visible == C else max_visible)
    block_size = choose_block_size(C, min(C, max_visible + T - 1), cache.k.dtype.itemsize, cache.k_scale is not None)
    queries, scale = split_scale(q, scale)
    config = DecodeConfig(C, block_size, ScoreOptions(scale, softcap), tokens)
    table = make_block_table(cache.length, C, max_visible, block_size, T)._replace(written=None)
    call_cost = estimate_cost(q, cache, gate, max_visible)
    new_cache = (append_token if q.ndim == 3 else append_tokens)(cache, k, v)
    token = token_inputs(
        group_rows(queries, K),
        quantize_tokens(k, v, cache),
        None if gate is None else group_rows(gate, K),
        None if sinks is None else group_sinks(sinks, K, T),
    )

    def attend_by_blocks() -> Array:
        return ungroup_rows(_pallas_attend(token, new_cache, table, config, call_cost), q.shape)

    def attend_batched() -> Array:
        def merge_batch(x: Array) -> Array:
            return x.reshape(1, -1, *x.shape[2:])

        merged_cache = new_cache._replace(k=merge_batch(new_cache.k), v=merge_batch(new_cache.v))
        sequence, block, ends = jnp.int32([[0], [0], [1]])
        one_step = BlockTable(jnp.int32(1), sequence, block, ends, table.num_visible, table.slot)
        repeated = None if token.sinks is None else jnp.broadcast_to(token.sinks, (q.shape[0], *token.sinks.shape[1:]))
        merged = jax.tree.map(merge_batch, token._replace(sinks=repeated))
        o = _pallas_attend(merged, merged_cache, one_step, config._replace(batched=True), call_cost)
        return ungroup_rows(o.reshape(token.q.shape), q.shape)

    # If the cache has another dtype, converting it would copy all of it.
    if block_size < C == max_visible and cache.k.dtype == q.dtype:
        half_full = jnp.all(table.num_visible >= C // 2)
        return jax.lax.cond(half_full, attend_batched, attend_by_blocks), new_cache
    return attend_by_blocks(), new_cache


def _decode_kernel(
    config: DecodeConfig,
    table: BlockTable,
    cache: KVCache,
    token: TokenInputs,
    o_ref: Ref,
    softmax: OnlineSoftmax,
) -> None:
    """Run one grid step on references to the table and cache, the inputs, the output and the softmax's state."""
    step = pl.program_id(0)
    b, block = table.sequence[step], table.block[step]
    if config.batched:  # per head: the sequences differ in length
        num_heads = token.q.shape[1]
        slot, num_visible = (
            jnp.repeat(per_sequence[...], num_heads // per_sequence.shape[0])[:, None, None]
            for per_sequence in (table.slot, table.num_visible)
        )
    else:
        slot, num_visible = table.slot[b], table.num_visible[b]
    first, size = block * config.block_size, config.C if config.batched else config.block_size

    @pl.when(is_first_step(table, step, b))
    def init_with_new_tokens() -> None:
        q = token.q[0]
        s = attention_scores(q, token.new_k[0], config.scores)
        softmax.init_with_tokens(s, token.new_v[0], config.tokens, config.scores.exp_scale, q.dtype)

    # A partial last block begins earlier; the mask hides the slots that it repeats.
    start = jnp.minimum(first, config.C - size)

    def slot_mask(*shape: int) -> Array:
        return cached_token_mask(shape, start, first, slot=slot, num_visible=num_visible, C=config.C, T=config.tokens.T)

    q, slots = token.q[0], (b, slice(None), pl.ds(start, size))
    k_scale, v_scale = (None if scale is None else scale[slots][:, None] for scale in (cache.k_scale, cache.v_scale))
    s = attention_scores(q, cache.k[slots], config.scores, k_scale)
    v = cache.v[slots]
    if not config.batched:
        v = jnp.where(slot_mask(size, 1), v, 0)  # 0 * NaN is NaN
        v_scale = None if v_scale is None else jnp.where(slot_mask(1, size), v_scale, 0)

    def weigh(weights: Array) -> Array:
        wv = weigh_values(weights, v, v_scale, q.dtype)
        if not config.batched:
            return wv
        # A masked copy of the values takes as long as the rest of the step, so only NaN in an empty slot causes one.

        def masked_wv() -> Array:
            return weigh_values(weights, jnp.where(slot_mask(size, 1), v, 0), v_scale, q.dtype)

        return jax.lax.cond(jnp.all(jnp.isfinite(wv)), lambda: wv, masked_wv)

    # The mask also hides the new tokens, which the cache holds too.
    visible, in_window = slot_mask(1, size), window_mask(start, size, slot=slot, C=config.C, tokens=config.tokens)
    visible = visible if in_window is None else visible & in_window
    softmax.add_slots(slice(None), s, visible, config.scores.exp_scale, weigh)

    @pl.when(step == table.ends[b] - 1)
    def write_output() -> None:
        o = softmax.output(token.gate, token.sinks, config.scores.exp_scale)
        o_ref[0] = o.astype(o_ref.dtype)


def _pallas_attend(
    token: TokenInputs, cache: KVCache, table: BlockTable, config: DecodeConfig, call_cost: Cost
) -> Array:
    """Return o in the shape of token.q [B, K, T * G, D]; `cache` already holds the new tokens."""
    q = token.q

    def decode_kernel(table: BlockTable, cache: KVCache, token: TokenInputs, o_ref: Ref, *softmax: Ref) -> None:
        _decode_kernel(config, table, cache, token, o_ref, OnlineSoftmax(*softmax))

    # JAX's own batching rule drops the number of steps if the caches are batched and that number is not.
    @jax.custom_batching.sequential_vmap
    def call_kernel(num_steps: Array, table: BlockTable, cache: KVCache, token: TokenInputs) -> Array:
        in_specs = jax.tree.map(sequence_spec, token)
        if token.sinks is not None:
            in_specs = in_specs._replace(sinks=whole_spec(token.sinks))
        return pl.pallas_call(
            decode_kernel,
            out_shape=varying_shape(q.shape, q.dtype, q),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=(num_steps,),
                in_specs=[in_specs],
                out_specs=sequence_spec(q),
                scratch_shapes=OnlineSoftmax.scratch_shapes(q),
            ),
            cost_estimate=call_cost.to_pallas(),
            interpret=True,
            name="decode_attention",
        )(table, cache, token)

    return call_kernel(table.num_steps, table._replace(num_steps=None), cache._replace(length=None), token)
