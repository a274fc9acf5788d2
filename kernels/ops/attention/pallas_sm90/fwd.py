"""Attention on Hopper, forward: flash attention by two warpgroups that compute in turns and one that loads.

Math      s = cap(scale q k^T) log2(e);  p = 2^(s - m);  o = sigmoid(gate) * sum(p v) / sum(p);  lse = m + log2(sum(p))
Tiling    grid (H, query tiles, B), a thread block each; a query tile is 2 x q rows, q for each computing warpgroup. The
          key range of a warpgroup comes from its first query: tiles outside it are neither loaded nor computed, and the
          loop is cut in three, so that only the edges apply a mask. Under a window the work is linear in S.

              keys ->        k    k    k    k    k
              warpgroup 0    ▞    █    ▞    ░    ░       ▞ left edge, diagonal: masked
              warpgroup 1    ░    ▞    █    ▞    ░       █ interior: no mask is computed
              (next tile)    ░    ░    ▞    █    ▞       ░ nothing

          The third warpgroup loads q once, then K and V tiles by TMA into rings of stages. A tile has a barrier that
          says "here" and one that says "free", K its own and V its own: the next K comes while V is still in use. The
          gate comes last, as one more tile of the K ring.

              warpgroup 0    q k^T ....softmax....  p v, q k^T ....softmax....
              warpgroup 1          q k^T ....softmax....       p v, q k^T ...    the tensor cores always have one's work

State     m, l [q] and the output [q, D] of a warpgroup, in float32 registers.
Traffic   reads q and gate, writes o once; reads K and V once a query tile and head, the heads of a group at the same
          time, so that most of it comes from L2. 4 D FLOPs a visible pair.
Limits    bfloat16, float16; D 64, 128, 256; `vjp.attention` refuses the rest. T and S here are those of the arrays,
          multiples of 8; `Static` has the true ones. Segment ids in any order; where they ascend, tiles of foreign
          segments are skipped like those behind the window, and those of one segment apply no mask for it.
Source    Shah et al., FlashAttention-3 (arXiv:2407.08608), for the turns of the two warpgroups.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dantinox.kernels.ops.attention import segment_ids as packed
from dantinox.kernels.ops.attention.pallas_sm90.common import LOG2E, Span, Static, capped, span

Array = jax.Array
FLOOR = -1e30  # below every real score, in units of log2
ROW, COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
WIDTH = 128  # columns of the output that are gated and written at once
SIDE = 8  # rows of a TMA tile: lengths in memory are multiples of it


class Tiles(NamedTuple):
    """Sizes of the work: query rows of a warpgroup, keys of a tile, tiles that a ring holds: a power of two."""

    q: int
    k: int
    stages: int


TILES = {64: Tiles(64, 128, 4), 128: Tiles(64, 128, 2), 256: Tiles(64, 64, 2)}


def forward(q, k, v, gate, segments, static: Static, *, residuals: bool) -> dict[str, Array]:
    """{"o": output}, with `residuals` also "ungated", the output without its gate, and "lse" [B, H, T],
    filled up to whole query tiles. "ungated" only where there is a gate.

    Args:
        q: [B, T, H, D]; k, v: [B, S, K, D], in lengths that are multiples of `SIDE`.
        gate: [B, T, H, D] like q, or one logit a head [B, T, H, 1], or None.
        segments: int32 ids of the queries and of the keys, of the true lengths, or None.
    """
    B, T, H, D = q.shape
    tiles = TILES[D]
    rows = 2 * tiles.q
    whole = lambda x, axis, size: jnp.pad(x, [(0, -n % size if i == axis else 0) for i, n in enumerate(x.shape)])
    ins = {"q": q, "k": k, "v": v}
    if gate is not None and gate.shape[-1] == D:
        ins["gate"] = gate
    elif gate is not None:
        ins["row gate"] = whole(jax.nn.sigmoid(gate[..., 0].swapaxes(1, 2).astype(jnp.float32)), 2, rows)
    if segments is not None:
        ins["q ids"], ins["k ids"] = (
            packed.pad_ids_to_block(segments[0], rows),
            packed.pad_ids_to_block(segments[1], tiles.k),
        )
        ins["spans"] = packed.kv_block_ranges(ins["q ids"], tiles.q, ins["k ids"], tiles.k)

    outs = {"o": jax.ShapeDtypeStruct(q.shape, q.dtype)}
    if residuals:
        outs["lse"] = jax.ShapeDtypeStruct((B, H, pl.cdiv(T, rows) * rows), jnp.float32)
        if gate is not None:
            outs["ungated"] = outs["o"]

    swizzled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    ring = plgpu.SMEM((tiles.stages, tiles.k, D), q.dtype, transforms=swizzled)
    scratch = {
        "q tile": plgpu.SMEM((2, tiles.q, D), q.dtype, transforms=swizzled),
        "k ring": ring,
        "v ring": ring,
        "q here": plgpu.Barrier(num_barriers=2),
        "k here": plgpu.Barrier(num_barriers=tiles.stages, num_arrivals=1 if segments is None else 2),
        "v here": plgpu.Barrier(num_barriers=tiles.stages),
        "k free": plgpu.Barrier(num_barriers=tiles.stages, num_arrivals=2),
        "v free": plgpu.Barrier(num_barriers=tiles.stages, num_arrivals=2),
        "turn": plgpu.Barrier(num_barriers=2),
    }
    if "gate" in ins:
        scratch["gate here"] = plgpu.Barrier(num_barriers=2)
    if segments is not None:
        scratch["ids ring"] = plgpu.SMEM((tiles.stages, tiles.k), jnp.int32)
    if residuals:
        scratch["lse tile"] = plgpu.SMEM((2, tiles.q), jnp.float32)

    names = (*ins, *outs)

    def body(*given: Any, **scratch: Any) -> None:
        Block(dict(zip(names, given, strict=True)) | scratch, static, tiles)

    found = plgpu.kernel(
        body,
        out_type=tuple(outs.values()),
        scratch_types=scratch,
        grid=(H, pl.cdiv(T, rows), B),
        grid_names=("head", "tile", "batch"),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=static.interpret,
        kernel_name="attention_forward",
    )(*ins.values())
    return dict(zip(outs, found, strict=True))


class Block:
    """One query tile, as its three warpgroups see it."""

    def __init__(self, refs: dict[str, Any], static: Static, tiles: Tiles):
        self.refs, self.static, self.tiles = refs, static, tiles
        self.interpreted = static.interpret is not None
        group = lax.axis_index("warpgroup")
        pl.when(group < 2)(functools.partial(self.compute, group))
        pl.when(group == 2)(self.load)

    # Worked out where they are used: kept in registers all along they would push out something else.
    batch = property(lambda self: lax.axis_index("batch"))
    head = property(lambda self: lax.axis_index("head"))

    @property
    def first(self) -> Any:
        """The first query of the tile."""
        tile = lax.axis_index("tile")
        if self.static.causal:  # the longest first, so that none is left alone at the end
            tile = lax.axis_size("tile") - 1 - tile
        return tile * (2 * self.tiles.q)

    @property
    def span(self) -> Span:
        """The key tiles that are loaded."""
        found = span(self.first, 2 * self.tiles.q, self.tiles.k, self.static)
        if "spans" not in self.refs:
            return found
        one, other = (self.shared(group) for group in range(2))
        hull = Span(lax.min(one.start, other.start), one.left, one.right, lax.max(one.stop, other.stop))
        return found.within(hull)

    def shared(self, group: Any) -> Span:
        """The key tiles that may share a segment with the queries of a warpgroup; [left, right) are of that alone."""
        tile = lax.div(self.first, jnp.int32(self.tiles.q)) + group
        return Span(*(self.refs["spans"][self.batch, tile, n] for n in range(4)))

    def slot(self, j: Any) -> Any:
        """Where in its ring the key tile j is."""
        return j & (self.tiles.stages - 1)

    def wait(self, name: str, n: Any) -> None:
        plgpu.barrier_wait(self.refs[name].at[n])

    def arrive(self, name: str, n: Any) -> None:
        plgpu.barrier_arrive(self.refs[name].at[n])

    def queries(self, name: str, group: Any, *, by_head: bool = False) -> Any:
        """The part of an array in memory that belongs to the queries of a warpgroup."""
        rows = pl.ds(self.first + group * self.tiles.q, self.tiles.q)
        ref = self.refs[name]
        return ref.at[self.batch, self.head, rows] if by_head else ref.at[self.batch, rows, self.head]

    # The warpgroup that loads.

    def load(self) -> None:
        plgpu.set_max_registers(24, action="decrease")
        refs, (start, *_, stop), (_, k, stages) = self.refs, self.span, self.tiles
        key_head = lax.div(self.head, jnp.int32(self.static.G))
        for group in range(2):
            plgpu.copy_gmem_to_smem(self.queries("q", group), refs["q tile"].at[group], refs["q here"].at[group])

        @pl.loop(start, stop)
        def _(j: Any) -> None:
            slot, keys = self.slot(j), pl.ds(j * k, k)
            used = j - start >= stages
            pl.when(used)(lambda: self.wait("k free", slot))
            here = refs["k here"].at[slot]
            plgpu.copy_gmem_to_smem(refs["k"].at[self.batch, keys, key_head], refs["k ring"].at[slot], here)
            if "k ids" in refs:
                plgpu.copy_gmem_to_smem(refs["k ids"].at[self.batch, keys], refs["ids ring"].at[slot], here)
            pl.when(used)(lambda: self.wait("v free", slot))
            here = refs["v here"].at[slot]
            plgpu.copy_gmem_to_smem(refs["v"].at[self.batch, keys, key_head], refs["v ring"].at[slot], here)

        # Every tile is waited for until it is free: the gate takes the places of the next ones in the K ring.
        @pl.loop(stop, stop + stages)
        def _(j: Any) -> None:
            slot = self.slot(j)
            used = j - start >= stages
            pl.when(used)(lambda: self.wait("k free", slot))
            if "gate" in refs:
                for group in range(2):
                    place, at = self.gate_place(group)

                    @pl.when(j == place)
                    def _(group: int = group, at: Any = at) -> None:
                        target = refs["k ring"].at[slot, at]
                        plgpu.copy_gmem_to_smem(self.queries("gate", group), target, refs["gate here"].at[group])

            pl.when(used)(lambda: self.wait("v free", slot))

    def gate_place(self, group: Any) -> tuple[Any, Any]:
        """(the tile in whose place the gate of a warpgroup comes, its rows there)."""
        q, k, _ = self.tiles
        each = k // q  # warpgroups that share a tile: 2 or 1
        return self.span.stop + group // each, pl.ds(group % each * q, q)

    # The two warpgroups that compute.

    def compute(self, group: Any) -> None:
        plgpu.set_max_registers(240, action="increase")
        D = self.refs["q"].shape[-1]
        q, k, _ = self.tiles
        first = self.first + group * q

        def spans() -> tuple[Span, Span]:
            """Of the block and of this warpgroup; read anew where needed: from loop to loop registers are scarce."""
            block, seen = self.span, span(first, q, k, self.static)
            seen = seen.within(self.shared(group)) if "spans" in self.refs else seen
            return block, Span(*(lax.clamp(block.start, x, block.stop) for x in seen))

        row = lambda x: plgpu.layout_cast(jnp.full((q,), x, jnp.float32), ROW)
        acc = plgpu.layout_cast(jnp.zeros((q, D), jnp.float32), plgpu.Layout.WGMMA)
        carry = acc, row(FLOOR), row(0.0)
        step = lambda end, **how: functools.partial(self.step, group, first, end, **how)
        skip = lambda end: functools.partial(self.skip, group, end)

        self.wait("q here", group)
        block, mine = spans()
        self.wait_for_keys(block.start, block.stop)
        pl.when(group == 1)(lambda: self.wait("turn", group))
        if self.static.window is not None or "spans" in self.refs:
            lax.fori_loop(block.start, mine.start, skip(block.stop), None)
            carry = lax.fori_loop(mine.start, mine.left, step(block.stop, masked=True), carry)
        block, mine = spans()
        carry = lax.fori_loop(mine.left, mine.right, step(block.stop), carry)
        block, mine = spans()
        carry = lax.fori_loop(mine.right, mine.stop, step(block.stop, masked=True), carry)
        block, mine = spans()
        lax.fori_loop(mine.stop, block.stop, skip(block.stop), None)
        pl.when(group == 0)(lambda: self.arrive("turn", 1))
        self.finish(group, *carry)

    def skip(self, group: Any, end: Any, j: Any, _: None) -> None:
        """A key tile that only the other warpgroup sees: the turns and the barriers go on."""
        slot = self.slot(j)
        self.arrive("turn", 1 - group)
        self.arrive("k free", slot)
        self.wait("v here", slot)
        self.wait("turn", group)
        self.wait_for_keys(j + 1, end)
        self.arrive("v free", slot)

    def wait_for_keys(self, j: Any, end: Any) -> None:
        """Until key tile j is here, where there is one: each tile is waited for while its predecessor is in use."""
        pl.when(j < end)(lambda: self.wait("k here", self.slot(j)))

    def step(self, group: Any, first: Any, end: Any, j: Any, carry: tuple, masked: bool = False) -> tuple:
        """One key tile."""
        static, refs, slot = self.static, self.refs, self.slot(j)
        acc, m, l = carry
        s = self.scores(refs["q tile"].at[group], refs["k ring"].at[slot], lambda: self.arrive("turn", 1 - group))
        visible = self.visible(s.shape, first, j, group, slot) if masked else None
        self.arrive("k free", slot)

        unit = static.scale * LOG2E
        if static.softcap is not None:
            s = capped(s, static) if "lse" in refs else jnp.tanh(s * (static.scale / static.softcap))
            unit = static.softcap * LOG2E
        elif unit <= 0:  # the largest product is not the largest score
            s, unit = s * unit, 1.0
        if visible is not None:
            s = jnp.where(visible, s, -jnp.inf)
        across = lambda x, like: lax.broadcast_in_dim(x, like.shape, [0])
        new = jnp.maximum(m, jnp.max(s, axis=1) * unit)
        decay = jnp.exp2(m - new)
        p = jnp.exp2(s * unit - across(new, s))
        l = l * decay + jnp.sum(p, axis=1)
        acc = acc * across(decay, acc)
        p = p.astype(refs["v"].dtype)
        if not self.interpreted:  # for LLVM; ptxas 13.5 does the exponentials before the turn, scales acc after it
            acc, new, l, p = lax.optimization_barrier((acc, new, l, p))
        self.wait("v here", slot)
        self.wait("turn", group)
        acc = self.add_product(acc, p, refs["v ring"].at[slot], lambda: self.wait_for_keys(j + 1, end))
        self.arrive("v free", slot)
        return acc, new, l

    def visible(self, shape: tuple[int, int], first: Any, j: Any, group: Any, slot: Any) -> Array:
        """Which pairs of the queries from `first` on and the keys of tile j are visible."""
        static, refs = self.static, self.refs
        iota = lambda axis, layout: plgpu.broadcasted_iota(jnp.int32, (shape[axis],), 0, layout=layout)
        down, along = (lambda x, axis=axis: lax.broadcast_in_dim(x, shape, [axis]) for axis in range(2))
        if static.causal:
            # Numbers a row and a column, not a pair, which the compiler would keep in registers from tile to tile.
            last = iota(0, ROW) + (first + static.S - static.T - j * self.tiles.k)  # key of this tile that a row sees
            column = iota(1, COLUMN)
            if static.window is None:
                visible = along(column) <= down(last)
            else:  # as unsigned numbers, negative distances are longer than any window
                visible = (down(last) - along(column)).astype(jnp.uint32) < jnp.uint32(static.window)
        else:
            key = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
            visible = key < static.S - j * self.tiles.k
        if "q ids" in refs:
            rows = pl.ds(self.first + group * self.tiles.q, self.tiles.q)
            of_query = plgpu.load(refs["q ids"].at[self.batch, rows], layout=ROW, optimized=False)
            of_key = plgpu.load(refs["ids ring"].at[slot], layout=COLUMN)
            plgpu.commit_smem()  # before TMA writes the next ids there
            visible &= down(of_query) == along(of_key)
        return visible

    # What the interpreter has no tensor core for, it multiplies as values, read where the tensor core would.

    def scores(self, q: Any, k: Any, then: Callable[[], None]) -> Array:
        """q k^T in float32; then() while the tensor core has it."""
        if self.interpreted:
            s = lax.dot_general(q[...], k[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
            plgpu.commit_smem()  # a tensor core would have read through the proxy that TMA writes by
            then()
            return s

        def product(s: Any) -> Array:
            plgpu.wgmma(s, q, k.transpose((1, 0)))
            then()
            return s[...]

        return pl.run_scoped(product, plgpu.ACC((q.shape[0], k.shape[0]), jnp.float32))

    def add_product(self, acc: Array, p: Array, v: Any, then: Callable[[], None]) -> Array:
        """acc + p v in float32; then() while the tensor core has it."""
        if self.interpreted:
            acc = acc + jnp.dot(p, v[...], preferred_element_type=jnp.float32)
            plgpu.commit_smem()
            then()
            return acc

        def product(acc: Any) -> None:
            plgpu.wgmma(acc, p, v)
            then()

        return pl.run_state(product)(plgpu.ACC.init(acc))

    def finish(self, group: Any, acc: Array, m: Array, l: Array) -> None:
        """Divides, gates and writes."""
        refs = self.refs
        across = lambda x: lax.broadcast_in_dim(x, acc.shape, [0])
        empty = l == 0.0
        acc = acc * across(jnp.where(empty, 0.0, 1.0 / jnp.where(empty, 1.0, l)))
        if "lse" in refs:
            refs["lse tile"][group] = jnp.where(empty, jnp.inf, m + jnp.log2(jnp.where(empty, 1.0, l)))
        if "ungated" in refs:
            self.write(group, "ungated", lambda columns: acc[:, columns])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        if "row gate" in refs:
            gate = plgpu.load(self.queries("row gate", group, by_head=True), layout=ROW, optimized=False)
            acc = acc * across(gate)
        if "gate" in refs:
            self.wait("gate here", group)
        self.write(group, "o", lambda columns: self.gated(group, acc[:, columns], columns))
        if "lse" in refs:
            plgpu.copy_smem_to_gmem(refs["lse tile"].at[group], self.queries("lse", group, by_head=True))
        plgpu.wait_smem_to_gmem(0)

    def gated(self, group: Any, o: Array, columns: slice) -> Array:
        if "gate" not in self.refs:
            return o
        place, rows = self.gate_place(group)
        gate = self.refs["k ring"].at[self.slot(place), rows, columns]
        return o * jax.nn.sigmoid(plgpu.load(gate, layout=plgpu.Layout.WGMMA).astype(jnp.float32))

    def write(self, group: Any, name: str, part: Callable[[slice], Array]) -> None:
        """Sends some columns after the other, for want of registers, through the q tile, which is needed no more."""
        staged = self.refs["q tile"].at[group]
        for first in range(0, staged.shape[1], WIDTH):
            columns = slice(first, min(first + WIDTH, staged.shape[1]))
            staged[:, columns] = part(columns).astype(staged.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staged, self.queries(name, group))
