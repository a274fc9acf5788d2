"""Decode attention on TPU: one kernel that appends to the ring buffers and attends.

Math      s = cap(scale q k^T);  o = sigmoid(gate) * softmax(s over the last min(length + 1, C, window) tokens) v; a
          sink joins the sum of the softmax
Tiling    one grid step per block of slots that holds visible tokens; the device computes how many there are.

              blocks of slots ->   0   1   2   3   4   5
              sequence 0           █   ▞   ░   ░   ▞   █      ▞ masked; the last one receives the new token
              sequence 1           ▞   ░   ░   ░   ░   ░      ░ not in the grid

          One step loads all K heads of a block; the G query heads of each, times T new tokens, are the rows of its
          matrix products.
State     m, l [K, T G, 1] and the output [K, T G, D] of one sequence, in float32.
Traffic   reads the visible blocks of k and v once, for any C and T; writes 8 to 128 slots of each ring buffer, in
          place, or with several new tokens the blocks that hold them: the ring buffers are aliased to outputs. Plain
          XLA reads all C slots. 4 H D FLOPs per visible token and new one, so the kernel is bound by memory.
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
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dantinox.kernels.mosaic_tpu import in_32_bits
from dantinox.kernels.ops.decode_attention.block_table import BlockTable, make_block_table
from dantinox.kernels.ops.decode_attention.common import (
    NewTokens,
    OnlineSoftmax,
    ScoreOptions,
    attention_scores,
    cached_token_mask,
    estimate_cost,
    is_first_step,
    quantize_tokens,
    sequence_spec,
    weigh_values,
    whole_spec,
    window_mask,
)
from dantinox.kernels.ops.decode_attention.kv_cache import KVCache
from dantinox.kernels.ops.decode_attention.numbers import split_scale
from dantinox.kernels.ops.decode_attention.pallas_tpu import block_sizes
from dantinox.kernels.ops.decode_attention.pallas_tpu.operands import DecodeConfig, TokenBlock, token_block
from dantinox.kernels.ops.decode_attention.rows import group_rows, group_sinks, ungroup_rows
from dantinox.kernels.vma import varying_shape

Array = jax.Array
Ref = Any  # a reference in VMEM or SMEM


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
    sinks: Array | None = None,
) -> tuple[Array, KVCache]:
    """Append tokens and attend to the last `max_visible` ones of each; see `dantinox.kernels.decode_attention`."""
    (*_, H, D), (K, C), dtype = q.shape, cache.k.shape[1:3], q.dtype
    shape, T = q.shape, 1 if q.ndim == 3 else q.shape[1]
    if dtype == jnp.float16:  # a TPU core has no such registers
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        gate = None if gate is None else gate.astype(jnp.float32)
    itemsize, in_lanes = cache.k.dtype.itemsize, block_sizes.tokens_in_lanes(C, D)
    tile_lanes = min(C, block_sizes.LANES)
    tile_slots = tile_lanes if in_lanes else min(C, block_sizes.TILE_BYTES // itemsize)
    block_size = block_sizes.choose_block_size(
        C,
        min(C, max_visible + T - 1),
        tile_slots if cache.k_scale is None else tile_lanes,
        block_sizes.slot_bytes(K=K, C=C, D=D, itemsize=itemsize),
    )
    q, scale = split_scale(q, scale)
    num_heads = block_sizes.heads_per_iteration(K=K, D=D, block_size=block_size, itemsize=itemsize)
    tokens = NewTokens(T, H // K, None if max_visible == C else max_visible)
    config = DecodeConfig(
        C, block_size, tile_slots, tile_lanes, num_heads, in_lanes, ScoreOptions(scale, softcap), tokens
    )
    table = make_block_table(cache.length, C, max_visible, block_size, T)
    token = token_block(
        group_rows(q, K),
        quantize_tokens(k, v, cache),
        None if gate is None else group_rows(gate, K),
        None if sinks is None else group_sinks(sinks, K, T),
    )
    ring_buffers = _with_layout(cache._replace(length=None), config)

    def decode_kernel(
        table: BlockTable, token: TokenBlock, cache: KVCache, o_ref: Ref, tiles: KVCache, *softmax: Ref
    ) -> None:
        _decode_kernel(config, table, token, cache, o_ref, tiles, OnlineSoftmax(*softmax))

    token_specs = jax.tree.map(sequence_spec, token)
    if token.sinks is not None:
        token_specs = token_specs._replace(sinks=whole_spec(token.sinks))
    o, tiles = pl.pallas_call(
        decode_kernel,
        out_shape=[
            varying_shape(token.q.shape, q.dtype, q),
            jax.tree.map(lambda x: varying_shape(x.shape, x.dtype, x), ring_buffers),
        ],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(table.num_steps,),
            in_specs=[token_specs, _block_specs(config, ring_buffers)],
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
    return ungroup_rows(o, shape).astype(dtype), new_cache


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
    in_lanes, tokens = config.tokens_in_lanes, config.tokens

    @pl.when(is_first_step(table, step, b))
    def init_with_new_tokens() -> None:
        """Start a sequence with its new tokens, which the cache does not hold yet."""
        q = token.q[0]
        s = attention_scores(q, token.load(0, tokens.T), config.scores)
        softmax.init_with_tokens(s, token.load(1, tokens.T), tokens, config.scores.exp_scale, q.dtype)

    def attend(head: Array, masked: bool) -> None:
        """Attend from one head to the block; masked slots may hold NaN."""

        def slot_mask(*shape: int) -> Array:
            return cached_token_mask(
                shape, block_start, block_start, slot=slot, num_visible=num_visible, C=config.C, T=tokens.T
            )

        def load_scale(scale: Ref | None) -> Array | None:
            return None if scale is None else scale[0, pl.ds(head, 1)]

        q = token.q[0, head]
        k_scale, v_scale = load_scale(cache.k_scale), load_scale(cache.v_scale)
        s = attention_scores(q, cache.k[0, head], config.scores, k_scale, tokens_in_lanes=in_lanes)
        v, visible = cache.v[0, head], slot_mask(1, size) if masked else None
        if visible is not None:
            v = jnp.where(visible if in_lanes else slot_mask(size, 1), v, 0)  # 0 * NaN is NaN
            v_scale = None if v_scale is None else jnp.where(visible, v_scale, 0)
            in_window = window_mask(block_start, size, slot=slot, C=config.C, tokens=tokens)
            visible = visible if in_window is None else visible & in_window
        weigh = functools.partial(weigh_values, v=v, v_scale=v_scale, dtype=q.dtype, tokens_in_lanes=in_lanes)
        softmax.add_slots(head, s, visible, config.scores.exp_scale, weigh)

    fully_visible = _is_fully_visible(config, block, slot, num_visible)

    def attend_from_all_heads(masked: bool) -> None:
        # A loop over the heads: if it is unrolled, libtpu interleaves all of them and spills.
        num_heads, unroll = np.int32(token.q.shape[1]), config.heads_per_iteration
        jax.lax.fori_loop(0, num_heads, lambda head, _: attend(head, masked), None, unroll=unroll)

    for condition, masked in ((fully_visible, False), (~fully_visible, True)):
        pl.when(condition)(functools.partial(attend_from_all_heads, masked))

    if tokens.T == 1:

        @pl.when(slot // size == block)
        def write_new_token() -> None:
            """Merge the new token into its memory tile and write the tile back."""
            _write_token(config, token, cache, tiles, block_start, slot, 0)
    else:

        @pl.when(table.written[step] == block)
        def write_new_tokens() -> None:
            """Write the block back with the new tokens that belong to it, one after the other."""
            for loaded, out in zip(jax.tree.leaves(cache), jax.tree.leaves(tiles), strict=True):
                out[...] = loaded[...]

            def write(t: Array, _: None) -> None:
                new = slot - (tokens.T - 1) + t
                new = jnp.where(new < 0, new + config.C, new)
                in_block = (new >= block_start) & (new < block_start + size)
                pl.when(in_block)(lambda: _write_token(config, token, tiles, tiles, block_start, new, t))

            jax.lax.fori_loop(0, np.int32(tokens.T), write, None)

    @pl.when(step == table.ends[b] - 1)
    def write_output() -> None:
        o = softmax.output(token.gate, token.sinks, config.scores.exp_scale)
        o_ref[0] = o.astype(o_ref.dtype)


def _is_fully_visible(config: DecodeConfig, block: Array, slot: Array, num_visible: Array) -> Array:
    """Return whether all queries see all slots of a block, which then needs no mask."""
    size, T = config.block_size, config.tokens.T
    is_whole = block * size + size <= config.C
    if T == 1:
        oldest = (slot + 1 - num_visible + config.C) % config.C
        return is_whole & (block != slot // size) & ((block != oldest // size) | (oldest % size == 0))
    age = (slot - block * size + config.C) % config.C  # of its first slot, which is its oldest, or holds a new token
    in_window = age < (num_visible if config.tokens.window is None else config.tokens.window)
    return is_whole & in_window & (age < num_visible) & (age - (size - 1) >= T)


def _write_token(
    config: DecodeConfig,
    token: TokenBlock,
    loaded: KVCache,
    out: KVCache,
    block_start: Array,
    slot: Array,
    t: Array | int,
) -> None:
    """Write new token t, which belongs to `slot`, to the tile of that slot; the rest of the tile is as in `loaded`.

    `out` has the tile, or, if there are several new tokens, is `loaded` itself.
    """
    write = _write_column if config.tokens_in_lanes else _write_row
    in_block, stored = slot - block_start, token.load_stored(config.tokens.T, t)
    for source, new, target in zip((loaded.k, loaded.v), stored, (out.k, out.v), strict=True):
        write(config, source, new, target, in_block)
    if loaded.k_scale is None:
        return
    tile = _tile_start(config, in_block, config.tile_lanes)
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, config.tile_lanes), 1) + tile
    for source, new, target in (
        (loaded.k_scale, token.k_scale, out.k_scale),
        (loaded.v_scale, token.v_scale, out.v_scale),
    ):
        scale = new[0]
        if config.tokens.T > 1:
            is_token = jax.lax.broadcasted_iota(jnp.int32, scale.shape, 1) == t
            scale = jnp.sum(jnp.where(is_token, scale, 0), axis=1, keepdims=True)
        slots = pl.ds(tile, config.tile_lanes)
        target[(0, slice(None), *_tile_of(config, slots))] = jnp.where(lane == in_block, scale, source[0, :, slots])


def _tile_of(config: DecodeConfig, slots: Any) -> tuple[Any, ...]:
    """Return the index of `slots` of a block in an output: a tile of its own, or the block if tokens are several."""
    return () if config.tokens.T == 1 else (slots,)


def _tile_start(config: DecodeConfig, slot: Array, tile_slots: int) -> Array | int:
    """Return the first slot of the memory tile that holds a slot of a block."""
    if tile_slots == config.C:
        return 0
    return pl.multiple_of(slot // tile_slots * tile_slots, tile_slots)


def _write_row(config: DecodeConfig, loaded: Ref, new: Array, out: Ref, slot: Array) -> None:
    """Write the tile [1, K, tile_slots, D] of a block with the new token [K, 1, D] in its slot."""
    tile = _tile_start(config, slot, config.tile_slots)
    row, slots = (
        jax.lax.broadcasted_iota(jnp.int32, (1, config.tile_slots, 1), 1) + tile,
        pl.ds(tile, config.tile_slots),
    )
    target = (0, slice(None), *_tile_of(config, slots))
    out[target] = jnp.where(row == slot, new.astype(out.dtype), loaded[0, :, slots])


def _write_column(config: DecodeConfig, loaded: Ref, new: Array, out: Ref, slot: Array) -> None:
    """Write the tile [1, K, D, tile_slots] of a block with the new token [K, 1, D] in its slot."""
    tile = _tile_start(config, slot, config.tile_slots)
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, config.tile_slots), 1) + tile
    for head in range(new.shape[0]):
        # The transpose unit takes whole registers; every lane gets the token.
        column = jnp.broadcast_to(new[head], (block_sizes.LANES, new.shape[2])).T[:, : config.tile_slots]
        slots = pl.ds(tile, config.tile_slots)
        target = (0, head, slice(None), *_tile_of(config, slots))
        out[target] = jnp.where(lane == slot, column.astype(out.dtype), loaded[0, head, :, slots])


def _block_specs(config: DecodeConfig, ring_buffers: KVCache) -> KVCache:
    """Return specs of the step's block of each ring buffer."""

    def block_spec(x: Array) -> pl.BlockSpec:
        return _slots_spec(config, x, config.block_size, lambda n, table: (table.sequence[n], table.block[n]))

    return jax.tree.map(block_spec, ring_buffers)


def _tile_specs(config: DecodeConfig, ring_buffers: KVCache) -> KVCache:
    """Return specs of the memory tile of each ring buffer that receives the new token, or of the block of several."""

    def tile_spec(x: Array) -> pl.BlockSpec:
        if config.tokens.T > 1:
            return _slots_spec(config, x, config.block_size, lambda n, table: (table.sequence[n], table.written[n]))
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
