"""Decode attention on TPU: one kernel that appends to the ring buffers and attends.

Math      s = cap(scale q k^T);  o = sigmoid(gate) * softmax(s over the last min(length + 1, C, window) tokens) v
Tiling    one grid step per block of slots that holds visible tokens; the device computes how many there are.

              blocks of slots ->   0   1   2   3   4   5
              sequence 0           █   ▞   ░   ░   ▞   █      ▞ masked; the last one receives the new token
              sequence 1           ▞   ░   ░   ░   ░   ░      ░ not in the grid

          One step loads all K heads of a block; the G query heads of each are the rows of its matrix products.
State     m, l [K, G, 1] and the output [K, G, D] of one sequence, in float32.
Traffic   reads the visible blocks of k and v once, for any C; writes 8 or 16 slots of each ring buffer, in place:
          the ring buffers are aliased to outputs. Plain XLA reads all C slots. 4 H D FLOPs per visible token, so the
          kernel is bound by memory.
Limits    float32, bfloat16, float16; caches of int8 and float8_e4m3fn too; any B, H, K, D, C. The scaled scores of
          float32 and bfloat16 operands have to fit float32; float16 has no such limit. No gradient.
          `dantinox.kernels.decode_attention` raises ValueError.
Source    Dao, Flash-Decoding (2023), without its second pass: a TPU core has no other core to split a sequence with.

A TPU writes whole memory tiles, so the kernel merges the new token into the tile that it loaded.

The kernel multiplies the values of an 8-bit cache without dequantizing them: the scales of the keys multiply the
scores, those of the values the softmax weights, which takes D times fewer multiplications.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dantinox.kernels.ops.decode_attention.block_table import BlockTable, make_block_table
from dantinox.kernels.ops.decode_attention.common import (
    OnlineSoftmax,
    QuantizedToken,
    ScoreOptions,
    TokenInputs,
    attention_scores,
    cached_token_mask,
    estimate_cost,
    group_heads,
    is_first_step,
    quantize_token,
    sequence_spec,
    token_inputs,
    weigh_values,
)
from dantinox.kernels.ops.decode_attention.kv_cache import KVCache
from dantinox.kernels.ops.decode_attention.numbers import split_scale
from dantinox.kernels.ops.decode_attention.pallas_tpu import block_sizes
from dantinox.kernels.vma import varying_shape

Array = jax.Array
Ref = Any  # a reference in VMEM or SMEM
LANES = 128  # slots in a memory tile of scales
TILE_BYTES = 32  # slots x bytes per value in the second-minor dimension of a memory tile


class DecodeConfig(NamedTuple):
    """Static parameters of the kernel.

    Attributes:
        C: slots of a ring buffer.
        block_size: slots per block.
        tile_rows, tile_lanes: slots written at once to k and v, and to their scales.
        scores: options of the scores.
    """

    C: int
    block_size: int
    tile_rows: int
    tile_lanes: int
    scores: ScoreOptions


class CacheInputs(NamedTuple):
    """The cache and the new token's stored form: arrays, their block specs, or references of one grid step.

    Attributes:
        k, v: a block of the ring buffers, [1, K, block_size, D].
        stored: for an 8-bit cache, the new token as it is stored: values [1, K, 1, D], scales [1, K, 1].
        k_scale, v_scale: a block of the scales, [1, K, block_size].
    """

    k: Any
    v: Any
    stored: QuantizedToken | None = None
    k_scale: Any = None
    v_scale: Any = None


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
) -> tuple[Array, KVCache]:
    """Append a token and attend to the last `max_visible` ones; see `dantinox.kernels.decode_attention`."""
    (B, H, D), (K, C) = q.shape, cache.k.shape[1:3]
    tile_rows, tile_lanes = min(C, TILE_BYTES // cache.k.dtype.itemsize), min(C, LANES)
    tile_slots = tile_rows if cache.k_scale is None else tile_lanes
    slot_bytes = K * D * cache.k.dtype.itemsize
    block_size = block_sizes.choose_block_size(C, max_visible, tile_slots, slot_bytes)
    q, scale = split_scale(q, scale)
    config = DecodeConfig(C, block_size, tile_rows, tile_lanes, ScoreOptions(scale, softcap))
    table = make_block_table(cache.length, C, max_visible, block_size)
    q_heads, gate_heads = group_heads(q, K), None if gate is None else group_heads(gate, K)
    stored = quantize_token(k, v, cache)
    token = token_inputs(q_heads, stored, gate_heads)
    blocks = CacheInputs(cache.k, cache.v, None, cache.k_scale, cache.v_scale)
    ring_buffers = cache._replace(length=None)
    if cache.k_scale is not None:
        blocks = blocks._replace(stored=jax.tree.map(lambda x: x[:, :, None], stored))

    def decode_kernel(
        table: BlockTable, token: TokenInputs, cache: CacheInputs, o_ref: Ref, tiles: KVCache, *softmax: Ref
    ) -> None:
        _decode_kernel(config, table, token, cache, o_ref, tiles, OnlineSoftmax(*softmax))

    o, tiles = pl.pallas_call(
        decode_kernel,
        out_shape=[
            varying_shape(q_heads.shape, q.dtype, q),
            jax.tree.map(lambda x: varying_shape(x.shape, x.dtype, x), ring_buffers),
        ],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(table.num_steps,),
            in_specs=[jax.tree.map(sequence_spec, token), _block_specs(config, blocks)],
            out_specs=[sequence_spec(q_heads), _tile_specs(config, ring_buffers)],
            scratch_shapes=OnlineSoftmax.scratch_shapes(q_heads),
        ),
        input_output_aliases=_aliases(table, token, blocks),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        cost_estimate=estimate_cost(q, cache, gate, max_visible).to_pallas(),
        name="decode_attention",
    )(table._replace(num_steps=None), token, blocks)
    new_cache = tiles._replace(length=cache.length + 1)
    return o.reshape(B, H, D), new_cache


def _decode_kernel(
    config: DecodeConfig,
    table: BlockTable,
    token: TokenInputs,
    cache: CacheInputs,
    o_ref: Ref,
    tiles: KVCache,
    softmax: OnlineSoftmax,
) -> None:
    """Run one grid step on references to the table, the inputs, the outputs and the softmax's state."""
    step = pl.program_id(0)
    b, block = table.sequence[step], table.block[step]
    slot, num_visible = table.slot[b], table.num_visible[b]
    size, block_start = config.block_size, block * config.block_size

    @pl.when(is_first_step(table, step, b))
    def init_with_new_token() -> None:
        """Start a sequence with its new token, which the cache does not hold yet."""
        s = attention_scores(token.q[0], token.new_k[0], config.scores)
        softmax.init_with_token(s, token.new_v)

    def attend(head: Array, masked: bool) -> None:
        """Attend from one head to the block; masked slots may hold NaN."""

        def slot_mask(*shape: int) -> Array:
            return cached_token_mask(shape, block_start, block_start, slot=slot, num_visible=num_visible, C=config.C)

        def load_scale(scale: Ref | None) -> Array | None:
            return None if scale is None else scale[0, pl.ds(head, 1)]

        q = token.q[0, head]
        k_scale, v_scale = load_scale(cache.k_scale), load_scale(cache.v_scale)
        s = attention_scores(q, cache.k[0, head], config.scores, k_scale)
        v, visible = cache.v[0, head], slot_mask(1, size) if masked else None
        if visible is not None:
            v = jnp.where(slot_mask(size, 1), v, 0)  # 0 * NaN is NaN
            v_scale = None if v_scale is None else jnp.where(visible, v_scale, 0)
        softmax.add_slots(
            head, s, visible, config.scores.exp_scale, lambda weights: weigh_values(weights, v, v_scale, q.dtype)
        )

    # Fully visible blocks need no mask.
    oldest = (slot + 1 - num_visible + config.C) % config.C
    fully_visible = (block != slot // size) & (block_start + size <= config.C)
    fully_visible &= (block != oldest // size) | (oldest % size == 0)

    def attend_from_all_heads(masked: bool) -> None:
        # A loop over the heads: if it is unrolled, libtpu interleaves them and spills.
        jax.lax.fori_loop(0, np.int32(token.q.shape[1]), lambda head, _: attend(head, masked), None)

    for condition, masked in ((fully_visible, False), (~fully_visible, True)):
        pl.when(condition)(functools.partial(attend_from_all_heads, masked))

    @pl.when(slot // size == block)
    def write_new_token() -> None:
        """Merge the new token into its memory tile and write the tile back."""
        new_k, new_v = (token.new_k, token.new_v) if cache.stored is None else (cache.stored.k, cache.stored.v)
        tile = pl.multiple_of(slot % size // config.tile_rows * config.tile_rows, config.tile_rows)
        for loaded, new, out in ((cache.k, new_k, tiles.k), (cache.v, new_v, tiles.v)):
            row = jax.lax.broadcasted_iota(jnp.int32, (1, config.tile_rows, 1), 1) + tile + block_start
            old = loaded[0, :, pl.ds(tile, config.tile_rows)]
            out[0] = jnp.where(row == slot, new[0], old)
        if cache.stored is None:
            return
        tile = pl.multiple_of(slot % size // config.tile_lanes * config.tile_lanes, config.tile_lanes)
        for loaded, new, out in (
            (cache.k_scale, cache.stored.k_scale, tiles.k_scale),
            (cache.v_scale, cache.stored.v_scale, tiles.v_scale),
        ):
            lane = jax.lax.broadcasted_iota(jnp.int32, (1, config.tile_lanes), 1) + tile + block_start
            old = loaded[0, :, pl.ds(tile, config.tile_lanes)]
            out[0] = jnp.where(lane == slot, new[0], old)

    @pl.when(step == table.ends[b] - 1)
    def write_output() -> None:
        o_ref[0] = softmax.output(token.gate).astype(o_ref.dtype)


def _block_specs(config: DecodeConfig, cache: CacheInputs) -> CacheInputs:
    """Return specs of the step's block of the ring buffers [B, K, C, ...] and of its sequence's stored token."""

    def block_spec(x: Array) -> pl.BlockSpec:
        _, K, _, *values = x.shape
        return pl.BlockSpec(
            (1, K, config.block_size, *values),
            lambda n, table: (table.sequence[n], 0, table.block[n], *(0,) * len(values)),
        )

    ring_buffers = jax.tree.map(block_spec, cache._replace(stored=None))
    return ring_buffers._replace(stored=jax.tree.map(sequence_spec, cache.stored))


def _tile_specs(config: DecodeConfig, ring_buffers: KVCache) -> KVCache:
    """Return specs of the memory tile of each ring buffer [B, K, C, ...] that receives the new token."""

    def tile_spec(x: Array) -> pl.BlockSpec:
        _, K, _, *values = x.shape
        tile_slots = config.tile_rows if values else config.tile_lanes
        return pl.BlockSpec(
            (1, K, tile_slots, *values),
            lambda n, table: (table.sequence[n], 0, table.slot[table.sequence[n]] // tile_slots, *(0,) * len(values)),
        )

    return jax.tree.map(tile_spec, ring_buffers)


def _aliases(table: BlockTable, token: TokenInputs, cache: CacheInputs) -> dict[int, int]:
    """Return {position among the inputs: position among the outputs} of the ring buffers; `o` is output 0."""
    before = len(jax.tree.leaves((table._replace(num_steps=None), token)))
    aliases = {before: 1, before + 1: 2}
    if cache.stored is not None:
        num_inputs = before + len(jax.tree.leaves(cache))
        aliases |= {num_inputs - 2: 3, num_inputs - 1: 4}
    return aliases
