"""Cached decoding on Mosaic TPU, and interpreted on a CPU: one kernel that appends to the rings and attends.

Math      s = cap(scale q k^T);  o = sigmoid(gate) * softmax(s over the last min(length + 1, C, window) tokens) v
Tiling    a grid of steps, a block of one ring each, as many as hold visible tokens, counted on the device.

              blocks of slots ->   0   1   2   3   4   5
              sequence 0           █   ▞   ░   ░   ▞   █      ▞ masked, and where the new token goes
              sequence 1           ▞   ░   ░   ░   ░   ░      ░ not in the grid

          All K heads of a block are loaded together; the G query heads of each are the rows of its products.
State     m, l [K, G, 1] and the output [K, G, D] of one sequence, in float32.
Traffic   reads the visible blocks of k and v once, whatever C is; writes 8 or 16 slots of each ring, in place: both
          are its outputs too. Plain XLA reads all C slots. 4 H D FLOPs a visible token: memory is what it costs.
Limits    float32, bfloat16, float16; rings of int8 and float8_e4m3fn too; any B, H, K, D, C. ValueError comes from
          `dantinox.kernels.decode_attention`.
Source    Dao, Flash-Decoding (2023), without its second pass: a TPU core has nobody to share a sequence with.

A TPU writes whole tiles of memory, so the new token's tile is put together from what was loaded of it. Interpreted, an
output that is an input costs a copy of it in every step, so XLA puts the token into its slot, in place, and the kernel
reads the rings as they are then. A block of them is a copy too, to XLA's CPU compiler, but all of them are not: where
every ring is half full, all sequences are one step, and a mask takes the place of the grid.

A ring in 8 bits is multiplied as it is; the factors of its keys join the scores, those of its values the weights: D
times fewer products than numbers put back.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dantinox.kernels import cost
from dantinox.kernels.dispatch import current_device
from dantinox.kernels.ops.decode_attention.kv_cache import KVCache, append, dequantize, quantize
from dantinox.kernels.ops.decode_attention.pallas_tpu.block_table import Visits, visits

Array = jax.Array
CPU_BLOCK = 512  # slots
TPU_BYTES = 2**20  # of a block of keys; as much of values, and both twice
LANES = 128  # slots of a tile of factors
TILE_BYTES = 32  # slots x bytes of a number that are written together: a tile of a TPU's memory is so high
HIDDEN = -2e38  # a masked score


class Static(NamedTuple):
    """What is known when the kernel is traced; `limit` of the tokens seen, `block`, `rows` and `lanes` in slots.

    `at_once`: all rings are one step, interpreted; a sequence's heads are heads among those of all.
    """

    C: int
    limit: int
    block: int
    rows: int
    lanes: int
    scale: float
    softcap: float | None
    interpret: bool
    at_once: bool = False


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
    """See `dantinox.kernels.decode_attention`; arguments are checked there."""
    (B, H, D), (K, C) = q.shape, cache.k.shape[1:3]
    if 0 in (B, H, D):
        return jnp.zeros_like(q), append(cache, k, v)
    limit = C if window is None else min(C, int(window))
    interpret = current_device().platform == "cpu"
    rows, lanes = min(C, TILE_BYTES // cache.k.dtype.itemsize), min(C, LANES)
    tile = rows if cache.k_scale is None else lanes
    block = C if interpret and C <= CPU_BLOCK else _block(C, limit, tile, K * D * cache.k.dtype.itemsize, interpret)
    static = Static(C, limit, block, rows, lanes, scale, softcap, interpret)
    packed = lambda x: None if x is None else x.reshape(B, K, H // K, x.shape[-1])
    plan = visits(cache.length, C, limit, block)
    spent = cost.decode_attention(
        H=H,
        K=K,
        D=D,
        C=C,
        lengths=[limit - 1] * B,  # at most: the lengths are not known here
        gate="none" if gate is None else "elementwise" if gate.shape[-1] == D else "head",
        itemsize=q.dtype.itemsize,
        kv_itemsize=cache.k.dtype.itemsize + (0 if cache.k_scale is None else 4 / D),
    )
    call = functools.partial(_call, spent=spent)
    if not interpret:
        o, cache = call(packed(q), k, v, packed(gate), cache, plan, static)
        return o.reshape(B, H, D), cache

    after = append(cache, k, v)

    def by_blocks() -> Array:
        return call(packed(q), k, v, packed(gate), after, plan, static)[0].reshape(B, H, D)

    def at_once() -> Array:
        one = lambda x: None if x is None else x.reshape(1, -1, *x.shape[2:])
        rings = KVCache(one(after.k), one(after.v), after.length)
        step = Visits(jnp.int32(1), *jnp.int32([[0], [0], [1]]), plan.seen, plan.slot)
        o, _ = call(one(packed(q)), one(k), one(v), one(packed(gate)), rings, step, static._replace(at_once=True))
        return o.reshape(B, H, D)

    # Where numbers are converted, all of the rings would be copied too.
    if block < C == limit and cache.k.dtype == q.dtype:
        return jax.lax.cond(jnp.all(plan.seen >= C // 2), at_once, by_blocks), after
    return by_blocks(), after


def interpreted_slow(C: int) -> bool:
    """Whether the interpreted kernel is slower than plain XLA even where a ring is half full.

    Measured on 2 cores, in times of `xla.py`: a full ring of 4096 slots 0.8, of 32768 0.7, eight of 4096 0.7; 3000 of
    4096 slots 0.8, eight times 1500 0.5; 512 of 32768 1 / 13.
    """
    return current_device().platform == "cpu" and C < 1024


def _block(C: int, limit: int, rows: int, slot_bytes: int, interpret: bool) -> int:
    """Slots of a block: a power of two, or all of a short ring where the tiles that are written divide them."""
    down = lambda n: 1 << n.bit_length() - 1
    # Of its first and last block a window sees a half on average: small against it, but long enough to load.
    few = max(256, down(limit) // 16)
    most = CPU_BLOCK if interpret else max(rows, min(1024, few, down(TPU_BYTES // slot_bytes)))
    block = min(most, max(rows, 1 << (limit - 1).bit_length()))
    return block if block < C else C if C % rows == 0 else max(rows, down(C))


def _kernel(static: Static, refs: dict[str, Any]) -> None:
    step = pl.program_id(0)
    b, block = refs["sequence"][step], refs["block"][step]
    K = refs["q"].shape[1]
    if static.at_once:
        slot, seen = (jnp.repeat(refs[name][...], K // refs[name].shape[0])[:, None, None] for name in ("slot", "seen"))
    else:
        slot, seen = refs["slot"][b], refs["seen"][b]
    first = block * static.block

    def scores(q: Array, k: Array, factor: Array | float = 1) -> Array:
        s = _dot(q, k.astype(q.dtype), 1) * (factor * static.scale)
        return s if static.softcap is None else static.softcap * jnp.tanh(s * (1 / static.softcap))

    @pl.when(step == jnp.where(b == 0, 0, refs["ends"][jnp.maximum(b - 1, 0)]))
    def _():
        """The sequence begins with its new token, which no ring holds yet."""
        refs["m"][...] = scores(refs["q"][0], refs["new k"][0])
        refs["l"][...] = jnp.ones(refs["l"].shape, jnp.float32)
        refs["acc"][...] = jnp.broadcast_to(refs["new v"][0].astype(jnp.float32), refs["acc"].shape)

    def attend(head: Any, first: Array | int, size: int, masked: bool) -> None:
        """One head, or all, to the slots `first` and on; what is masked may hold NaN where no token is."""
        # Interpreted, a last block that is not whole begins earlier: what it has twice is hidden.
        start = jnp.minimum(first, static.C - size) if static.interpret else first

        def old(shape: tuple[int, int]) -> Array:
            """The slots whose tokens are seen, the new one's apart."""
            at = start + jax.lax.broadcasted_iota(jnp.int32, shape, int(shape[0] == 1))
            age = jnp.where(at < slot, slot - at, slot - at + static.C)
            return (age < seen) & (at >= first) & (at < static.C)

        q = refs["q"][0, head]
        at = (b, head, pl.ds(start, size)) if static.interpret else (0, head)
        k_scale, v_scale = (
            1 if name not in refs else refs[name][at][:, None] if static.interpret else refs[name][0, pl.ds(head, 1)]
            for name in ("k scale", "v scale")
        )
        s, v = scores(q, refs["k"][at], k_scale), refs["v"][at]
        if masked or static.interpret:  # there the new token is in the ring already
            s = jnp.where(old((1, size)), s, HIDDEN)
        if masked:
            v = jnp.where(old((size, 1)), v, 0)  # 0 * NaN is NaN
            v_scale = jnp.where(old((1, size)), v_scale, 0) if "v scale" in refs else 1
        before = refs["m"][head]
        m = jnp.maximum(before, jnp.max(s, axis=-1, keepdims=True))
        p, decay = jnp.exp(s - m), jnp.exp(before - m)
        refs["m"][head] = m
        refs["l"][head] = decay * refs["l"][head] + jnp.sum(p, axis=-1, keepdims=True)
        p = p * v_scale if "v scale" in refs else p
        p, v = p.astype(q.dtype), v.astype(q.dtype)
        found = _dot(p, v, 0)
        if static.interpret and not masked:
            # A masked copy of the values costs as much as all else. It is made only where a slot nobody wrote is NaN.
            clean = lambda: _dot(p, jnp.where(old((size, 1)), v, 0), 0)
            found = jax.lax.cond(jnp.all(jnp.isfinite(found)), lambda: found, clean)
        refs["acc"][head] = decay * refs["acc"][head] + found

    if static.interpret:
        size = static.C if static.at_once else static.block
        attend(slice(None), first, size, masked=not static.at_once)
    else:
        # Heads in a loop: unrolled, libtpu mixes them and spills. Whole blocks need no mask.
        oldest = (slot + 1 - seen + static.C) % static.C
        whole = (block != slot // static.block) & (first + static.block <= static.C)
        whole &= (block != oldest // static.block) | (oldest % static.block == 0)
        for case, masked in ((whole, False), (~whole, True)):
            loop = lambda masked=masked: pl.loop(0, K)(lambda head: attend(head, first, static.block, masked))
            pl.when(case)(loop)

        @pl.when(slot // static.block == block)
        def _():
            """The tile of the new token leaves with it."""
            tile = pl.multiple_of(slot % static.block // static.rows * static.rows, static.rows)
            for name in ("k", "v"):
                row = jax.lax.broadcasted_iota(jnp.int32, (1, static.rows, 1), 1) + tile + first
                old = refs[name][0, :, pl.ds(tile, static.rows)]
                new = refs[f"put {name}"] if f"put {name}" in refs else refs[f"new {name}"]
                refs[f"{name} out"][0] = jnp.where(row == slot, new[0], old)
            if "k scale" in refs:
                tile = pl.multiple_of(slot % static.block // static.lanes * static.lanes, static.lanes)
                for name in ("k scale", "v scale"):
                    lane = jax.lax.broadcasted_iota(jnp.int32, (1, static.lanes), 1) + tile + first
                    old = refs[name][0, :, pl.ds(tile, static.lanes)]
                    refs[f"{name} out"][0] = jnp.where(lane == slot, refs[f"put {name}"][0], old)

    @pl.when(step == refs["ends"][b] - 1)
    def _():
        o = refs["acc"][...] / refs["l"][...]
        if "gate" in refs:
            o = o * jax.nn.sigmoid(refs["gate"][0].astype(jnp.float32))
        refs["o"][0] = o.astype(refs["o"].dtype)


def _dot(a: Array, b: Array, contract: int) -> Array:
    """a b^T (1) or a b (0) over the last two axes, in float32; the axes before are heads."""
    n = a.ndim - 2
    heads = tuple(range(n))
    dims = (((n + 1,), (n + contract,)), (heads, heads))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _call(
    q: Array, k: Array, v: Array, gate: Array | None, cache: KVCache, plan: Visits, static: Static, spent: cost.Cost
) -> tuple[Array, KVCache]:
    """(o [B, K, G, D], the cache with the token, which it has already where interpreted).

    q and gate [B, K, G, n], the new k and v [B, K, D].
    """
    _, K, G, D = q.shape
    tables = {name: getattr(plan, name) for name in ("sequence", "block", "ends", "seen", "slot")}
    mine = lambda *shape: pl.BlockSpec((1, *shape), lambda n, sequence, *_: (sequence[n], *(0,) * len(shape)))
    put = {"k": quantize(k, cache.k.dtype), "v": quantize(v, cache.v.dtype)}
    eight_bits = cache.k_scale is not None
    ins = {"q": (q, mine(K, G, D))}
    # What is attended to is what the ring will hold.
    for name, new in put.items():
        ins[f"new {name}"] = (dequantize(*new, q.dtype) if eight_bits else new[0])[:, :, None], mine(K, 1, D)
    if gate is not None:
        ins["gate"] = gate, mine(K, G, gate.shape[-1])
    outs = {"o": (jax.ShapeDtypeStruct(q.shape, q.dtype), mine(K, G, D))}
    aliases = {}
    if static.interpret:
        tables |= {"k": cache.k, "v": cache.v}
        if eight_bits:
            tables |= {"k scale": cache.k_scale, "v scale": cache.v_scale}
    else:
        rings = {"k": cache.k, "v": cache.v}
        visited = lambda n, sequence, block, *_: (sequence[n], 0, block[n], 0)
        tile = lambda n, sequence, block, ends, seen, slot: (
            sequence[n],
            0,
            slot[sequence[n]] // static.rows,
            0,
        )
        ins |= {name: (ring, pl.BlockSpec((1, K, static.block, D), visited)) for name, ring in rings.items()}
        outs |= {
            f"{name} out": (jax.ShapeDtypeStruct(ring.shape, ring.dtype), pl.BlockSpec((1, K, static.rows, D), tile))
            for name, ring in rings.items()
        }
        if eight_bits:
            factors = {"k scale": cache.k_scale, "v scale": cache.v_scale}
            visited = lambda n, sequence, block, *_: (sequence[n], 0, block[n])
            tile = lambda n, sequence, block, ends, seen, slot: (sequence[n], 0, slot[sequence[n]] // static.lanes)
            for name, (numbers, factor) in put.items():
                ins[f"put {name}"] = numbers[:, :, None], mine(K, 1, D)
                ins[f"put {name} scale"] = factor[:, :, None], mine(K, 1)
            for name, ring in factors.items():
                ins[name] = ring, pl.BlockSpec((1, K, static.block), visited)
                shape = jax.ShapeDtypeStruct(ring.shape, ring.dtype)
                outs[f"{name} out"] = shape, pl.BlockSpec((1, K, static.lanes), tile)
            rings |= factors
        aliases = {len(tables) + list(ins).index(name): list(outs).index(f"{name} out") for name in rings}
    scratch = {"m": (K, G, 1), "l": (K, G, 1), "acc": (K, G, D)}
    names = (*tables, *ins, *outs, *scratch)

    def run(count: Array, *operands: Array) -> list[Array]:
        return pl.pallas_call(
            lambda *refs: _kernel(static, dict(zip(names, refs, strict=True))),
            out_shape=[shape for shape, _ in outs.values()],
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(tables),
                grid=(count,),
                in_specs=[spec for _, spec in ins.values()],
                out_specs=[spec for _, spec in outs.values()],
                scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch.values()],
            ),
            input_output_aliases=aliases,
            compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
            cost_estimate=spent.to_pallas(),
            interpret=static.interpret,
            name="decode_attention",
        )(*operands)

    if static.interpret:  # JAX's own rule forgets the count where rings differ along a batch and the count does not
        run = jax.custom_batching.sequential_vmap(run)
    found = run(plan.count, *tables.values(), *(x for x, _ in ins.values()))
    if not static.interpret:
        cache = KVCache(found[1], found[2], cache.length + 1, *found[3:])
    return found[0], cache
