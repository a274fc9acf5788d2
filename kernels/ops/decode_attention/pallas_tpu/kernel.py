"""Decode attention on TPU, and interpreted on a CPU: one kernel that appends to the ring buffers and attends.

Math      s = cap(scale q k^T);  o = sigmoid(gate) * softmax(s over the last min(length + 1, C, window) tokens) v
Tiling    one grid step per block of slots that holds visible tokens; the device computes how many there are.

              blocks of slots ->   0   1   2   3   4   5
              sequence 0           █   ▞   ░   ░   ▞   █      ▞ masked; the last one receives the new token
              sequence 1           ▞   ░   ░   ░   ░   ░      ░ not in the grid

          One step loads all K heads of a block; the G query heads of each are the rows of its matrix products.
State     m, l [K, G, 1] and the output [K, G, D] of one sequence, in float32.
Traffic   reads the visible blocks of k and v once, whatever C is; writes 8 or 16 slots of each ring buffer, in place:
          the ring buffers are aliased to outputs. Plain XLA reads all C slots. 4 H D FLOPs per visible token, so the
          kernel is bound by memory.
Limits    float32, bfloat16, float16; caches of int8 and float8_e4m3fn too; any B, H, K, D, C.
          `dantinox.kernels.decode_attention` raises ValueError.
Source    Dao, Flash-Decoding (2023), without its second pass: a TPU core has no other core to split a sequence with.

A TPU writes whole memory tiles, so the kernel merges the new token into the tile that it loaded. In interpret mode an
output aliased to an input costs a copy of it per step, so XLA writes the token to its slot, in place, and the kernel
only reads the ring buffers. XLA's CPU compiler also copies each block that a step reads, but not whole ring buffers: if
every ring buffer is at least half full, one step processes the whole batch, with a mask instead of the grid.

The kernel multiplies the values of an 8-bit cache without dequantizing them: the scales of the keys multiply the
scores, those of the values the softmax weights, which takes D times fewer multiplications.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dantinox.kernels import cost
from dantinox.kernels.dispatch import current_device
from dantinox.kernels.ops.decode_attention.kv_cache import KVCache, append_token, dequantize, quantize
from dantinox.kernels.ops.decode_attention.pallas_tpu import block_sizes
from dantinox.kernels.ops.decode_attention.pallas_tpu.block_table import BlockTable, make_block_table

Array = jax.Array
Ref = Any  # a reference in VMEM or SMEM
LANES = 128  # slots in a memory tile of scales
TILE_BYTES = 32  # slots x bytes per value in the second-minor dimension of a memory tile
MASK_VALUE = -2e38  # a masked score


class DecodeConfig(NamedTuple):
    """Static parameters of the kernel.

    Attributes:
        C: slots of a ring buffer.
        max_visible: upper bound on the tokens that a query attends to.
        block_size: slots per block.
        tile_rows, tile_lanes: slots written at once to k and v, and to their scales.
        scale, softcap: of the scores.
        interpret: whether the kernel is interpreted on a CPU.
        batched: in interpret mode, whether one step processes the whole batch; its heads are those of all sequences.
    """

    C: int
    max_visible: int
    block_size: int
    tile_rows: int
    tile_lanes: int
    scale: float
    softcap: float | None
    interpret: bool
    batched: bool = False


class DecodeRefs(NamedTuple):
    """References of one grid step; None where a call has no such operand.

    Attributes:
        sequence, block, ends, num_visible, slot: the `BlockTable`, prefetched.
        q, gate, o: queries, gate and output of the step's sequence.
        new_k, new_v: the new token as later steps will read it, in q's dtype.
        stored_k, stored_v: the new token as the cache stores it, and its scales.
        k, v: a block of the cache, with its scales; in interpret mode the whole cache.
        k_out, v_out: the memory tile that receives the new token, with its scales.
        m, l, acc: state of the online softmax.
    """

    sequence: Ref
    block: Ref
    ends: Ref
    num_visible: Ref
    slot: Ref
    q: Ref
    new_k: Ref
    new_v: Ref
    k: Ref
    v: Ref
    o: Ref
    m: Ref
    l: Ref
    acc: Ref
    gate: Ref = None
    k_scale: Ref = None
    v_scale: Ref = None
    stored_k: Ref = None
    stored_v: Ref = None
    stored_k_scale: Ref = None
    stored_v_scale: Ref = None
    k_out: Ref = None
    v_out: Ref = None
    k_scale_out: Ref = None
    v_scale_out: Ref = None


def decode_attention(
    q: Array,
    k: Array,
    v: Array,
    cache: KVCache,
    *,
    gate: Array | None,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> tuple[Array, KVCache]:
    """See `dantinox.kernels.decode_attention`, which checks the arguments."""
    (B, H, D), (K, C) = q.shape, cache.k.shape[1:3]
    if 0 in (B, H, D):
        return jnp.zeros_like(q), append_token(cache, k, v)
    max_visible = C if window is None else min(C, int(window))
    interpret = current_device().platform == "cpu"
    tile_rows, tile_lanes = min(C, TILE_BYTES // cache.k.dtype.itemsize), min(C, LANES)
    tile_slots = tile_rows if cache.k_scale is None else tile_lanes
    slot_bytes = K * D * cache.k.dtype.itemsize
    block_size = block_sizes.choose_block_size(C, max_visible, tile_slots, slot_bytes, interpret)
    config = DecodeConfig(C, max_visible, block_size, tile_rows, tile_lanes, scale, softcap, interpret)

    def group_heads(x: Array | None) -> Array | None:
        return None if x is None else x.reshape(B, K, H // K, x.shape[-1])

    block_table = make_block_table(cache.length, C, max_visible, block_size)
    call_cost = cost.decode_attention(
        H=H,
        K=K,
        D=D,
        C=C,
        lengths=[max_visible - 1] * B,  # upper bounds: the lengths are not known at trace time
        gate="none" if gate is None else "elementwise" if gate.shape[-1] == D else "head",
        itemsize=q.dtype.itemsize,
        kv_itemsize=cache.k.dtype.itemsize + (0 if cache.k_scale is None else 4 / D),
    )
    attend = functools.partial(_pallas_decode, call_cost=call_cost)
    if not interpret:
        o, cache = attend(group_heads(q), k, v, group_heads(gate), cache, block_table, config)
        return o.reshape(B, H, D), cache

    new_cache = append_token(cache, k, v)

    def attend_by_blocks() -> Array:
        o, _ = attend(group_heads(q), k, v, group_heads(gate), new_cache, block_table, config)
        return o.reshape(B, H, D)

    def attend_batched() -> Array:
        def merge_batch(x: Array | None) -> Array | None:
            return None if x is None else x.reshape(1, -1, *x.shape[2:])

        merged_cache = KVCache(merge_batch(new_cache.k), merge_batch(new_cache.v), new_cache.length)
        one_step = BlockTable(jnp.int32(1), *jnp.int32([[0], [0], [1]]), block_table.num_visible, block_table.slot)
        merged = [merge_batch(x) for x in (group_heads(q), k, v, group_heads(gate))]
        o, _ = attend(*merged, merged_cache, one_step, config._replace(batched=True))
        return o.reshape(B, H, D)

    # If the cache has another dtype, converting it would copy all of it.
    if block_size < C == max_visible and cache.k.dtype == q.dtype:
        half_full = jnp.all(block_table.num_visible >= C // 2)
        return jax.lax.cond(half_full, attend_batched, attend_by_blocks), new_cache
    return attend_by_blocks(), new_cache


def _decode_kernel(config: DecodeConfig, refs: DecodeRefs) -> None:
    step = pl.program_id(0)
    b, block = refs.sequence[step], refs.block[step]
    K = refs.q.shape[1]
    if config.batched:  # per head: the sequences differ in length
        slot, num_visible = (
            jnp.repeat(per_sequence[...], K // per_sequence.shape[0])[:, None, None]
            for per_sequence in (refs.slot, refs.num_visible)
        )
    else:
        slot, num_visible = refs.slot[b], refs.num_visible[b]
    block_start = block * config.block_size

    def qk_scores(q: Array, k: Array, k_scale: Array | float = 1) -> Array:
        s = _dot_heads(q, k.astype(q.dtype), 1) * (k_scale * config.scale)
        return s if config.softcap is None else config.softcap * jnp.tanh(s * (1 / config.softcap))

    @pl.when(step == jnp.where(b == 0, 0, refs.ends[jnp.maximum(b - 1, 0)]))
    def init_with_new_token() -> None:
        """Starts a sequence with its new token, which the cache does not hold yet."""
        refs.m[...] = qk_scores(refs.q[0], refs.new_k[0])
        refs.l[...] = jnp.ones(refs.l.shape, jnp.float32)
        refs.acc[...] = jnp.broadcast_to(refs.new_v[0].astype(jnp.float32), refs.acc.shape)

    def attend(head: Any, first: Array | int, size: int, masked: bool) -> None:
        """Attends from one head, or all, to `size` slots from `first` on; masked slots may hold NaN."""
        # Interpreted, a partial last block begins earlier; the mask hides the slots that it repeats.
        start = jnp.minimum(first, config.C - size) if config.interpret else first

        def cached_token_mask(shape: tuple[int, int]) -> Array:
            """Mask of the slots that hold visible tokens other than the new one."""
            slots = start + jax.lax.broadcasted_iota(jnp.int32, shape, int(shape[0] == 1))
            age = jnp.where(slots < slot, slot - slots, slot - slots + config.C)
            return (age < num_visible) & (slots >= first) & (slots < config.C)

        q = refs.q[0, head]
        index = (b, head, pl.ds(start, size)) if config.interpret else (0, head)

        def load_scale(scale: Ref) -> Array | int:
            if scale is None:
                return 1
            return scale[index][:, None] if config.interpret else scale[0, pl.ds(head, 1)]

        k_scale, v_scale = load_scale(refs.k_scale), load_scale(refs.v_scale)
        s, v = qk_scores(q, refs.k[index], k_scale), refs.v[index]
        if masked or config.interpret:  # interpreted, the cache already holds the new token
            s = jnp.where(cached_token_mask((1, size)), s, MASK_VALUE)
        if masked:
            v = jnp.where(cached_token_mask((size, 1)), v, 0)  # 0 * NaN is NaN
            v_scale = 1 if refs.v_scale is None else jnp.where(cached_token_mask((1, size)), v_scale, 0)
        m_old = refs.m[head]
        m = jnp.maximum(m_old, jnp.max(s, axis=-1, keepdims=True))
        p, decay = jnp.exp(s - m), jnp.exp(m_old - m)
        refs.m[head] = m
        refs.l[head] = decay * refs.l[head] + jnp.sum(p, axis=-1, keepdims=True)
        p = p if refs.v_scale is None else p * v_scale
        p, v = p.astype(q.dtype), v.astype(q.dtype)
        pv = _dot_heads(p, v, 0)
        if config.interpret and not masked:
            # A masked copy of the values costs as much as everything else, so it is made only if an empty slot is NaN.
            masked_pv = lambda: _dot_heads(p, jnp.where(cached_token_mask((size, 1)), v, 0), 0)
            pv = jax.lax.cond(jnp.all(jnp.isfinite(pv)), lambda: pv, masked_pv)
        refs.acc[head] = decay * refs.acc[head] + pv

    if config.interpret:
        size = config.C if config.batched else config.block_size
        attend(slice(None), block_start, size, masked=not config.batched)
    else:
        # Fully visible blocks need no mask.
        oldest = (slot + 1 - num_visible + config.C) % config.C
        fully_visible = (block != slot // config.block_size) & (block_start + config.block_size <= config.C)
        fully_visible &= (block != oldest // config.block_size) | (oldest % config.block_size == 0)

        def attend_from_all_heads(masked: bool) -> None:
            # A loop over the heads: if it is unrolled, libtpu interleaves them and spills.
            pl.loop(0, K)(lambda head: attend(head, block_start, config.block_size, masked))

        for condition, masked in ((fully_visible, False), (~fully_visible, True)):
            pl.when(condition)(functools.partial(attend_from_all_heads, masked))

        @pl.when(slot // config.block_size == block)
        def write_new_token() -> None:
            """Merges the new token into its memory tile and writes the tile back."""
            tile_rows, tile_lanes = config.tile_rows, config.tile_lanes
            tile = pl.multiple_of(slot % config.block_size // tile_rows * tile_rows, tile_rows)
            for loaded, stored, new, out in (
                (refs.k, refs.stored_k, refs.new_k, refs.k_out),
                (refs.v, refs.stored_v, refs.new_v, refs.v_out),
            ):
                row = jax.lax.broadcasted_iota(jnp.int32, (1, tile_rows, 1), 1) + tile + block_start
                old = loaded[0, :, pl.ds(tile, tile_rows)]
                new = new if stored is None else stored
                out[0] = jnp.where(row == slot, new[0], old)
            if refs.k_scale is None:
                return
            tile = pl.multiple_of(slot % config.block_size // tile_lanes * tile_lanes, tile_lanes)
            for loaded, stored, out in (
                (refs.k_scale, refs.stored_k_scale, refs.k_scale_out),
                (refs.v_scale, refs.stored_v_scale, refs.v_scale_out),
            ):
                lane = jax.lax.broadcasted_iota(jnp.int32, (1, tile_lanes), 1) + tile + block_start
                old = loaded[0, :, pl.ds(tile, tile_lanes)]
                out[0] = jnp.where(lane == slot, stored[0], old)

    @pl.when(step == refs.ends[b] - 1)
    def write_output() -> None:
        o = refs.acc[...] / refs.l[...]
        if refs.gate is not None:
            o = o * jax.nn.sigmoid(refs.gate[0].astype(jnp.float32))
        refs.o[0] = o.astype(refs.o.dtype)


def _dot_heads(a: Array, b: Array, contract: int) -> Array:
    """a b^T (1) or a b (0) over the last two axes, in float32; the axes before them are heads."""
    n = a.ndim - 2
    heads = tuple(range(n))
    dims = (((n + 1,), (n + contract,)), (heads, heads))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _pallas_decode(
    q: Array,
    k: Array,
    v: Array,
    gate: Array | None,
    cache: KVCache,
    block_table: BlockTable,
    config: DecodeConfig,
    call_cost: cost.Cost,
) -> tuple[Array, KVCache]:
    """Returns (o [B, K, G, D], the cache with the new token; interpreted, the given cache already has it).

    q and gate are [B, K, G, n], the new k and v [B, K, D]. Operands and results are named as in `DecodeRefs`.
    """
    _, K, G, D = q.shape

    def sequence_spec(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, *shape), lambda n, sequence, *_: (sequence[n], *(0,) * len(shape)))

    prefetched = {name: getattr(block_table, name) for name in ("sequence", "block", "ends", "num_visible", "slot")}
    stored = {"k": quantize(k, cache.k.dtype), "v": quantize(v, cache.v.dtype)}
    eight_bits = cache.k_scale is not None
    inputs = {"q": (q, sequence_spec(K, G, D))}
    # This step attends to the new token as later steps will read it.
    for name, new in stored.items():
        token = dequantize(*new, q.dtype) if eight_bits else new[0]
        inputs[f"new_{name}"] = token[:, :, None], sequence_spec(K, 1, D)
    if gate is not None:
        inputs["gate"] = gate, sequence_spec(K, G, gate.shape[-1])
    outputs = {"o": (jax.ShapeDtypeStruct(q.shape, q.dtype), sequence_spec(K, G, D))}
    aliases = {}
    ring_buffers = {"k": cache.k, "v": cache.v}
    scales: dict[str, Any] = {"k_scale": cache.k_scale, "v_scale": cache.v_scale} if eight_bits else {}
    if config.interpret:
        prefetched |= ring_buffers | scales
    else:
        block_map = lambda n, sequence, block, *_: (sequence[n], 0, block[n], 0)
        tile_map = lambda n, sequence, block, ends, num_visible, slot: (
            sequence[n],
            0,
            slot[sequence[n]] // config.tile_rows,
            0,
        )
        for name, x in ring_buffers.items():
            inputs[name] = x, pl.BlockSpec((1, K, config.block_size, D), block_map)
            tile_spec = pl.BlockSpec((1, K, config.tile_rows, D), tile_map)
            outputs[f"{name}_out"] = jax.ShapeDtypeStruct(x.shape, x.dtype), tile_spec
        if eight_bits:
            scale_block_map = lambda n, sequence, block, *_: (sequence[n], 0, block[n])
            scale_tile_map = lambda n, sequence, block, ends, num_visible, slot: (
                sequence[n],
                0,
                slot[sequence[n]] // config.tile_lanes,
            )
            for name, (values, scale) in stored.items():
                inputs[f"stored_{name}"] = values[:, :, None], sequence_spec(K, 1, D)
                inputs[f"stored_{name}_scale"] = scale[:, :, None], sequence_spec(K, 1)
            for name, x in scales.items():
                inputs[name] = x, pl.BlockSpec((1, K, config.block_size), scale_block_map)
                tile_spec = pl.BlockSpec((1, K, config.tile_lanes), scale_tile_map)
                outputs[f"{name}_out"] = jax.ShapeDtypeStruct(x.shape, x.dtype), tile_spec
        input_names, output_names = [*prefetched, *inputs], list(outputs)
        aliases = {input_names.index(name): output_names.index(f"{name}_out") for name in ring_buffers | scales}
    scratch = {"m": (K, G, 1), "l": (K, G, 1), "acc": (K, G, D)}
    names = (*prefetched, *inputs, *outputs, *scratch)

    def run_kernel(*refs: Ref) -> None:
        _decode_kernel(config, DecodeRefs(**dict(zip(names, refs, strict=True))))

    def call_kernel(num_steps: Array, *operands: Array) -> list[Array]:
        return pl.pallas_call(
            run_kernel,
            out_shape=[shape for shape, _ in outputs.values()],
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(prefetched),
                grid=(num_steps,),
                in_specs=[spec for _, spec in inputs.values()],
                out_specs=[spec for _, spec in outputs.values()],
                scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch.values()],
            ),
            input_output_aliases=aliases,
            compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
            cost_estimate=call_cost.to_pallas(),
            interpret=config.interpret,
            name="decode_attention",
        )(*operands)

    if config.interpret:  # JAX's batching rule drops the grid bound if the caches are batched and the bound is not
        call_kernel = jax.custom_batching.sequential_vmap(call_kernel)
    o, *updated = call_kernel(block_table.num_steps, *prefetched.values(), *(x for x, _ in inputs.values()))
    return (o, cache) if config.interpret else (o, KVCache(*updated[:2], cache.length + 1, *updated[2:]))
