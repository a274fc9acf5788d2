"""Cached decoding on Hopper: one kernel that appends to the rings and attends, then one sum over its parts.

Math      s = cap(scale q k^T) log2(e);  p = 2^(s - m);  o = sum(p v) / sum(p);  lse = m + log2(sum(p));
          o = sigmoid(gate) * sum(2^lse o) / sum(2^lse) over the splits, in their order: two runs are bit-equal.
Tiling    grid (splits, K, B), a thread block of one warpgroup each. The blocks of slots that hold visible tokens are
          numbered from the oldest on, and a split takes an equal share of them: no thread block sees the others.

              blocks of slots ->   0   1   2   3   4   5
              split 0              ░   ░   ░   ▞   █   ░      ▞ edge: scores masked, rows of v cleared
              split 1              █   n   ░   ░   ░   █      n edge, and where the new token goes
                                                              ░ neither loaded nor computed
          The G query heads of a key head are the first rows of the 64 that a tensor core multiplies. Blocks come by
          TMA into rings of stages, of keys and of values; a place is loaded anew as soon as it is read.
          The new token is put into its block on the chip, and from there into the ring: nobody else reads that block.
State     m, l [64] and the output [64, D] of a split, in float32 registers.
Traffic   reads the visible blocks of k and v once, whatever C is, and q once a split; writes one slot of each ring, in
          place, and o [ceil8(G), D] and lse [64] of a split in float32. 4 H D FLOPs a visible token, times 64 / G that
          the rows without a query cost: less than the memory does.
Limits    bfloat16, float16, the rings of that dtype too; D 64, 128, 256; G up to 64; C a multiple of 8. ValueError
          comes from `dantinox.kernels.decode_attention`, the rest is refused there.
Source    Dao, Flash-Decoding (2023).
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dantinox.kernels.ops.decode_attention.kv_cache import KVCache, append

Array = jax.Array
DTYPES = (jnp.bfloat16, jnp.float16)
LOG2E = math.log2(math.e)
FLOOR = -1e30  # below every real score, in units of log2
ROW, COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
ROWS = 64  # of a wgmma, the query heads of one key head among them
BLOCK = 64  # slots
SIDE = 8  # rows of a TMA tile
STAGES = {64: (4, 4), 128: (3, 2), 256: (3, 3)}  # by D, of keys and values: what fits `RESIDENT` thread blocks
RESIDENT = {64: 396, 128: 264, 256: 132}  # thread blocks that an H100's 132 SMs hold at a time
START = 2  # loads of a block that a thread block's beginning and end take as long as
WIDTH = 64  # columns that are in registers at once where a block is patched


class Static(NamedTuple):
    """What is known when the kernel is traced; `limit` of the tokens seen."""

    C: int
    limit: int
    splits: int
    scale: float
    softcap: float | None
    interpret: plgpu.InterpretGPUParams | None


class Share(NamedTuple):
    """What a split does: blocks first + i, around the ring, for i in [start, stop); seen and slot as in `Visits`."""

    seen: Any
    slot: Any
    first: Any
    start: Any
    stop: Any


def refusal(q: jax.ShapeDtypeStruct, cache: KVCache) -> str | None:
    """Why the kernel cannot take q [B, H, D] and the cache; None where it can."""
    (_, H, D), (K, C) = q.shape, cache.k.shape[1:3]
    if q.dtype not in DTYPES:
        return f"q has dtype {jnp.dtype(q.dtype)} and Hopper's tensor cores take bfloat16 and float16 here"
    for name, ring in (("cache.k", cache.k), ("cache.v", cache.v)):
        if ring.dtype != q.dtype:
            return f"{name} has dtype {ring.dtype} and its tiles go to the tensor cores as they are: {q.dtype}"
    if D not in STAGES:
        return f"q has head dim {D} and it has tiles for {', '.join(map(str, STAGES))}"
    if H // K > ROWS:
        return f"q has {H // K} heads for each of k's and a tile has {ROWS} rows"
    if C % SIDE:
        return f"cache has {C} slots and its copies take multiples of {SIDE}"
    return None


def share(length: Any, split: Any, static: Static) -> Share:
    """The blocks of one split, for a ring that has held `length` tokens."""
    C, blocks = jnp.int32(static.C), -(-static.C // BLOCK)
    seen, slot = lax.min(length + 1, jnp.int32(static.limit)), lax.rem(length, C)
    oldest = lax.rem(length + 1 - seen, C)
    first, last = lax.div(oldest, jnp.int32(BLOCK)), lax.div(slot, jnp.int32(BLOCK))
    around = lax.min(jnp.int32(blocks), blocks - first + last + 1)
    count = jnp.where(oldest > slot, around, last - first + 1)
    part = lambda n: lax.div(count * n, jnp.int32(static.splits))
    return Share(seen, slot, first, part(split), part(split + 1))


def most_blocks(C: int, limit: int) -> int:
    """Blocks that a sequence visits at most."""
    return min(-(-C // BLOCK), -(-(limit - 1) // BLOCK) + 1 + (C % BLOCK > 0))


def splits(B: int, K: int, blocks: int, resident: int) -> int:
    """Parts of a sequence: as many as fill the SMs, and more in a batch, for its lengths may differ.

    Args:
        blocks: of a sequence, at most. resident: thread blocks that run at a time.
    """

    def time(n: int) -> float:
        """In loads of a block: of a batch of equal lengths, and of one whose lengths are evenly spread."""
        waves, part = -(-B * K * n // resident), blocks / n
        equal = waves * (part + START)
        return equal if B == 1 else equal + B * K * blocks / 2 / resident + part + waves * START

    candidates = range(1, max(1, min(blocks // 2, 4 * resident // (B * K))) + 1)
    best = min(map(time, candidates))
    return next(n for n in candidates if time(n) <= 1.1 * best)


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
    parts: int | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[Array, KVCache]:
    """See `dantinox.kernels.decode_attention`, where arguments are checked.

    Args:
        parts: splits of a sequence; None: as many as suit an H100. interpret: run on the CPU.

    Raises:
        NotImplementedError: a dtype, head dim, number of heads or of slots that the kernel does not take.
    """
    if (why := refusal(q, cache)) is not None:
        raise NotImplementedError(f"decode_attention: implementation='pallas' cannot run here: {why}")
    (B, H, D), (K, C) = q.shape, cache.k.shape[1:3]
    if 0 in (B, H):
        return jnp.zeros_like(q), append(cache, k, v)
    limit = C if window is None else min(C, int(window))
    if parts is None:
        parts = splits(B, K, most_blocks(C, limit), RESIDENT[D])
    static = Static(C, limit, parts, float(scale), softcap, interpret)
    length, G = cache.length.astype(jnp.int32), H // K
    rows = jnp.pad(q.reshape(B, K, G, D), ((0, 0), (0, 0), (0, -G % SIDE), (0, 0)))
    rings = jax.new_ref(cache.k), jax.new_ref(cache.v)
    o, lse = _call(rows, k.astype(q.dtype), v.astype(q.dtype), length, rings, static)
    o = combined(o[..., :G, :], lse[..., :G]).reshape(B, H, D)
    if gate is not None:
        o = o * jax.nn.sigmoid(gate.astype(jnp.float32))
    return o.astype(q.dtype), KVCache(jax.freeze(rings[0]), jax.freeze(rings[1]), cache.length + 1)


def combined(o: Array, lse: Array) -> Array:
    """[..., D] from the outputs [splits, ..., D] and log2-sum-exps [splits, ...] of the splits; -inf: saw nothing."""
    if o.shape[0] == 1:
        return o[0]
    weight = jnp.exp2(lse - jnp.max(lse, axis=0))
    weight = (weight / jnp.sum(weight, axis=0))[..., None]
    # What a split without tokens has left behind is no number.
    return jnp.sum(jnp.where(weight > 0, o, 0) * weight, axis=0)


def _call(q: Array, k: Array, v: Array, length: Array, rings: tuple, static: Static) -> tuple[Array, Array]:
    """(o [splits, B, K, G, D], lse [splits, B, K, ROWS]) float32; q [B, K, G, D] with G a multiple of `SIDE`."""
    B, K, G, D = q.shape
    stages = dict(zip("kv", STAGES[D], strict=True))
    tiled = lambda shape, dtype: plgpu.SMEM(
        shape,
        dtype,
        transforms=(plgpu.TilingTransform((SIDE, 128 // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(128)),
    )
    scratch = {
        "q tile": tiled((ROWS, D), q.dtype),
        "new": plgpu.SMEM((2, D), q.dtype),
        "k tiles": tiled((stages["k"], BLOCK, D), q.dtype),
        # The output is put together where values were.
        "late": plgpu.RefUnion(
            [tiled((stages["v"], BLOCK, D), q.dtype)],
            [tiled((ROWS, D), jnp.float32), plgpu.SMEM((ROWS,), jnp.float32)],
        ),
        "q here": plgpu.Barrier(num_arrivals=3),
        "k here": plgpu.Barrier(num_barriers=stages["k"]),
        "v here": plgpu.Barrier(num_barriers=stages["v"]),
    }
    names = ("q", "new k", "new v", "length", "k", "v", "o", "lse")

    def body(*given: Any, **scratch: Any) -> None:
        (values,), (out, total) = scratch.pop("late")
        found = dict(zip(names, given, strict=True)) | scratch
        Part(found | {"v tiles": values, "o tile": out, "lse tile": total}, static)

    return plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((static.splits, B, K, G, D), jnp.float32),
            jax.ShapeDtypeStruct((static.splits, B, K, ROWS), jnp.float32),
        ),
        scratch_types=scratch,
        grid=(static.splits, K, B),
        grid_names=("split", "head", "batch"),
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        interpret=static.interpret,
        kernel_name="decode_attention",
    )(q, k, v, length, *rings)


def rows_of(x: float) -> Array:
    """The same number for each row of a tile, [ROWS]."""
    return plgpu.layout_cast(jnp.full((ROWS,), x, jnp.float32), ROW)


class Part:
    """One split of one sequence and key head."""

    def __init__(self, refs: dict[str, Any], static: Static):
        self.refs, self.static = refs, static
        self.split, self.head, self.batch = (lax.axis_index(name) for name in ("split", "head", "batch"))
        self.share = share(refs["length"][self.batch], self.split, static)
        total = refs["lse tile"]
        start, stop = self.share.start, self.share.stop
        pl.when(start < stop)(self.attend)

        @pl.when(start == stop)
        def _() -> None:
            total[...] = rows_of(-jnp.inf)

        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(total, self.mine("lse"))
        plgpu.wait_smem_to_gmem(0)

    def mine(self, name: str) -> Any:
        return self.refs[name].at[self.split, self.batch, self.head]

    def block(self, i: Any) -> Any:
        """Where in the ring the i-th visited block is."""
        return lax.rem(self.share.first + i, jnp.int32(-(-self.static.C // BLOCK)))

    def stages(self, name: str) -> int:
        return self.refs[f"{name} tiles"].shape[0]

    def place(self, name: str, i: Any) -> Any:
        """Where in shared memory the i-th block comes."""
        return lax.rem(i - self.share.start, jnp.int32(self.stages(name)))

    def load(self, name: str, i: Any) -> None:
        """Asks for the i-th block, where there is one."""

        @pl.when(i < self.share.stop)
        def _() -> None:
            refs, at = self.refs, self.place(name, i)
            slots = pl.ds(self.block(i) * BLOCK, BLOCK)
            source = refs[name].at[self.batch, self.head, slots]
            plgpu.copy_gmem_to_smem(source, refs[f"{name} tiles"].at[at], refs[f"{name} here"].at[at])

    def attend(self) -> None:
        refs, (*_, start, stop) = self.refs, self.share
        D = refs["q"].shape[-1]
        new = lambda n, name: plgpu.copy_gmem_to_smem(
            refs[name].at[self.batch, self.head], refs["new"].at[n], refs["q here"]
        )
        rows = refs["q"].at[self.batch, self.head, pl.ds(0, ROWS)]  # past the last head they are zeros
        plgpu.copy_gmem_to_smem(rows, refs["q tile"], refs["q here"])
        new(0, "new k")
        new(1, "new v")
        for n in range(max(map(self.stages, "kv"))):
            for name in "kv":
                if n < self.stages(name):
                    self.load(name, start + n)
        acc = plgpu.layout_cast(jnp.zeros((ROWS, D), jnp.float32), plgpu.Layout.WGMMA)
        plgpu.barrier_wait(refs["q here"])
        acc, m, l = lax.fori_loop(start, stop, self.step, (acc, rows_of(FLOOR), rows_of(0.0)))
        refs["lse tile"][...] = m + jnp.log2(l)
        refs["o tile"][...] = acc * lax.broadcast_in_dim(1 / l, acc.shape, [0])
        plgpu.commit_smem()
        heads = pl.ds(0, refs["o"].shape[-2])
        plgpu.copy_smem_to_gmem(refs["o tile"].at[heads], self.mine("o"))

    def step(self, i: Any, carry: tuple) -> tuple:
        """One block of slots."""
        static, refs, share = self.static, self.refs, self.share
        acc, m, l = carry
        first = self.block(i) * BLOCK
        newest = lax.div(share.slot, jnp.int32(BLOCK)) == self.block(i)
        edge = newest | (i == 0) | (first + BLOCK > static.C)

        at = self.place("k", i)
        plgpu.barrier_wait(refs["k here"].at[at])
        pl.when(newest)(lambda: self.patch("k", at, first))
        s = self.scores(refs["q tile"], refs["k tiles"].at[at])
        self.load("k", i + self.stages("k"))

        unit = static.scale * LOG2E
        if static.softcap is not None:
            s, unit = jnp.tanh(s * (static.scale / static.softcap)), static.softcap * LOG2E
        elif unit <= 0:  # the largest product is not the largest score
            s, unit = s * unit, 1.0
        across = lambda x, like: lax.broadcast_in_dim(x, like.shape, [0])
        s = lax.cond(edge, lambda s: jnp.where(self.visible(s.shape, 1, first), s, -jnp.inf), lambda s: s, s)
        new = jnp.maximum(m, jnp.max(s, axis=1) * unit)
        decay = jnp.exp2(m - new)
        p = jnp.exp2(s * unit - across(new, s))
        l = l * decay + jnp.sum(p, axis=1)
        acc = acc * across(decay, acc)

        at = self.place("v", i)
        plgpu.barrier_wait(refs["v here"].at[at])
        pl.when(edge)(lambda: self.patch("v", at, first))
        pl.when(newest)(self.append)
        acc = self.add_product(acc, p.astype(refs["v"].dtype), refs["v tiles"].at[at])
        self.load("v", i + self.stages("v"))
        return acc, new, l

    def slots(self, shape: tuple[int, int], axis: int, first: Any) -> Array:
        """The slots of a block that begins at `first`, along an axis."""
        return first + plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)

    def visible(self, shape: tuple[int, int], axis: int, first: Any) -> Array:
        """Which slots of a block hold tokens that are seen; the new token's does."""
        slots = self.slots(shape, axis, first)
        age = self.share.slot - slots
        age = jnp.where(age < 0, age + self.static.C, age)
        return (age < self.share.seen) & (slots < self.static.C)

    def patch(self, name: str, at: Any, first: Any) -> None:
        """Puts the new token into a block in shared memory; values that nobody sees may be NaN, and become zeros."""
        tile, new = self.refs[f"{name} tiles"], self.refs["new"].at["kv".index(name)]
        for start in range(0, tile.shape[-1], WIDTH):
            columns = slice(start, start + WIDTH)
            x = plgpu.load(tile.at[at, :, columns], layout=plgpu.Layout.WGMMA)
            if name == "v":
                x = jnp.where(self.visible(x.shape, 0, first), x, 0)
            token = lax.broadcast_in_dim(plgpu.load(new.at[columns], layout=COLUMN), x.shape, [1])
            tile[at, :, columns] = jnp.where(self.slots(x.shape, 0, first) == self.share.slot, token, x)
        plgpu.commit_smem()

    def append(self) -> None:
        """Writes the new token into its slot of the rings: the block that has it has been read."""
        for n, name in enumerate("kv"):
            slot = self.refs[name].at[self.batch, self.head, self.share.slot]
            plgpu.copy_smem_to_gmem(self.refs["new"].at[n], slot)

    # What the interpreter has no tensor core for, it multiplies as values, read where the tensor core would.

    def scores(self, q: Any, k: Any) -> Array:
        """q k^T in float32."""
        if self.static.interpret is not None:
            s = lax.dot_general(q[...], k[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
            plgpu.commit_smem()  # a tensor core would have read through the proxy that TMA writes by
            return s

        def product(s: Any) -> Array:
            plgpu.wgmma(s, q, k.transpose((1, 0)))
            return s[...]

        return pl.run_scoped(product, plgpu.ACC((q.shape[0], k.shape[0]), jnp.float32))

    def add_product(self, acc: Array, p: Array, v: Any) -> Array:
        """acc + p v in float32."""
        if self.static.interpret is not None:
            acc = acc + jnp.dot(p, v[...], preferred_element_type=jnp.float32)
            plgpu.commit_smem()
            return acc
        return pl.run_state(lambda acc: plgpu.wgmma(acc, p, v))(plgpu.ACC.init(acc))
