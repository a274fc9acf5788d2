"""Decode attention on TPU: one kernel that appends to the ring buffers and attends.

Math      s = cap(scale q k^T);  o = sigmoid(gate) * softmax(s over the last min(length + 1, C, window) tokens) v
Tiling    one grid step per block of slots that holds visible tokens; the device computes how many there are.

              blocks of slots ->   0   1   2   3   4   5
              sequence 0           █   ▞   ░   ░   ▞   █      ▞ masked; the last one receives the new token
              sequence 1           ▞   ░   ░   ░   ░   ░      ░ not in the grid

          One step loads all K heads of a block; the G query heads of each are the rows of its matrix products.
State     m, l [K, G, 1] and the output [K, G, D] of one sequence, in float32.
Traffic   reads the visible blocks of k and v once, for any C; writes 8 to 128 slots of each ring buffer, in place:
          the ring buffers are aliased to outputs. Plain XLA reads all C slots. 4 H D FLOPs per visible token, so the
          kernel is bound by memory.
Limits    float32, bfloat16, and float16, which is computed in float32; caches of float32, bfloat16, int8 and
          float8_e4m3fn; any B, H, K, D, C that `limits.py` does not refuse. The scaled scores have to fit float32. No
          gradient. `dantinox.kernels.decode_attention` raises ValueError.
Source    Dao, Flash-Decoding (2023), without its second pass: a TPU core has no other core to split a sequence with.

A TPU writes whole memory tiles, so the kernel merges the new token into the tile that it loaded. Keys and values have
the layout that XLA keeps them in: the tokens are in lanes if that takes less padding, as with heads of 64.

The kernel multiplies the values of an 8-bit cache without dequantizing them: the scales of the keys multiply the
scores, those of the values the softmax weights, which takes D times fewer multiplications.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dantinox.kernels.mosaic_tpu import in_32_bits
from dantinox.kernels.ops.decode_attention.block_table import BlockTable, make_block_table
from dantinox.kernels.ops.decode_attention.common import (
    OnlineSoftmax,
    QuantizedToken,
    ScoreOptions,
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


class DecodeConfig(NamedTuple):
    """Static parameters of the kernel.

    Attributes:
        C: slots of a ring buffer.
        block_size: slots per block.
        tile_slots, tile_lanes: slots written at once to k and v, and to their scales.
        heads_per_iteration: heads of a block that the core processes at a time.
        tokens_in_lanes: whether the ring buffers are [B, K, D, C] for the kernel; see `block_sizes.tokens_in_lanes`.
        scores: options of the scores.
    """

    C: int
    block_size: int
    tile_slots: int
    tile_lanes: int
    heads_per_iteration: int
    tokens_in_lanes: bool
    scores: ScoreOptions


class TokenBlock(NamedTuple):
    """Inputs of one decode step: arrays, their block specs, or references to those of one sequence.

    Attributes:
        q: queries [B, K, G, D].
        vectors: keys and values of the new token, [B, K, n, D] in float32, which holds every other dtype exactly: k and
            v as later steps read them from the cache, then, for an 8-bit cache, k and v as it stores them.
        gate: logits [B, K, G, D] or [B, K, G, 1], or None.
        k_scale, v_scale: the new token's scales [B, K, 1] for an 8-bit cache, or None.
    """

    q: Any
    vectors: Any
    gate: Any = None
    k_scale: Any = None
    v_scale: Any = None

    def load(self, n: int) -> Array:
        """Return the n-th vector of each head, [K, 1, D]; a reference only."""
        return self.vectors[0, :, n : n + 1]

    def load_stored(self) -> tuple[Array, Array]:
        """Return the key and the value as the cache stores them, [K, 1, D]; references only."""
        first = self.vectors.shape[2] - 2
        return self.load(first), self.load(first + 1)


@in_32_bits
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
    (B, H, D), (K, C), dtype = q.shape, cache.k.shape[1:3], q.dtype
    if dtype == jnp.float16:  # a TPU core has no such registers
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        gate = None if gate is None else gate.astype(jnp.float32)
    itemsize, in_lanes = cache.k.dtype.itemsize, block_sizes.tokens_in_lanes(C, D)
    tile_lanes = min(C, block_sizes.LANES)
    tile_slots = tile_lanes if in_lanes else min(C, block_sizes.TILE_BYTES // itemsize)
    block_size = block_sizes.choose_block_size(
        C,
        max_visible,
        tile_slots if cache.k_scale is None else tile_lanes,
        block_sizes.slot_bytes(K=K, C=C, D=D, itemsize=itemsize),
    )
    q, scale = split_scale(q, scale)
    num_heads = block_sizes.heads_per_iteration(K=K, D=D, block_size=block_size, itemsize=itemsize)
    config = DecodeConfig(C, block_size, tile_slots, tile_lanes, num_heads, in_lanes, ScoreOptions(scale, softcap))
    table = make_block_table(cache.length, C, max_visible, block_size)
    token = _token_block(group_heads(q, K), quantize_token(k, v, cache), None if gate is None else group_heads(gate, K))
    ring_buffers = _with_layout(cache._replace(length=None), config)

    def decode_kernel(
        table: BlockTable, token: TokenBlock, cache: KVCache, o_ref: Ref, tiles: KVCache, *softmax: Ref
    ) -> None:
        _decode_kernel(config, table, token, cache, o_ref, tiles, OnlineSoftmax(*softmax))

    o, tiles = pl.pallas_call(
        decode_kernel,
        out_shape=[
            varying_shape(token.q.shape, q.dtype, q),
            jax.tree.map(lambda x: varying_shape(x.shape, x.dtype, x), ring_buffers),
        ],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(table.num_steps,),
            in_specs=[jax.tree.map(sequence_spec, token), _block_specs(config, ring_buffers)],
            out_specs=[sequence_spec(token.q), _tile_specs(config, ring_buffers)],
            scratch_shapes=OnlineSoftmax.scratch_shapes(token.q),
        ),
        input_output_aliases=_aliases(table, token, ring_buffers),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=block_sizes.VMEM_LIMIT_BYTES
        ),
        cost_estimate=estimate_cost(q, cache, gate, max_visible).to_pallas(),
        name="decode_attention",
    )(table._replace(num_steps=None), token, ring_buffers)
    new_cache = _with_layout(tiles, config)._replace(length=cache.length + 1)
    return o.reshape(B, H, D).astype(dtype), new_cache


def _token_block(q: Array, stored: QuantizedToken, gate: Array | None) -> TokenBlock:
    """Lay out the inputs of a step; one array of vectors takes less padding, and one copy, instead of four."""
    token = token_inputs(q, stored, gate)
    vectors = [token.new_k, token.new_v]
    if stored.k_scale is None:
        return TokenBlock(q, _stack(vectors), gate)
    vectors += [stored.k[:, :, None], stored.v[:, :, None]]
    return TokenBlock(q, _stack(vectors), gate, stored.k_scale[:, :, None], stored.v_scale[:, :, None])


def _stack(vectors: Sequence[Array]) -> Array:
    """Concatenate [B, K, 1, D] arrays in float32."""
    return jnp.concatenate([x.astype(jnp.float32) for x in vectors], axis=2)


def _with_layout(ring_buffers: KVCache, config: DecodeConfig) -> KVCache:
    """Swap slots and D of the keys and values if the tokens are in lanes, which moves nothing in memory."""
    if not config.tokens_in_lanes:
        return ring_buffers
    return ring_buffers._replace(k=ring_buffers.k.swapaxes(2, 3), v=ring_buffers.v.swapaxes(2, 3))


def _decode_kernel(
    config: DecodeConfig,
    table: BlockTable,
    token: TokenBlock,
    cache: KVCache,
    o_ref: Ref,
    tiles: KVCache,
    softmax: OnlineSoftmax,
) -> None:
    """Run one grid step on references to the table, the inputs, the outputs and the softmax's state."""
    step = pl.program_id(0)
    b, block = table.sequence[step], table.block[step]
    slot, num_visible = table.slot[b], table.num_visible[b]
    size, block_start = config.block_size, block * config.block_size
    in_lanes = config.tokens_in_lanes

    @pl.when(is_first_step(table, step, b))
    def init_with_new_token() -> None:
        """Start a sequence with its new token, which the cache does not hold yet."""
        softmax.init_with_token(attention_scores(token.q[0], token.load(0), config.scores), token.load(1))

    def attend(head: Array, masked: bool) -> None:
        """Attend from one head to the block; masked slots may hold NaN."""

        def slot_mask(*shape: int) -> Array:
            return cached_token_mask(shape, block_start, block_start, slot=slot, num_visible=num_visible, C=config.C)

        def load_scale(scale: Ref | None) -> Array | None:
            return None if scale is None else scale[0, pl.ds(head, 1)]

        q = token.q[0, head]
        k_scale, v_scale = load_scale(cache.k_scale), load_scale(cache.v_scale)
        s = attention_scores(q, cache.k[0, head], config.scores, k_scale, tokens_in_lanes=in_lanes)
        v, visible = cache.v[0, head], slot_mask(1, size) if masked else None
        if visible is not None:
            v = jnp.where(visible if in_lanes else slot_mask(size, 1), v, 0)  # 0 * NaN is NaN
            v_scale = None if v_scale is None else jnp.where(visible, v_scale, 0)
        weigh = functools.partial(weigh_values, v=v, v_scale=v_scale, dtype=q.dtype, tokens_in_lanes=in_lanes)
        softmax.add_slots(head, s, visible, config.scores.exp_scale, weigh)

    # Fully visible blocks need no mask.
    oldest = (slot + 1 - num_visible + config.C) % config.C
    fully_visible = (block != slot // size) & (block_start + size <= config.C)
    fully_visible &= (block != oldest // size) | (oldest % size == 0)

    def attend_from_all_heads(masked: bool) -> None:
        # A loop over the heads: if it is unrolled, libtpu interleaves all of them and spills.
        num_heads, unroll = np.int32(token.q.shape[1]), config.heads_per_iteration
        jax.lax.fori_loop(0, num_heads, lambda head, _: attend(head, masked), None, unroll=unroll)

    for condition, masked in ((fully_visible, False), (~fully_visible, True)):
        pl.when(condition)(functools.partial(attend_from_all_heads, masked))

    @pl.when(slot // size == block)
    def write_new_token() -> None:
        """Merge the new token into its memory tile and write the tile back."""
        write = _write_column if in_lanes else _write_row
        for loaded, new, out in zip((cache.k, cache.v), token.load_stored(), (tiles.k, tiles.v), strict=True):
            write(config, loaded, new, out, slot % size)
        if cache.k_scale is None:
            return
        tile = _tile_start(config, slot % size, config.tile_lanes)
        for loaded, new, out in (
            (cache.k_scale, token.k_scale, tiles.k_scale),
            (cache.v_scale, token.v_scale, tiles.v_scale),
        ):
            lane = jax.lax.broadcasted_iota(jnp.int32, (1, config.tile_lanes), 1) + tile + block_start
            old = loaded[0, :, pl.ds(tile, config.tile_lanes)]
            out[0] = jnp.where(lane == slot, new[0], old)

    @pl.when(step == table.ends[b] - 1)
    def write_output() -> None:
        o_ref[0] = softmax.output(token.gate).astype(o_ref.dtype)


def _tile_start(config: DecodeConfig, slot: Array, tile_slots: int) -> Array | int:
    """Return the first slot of the memory tile that holds a slot of a block."""
    if tile_slots == config.C:
        return 0
    return pl.multiple_of(slot // tile_slots * tile_slots, tile_slots)


def _write_row(config: DecodeConfig, loaded: Ref, new: Array, out: Ref, slot: Array) -> None:
    """Write the tile [1, K, tile_slots, D] of a block with the new token [K, 1, D] in its slot."""
    tile = _tile_start(config, slot, config.tile_slots)
    row = jax.lax.broadcasted_iota(jnp.int32, (1, config.tile_slots, 1), 1) + tile
    out[0] = jnp.where(row == slot, new.astype(out.dtype), loaded[0, :, pl.ds(tile, config.tile_slots)])


def _write_column(config: DecodeConfig, loaded: Ref, new: Array, out: Ref, slot: Array) -> None:
    """Write the tile [1, K, D, tile_slots] of a block with the new token [K, 1, D] in its slot."""
    tile = _tile_start(config, slot, config.tile_slots)
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, config.tile_slots), 1) + tile
    for head in range(new.shape[0]):
        # The transpose unit takes whole registers; every lane gets the token.
        column = jnp.broadcast_to(new[head], (block_sizes.LANES, new.shape[2])).T[:, : config.tile_slots]
        old = loaded[0, head, :, pl.ds(tile, config.tile_slots)]
        out[0, head] = jnp.where(lane == slot, column.astype(out.dtype), old)


def _block_specs(config: DecodeConfig, ring_buffers: KVCache) -> KVCache:
    """Return specs of the step's block of each ring buffer."""

    def block_spec(x: Array) -> pl.BlockSpec:
        return _slots_spec(config, x, config.block_size, lambda n, table: (table.sequence[n], table.block[n]))

    return jax.tree.map(block_spec, ring_buffers)


def _tile_specs(config: DecodeConfig, ring_buffers: KVCache) -> KVCache:
    """Return specs of the memory tile of each ring buffer that receives the new token."""

    def tile_spec(x: Array) -> pl.BlockSpec:
        tile_slots = config.tile_slots if x.ndim == 4 else config.tile_lanes
        return _slots_spec(
            config,
            x,
            tile_slots,
            lambda n, table: (table.sequence[n], table.slot[table.sequence[n]] // tile_slots),
        )

    return jax.tree.map(tile_spec, ring_buffers)


def _slots_spec(config: DecodeConfig, x: Array, num_slots: int, index: Callable[..., tuple[Any, Any]]) -> pl.BlockSpec:
    """Return the spec of `num_slots` slots of one sequence of values [B, K, C, D], [B, K, D, C] or scales [B, K, C].

    Args:
        config: static parameters of the kernel.
        x: the ring buffer.
        num_slots: slots of a block.
        index: maps (step, table) to (sequence, block).
    """
    shape, axis = list(x.shape), 3 if x.ndim == 4 and config.tokens_in_lanes else 2
    shape[0], shape[axis] = 1, num_slots

    def index_map(n: Any, table: BlockTable) -> tuple[Any, ...]:
        sequence, block = index(n, table)
        return (sequence, *(block if i == axis else 0 for i in range(1, x.ndim)))

    return pl.BlockSpec(tuple(shape), index_map)


def _aliases(table: BlockTable, token: TokenBlock, ring_buffers: KVCache) -> dict[int, int]:
    """Return {position among the inputs: position among the outputs} of the ring buffers; `o` is output 0."""
    before = len(jax.tree.leaves((table._replace(num_steps=None), token)))
    return {before + i: 1 + i for i in range(len(jax.tree.leaves(ring_buffers)))}
