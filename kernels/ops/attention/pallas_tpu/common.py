"""What the forward and the backward kernel do alike with one tile of the score matrix.

A tile has `q` queries of each of the G heads of one key head, packed to R = G q rows, against `k` keys. Everything
lies transposed: keys down, queries across, so that maxima and sums over keys add whole registers and never cross lanes.
A tile is worked on in pieces of `keys` by `rows`, one matmul each, and in phases, a pass over all pieces each:

            rows ->                  phase 1   s = k q^T                  matrix unit
    keys    [0,0] [1,0] [2,0]        phase 2   mask, in edge tiles only   vector unit
            [0,1] [1,1] [2,1]        phase 3   p = 2^(s - m)              transcendental unit
                                     phase 4   o += v^T p                 matrix unit

Between phases the pieces wait in scratch memory. One straight stream at a time needs few registers; written as one
block, libtpu interleaves the phases and spills more than it gains. On a CPU a tile is one piece.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dantinox.kernels.cost import Cost
from dantinox.kernels.ops.attention.pallas_tpu.block_schedule import FIRST, FRESH, LAST, MASKED, Plan, plan

Array = jax.Array
LOG2E = math.log2(math.e)
FLOOR = -1e30  # below every real score
HIDDEN = -2e38  # a masked score: 2^(HIDDEN - FLOOR) is 0, so rows without a key keep a sum of 0
APART, MIXED, ALIKE = 0, 1, 2  # segments of a tile: none shared, some pairs, all pairs
VMEM_BYTES = 56 * 2**20  # of the smallest chip's 64
HELD = 32 * 1024  # float32 that stay in registers while products are added to them: half of a TPU's 64 Ki
NN, NT = ((1,), (0,)), ((1,), (1,))  # a b and a b^T


class Tiles(NamedTuple):
    """How much one step of the grid takes, and one matmul of it.

    Attributes:
        heads: key heads. q: queries of each of their G heads, a power of two. k: keys.
        rows: packed queries of a matmul; divides G q, and divides q or is a multiple of it. keys: keys; divides k.
        span: keys whose gradients stay on the chip together; a multiple of k.
        joined: key tiles that a step of the forward kernel takes as one; more than one only when interpreted, and then
            all that a query tile sees.
    """

    heads: int
    q: int
    k: int
    rows: int
    keys: int
    span: int
    joined: int = 1


class Static(NamedTuple):
    """Everything that is known when a kernel is traced; T and S are the true lengths."""

    T: int
    S: int
    G: int
    causal: bool
    window: int | None
    scale: float
    softcap: float | None
    tiles: Tiles
    interpret: Any

    @property
    def unit(self) -> float:
        """Scores are in units of the exponential's: log2 on a TPU, where 2^x is the instruction; not so on a CPU."""
        return 1.0 if self.interpret else LOG2E

    def exp(self, x: Array) -> Array:
        """e^x, x in these units."""
        return jnp.exp(x) if self.interpret else jnp.exp2(x)

    @property
    def pieces(self) -> tuple[int, int]:
        """Pieces of a tile, across the packed queries and down the keys."""
        return self.G * self.tiles.q // self.tiles.rows, self.tiles.k // self.tiles.keys

    def plan(self, keys: tuple[int, int] | None = None, joined: int = 1) -> Plan:
        """The visible tiles, of a range of keys or of all."""
        sizes = self.T, self.S, self.tiles.q, self.tiles.k
        return plan(*sizes, causal=self.causal, window=self.window, keys=keys, joined=joined)


class Segments(NamedTuple):
    """Segment ids as the kernels read them.

    Attributes:
        q: [heads, pieces of queries, 1, rows]. k: [heads, pieces of keys, 1, keys].
        shared: [heads, query tiles, key tiles]: APART, MIXED or ALIKE.
    """

    q: Array
    k: Array
    shared: Array


def dot(a: Array, b: Array, contract: tuple[tuple[int], tuple[int]]) -> Array:
    """a b in float32, over the last two axes; the axes before are heads."""
    heads = tuple(range(a.ndim - 2))
    dims = tuple(tuple(axis + len(heads) for axis in side) for side in contract)
    return jax.lax.dot_general(a, b, (dims, (heads, heads)), preferred_element_type=jnp.float32)


class Tile:
    """One step of the grid, seen from inside a kernel.

    Args:
        refs: blocks and scratch memory by name.
        whole: refs that hold all tiles, not a block; what their pieces follow, the query or the key tile.
        waiting: dtypes of what waits between phases without memory of its own: interpreted, it is just a value.
        joined: key tiles that are one here.
    """

    def __init__(
        self, refs: dict[str, Any], whole: dict[str, str], waiting: dict[str, Any], static: Static, joined: int
    ):
        self.refs, self.whole, self.waiting, self.static, self.joined = refs, whole, waiting, static, joined
        self.values: dict[tuple[Any, ...], Array] = {}
        self.g, self.n = pl.program_id(0), pl.program_id(1)
        self.i, self.j = refs["q tile"][self.n], refs["k tile"][self.n]
        self.flag = flag = refs["flags"][self.n]
        self.first, self.last, self.fresh = (flag & FIRST) != 0, (flag & LAST) != 0, (flag & FRESH) != 0
        self.masked, self.run, self.phases = (flag & MASKED) != 0, None, 0
        if "shared" in refs:
            shared = refs["shared"][self.g, self.n]
            self.run = shared != APART
            self.masked = self.run & (self.masked | (shared == MIXED))

    def phase(self, body: Callable[[], None]) -> None:
        """Runs a phase, unless no segment is shared.

        On a TPU each phase gets a branch of its own, always taken, which keeps libtpu from mixing it with the others;
        equal conditions would be merged. Interpreted, XLA would run a branch on one core: there the mask does it all.
        """
        if self.static.interpret:
            return body()
        self.phases += 1
        always = self.flag > -self.phases
        return pl.when(always if self.run is None else always & self.run)(body)

    def pieces(self) -> Iterator[tuple[int, int]]:
        """(piece of the queries, piece of the keys)."""
        across, down = self.static.pieces
        return ((r, c) for c in range(down) for r in range(across))

    def get(self, name: str, *piece: Any) -> Array:
        """A piece [rows, n] of a block; with several heads a step, [heads, rows, n]."""
        if name in self.waiting:
            return self.values[name, *piece]
        if name in self.whole:
            across, down = self.static.pieces
            h = self.static.tiles.heads
            read = lambda n: self.refs[name][self.g if h == 1 else pl.ds(self.g * h, h), n + piece[0]]
            if self.whole[name] == "q":
                return read(self.i * across)
            parts = [read(self.j * down + n) for n in range(self.joined)]
            return parts[0] if self.joined == 1 else jnp.concatenate(parts, -2 if name == "k" else -1)
        return self.refs[name][self._at(piece)]

    def put(self, name: str, *piece: Any, value: Array) -> None:
        """Writes a piece, in the block's dtype."""
        if name in self.waiting:
            self.values[name, *piece] = value.astype(self.waiting[name])
        else:
            ref = self.refs[name]
            ref[self._at(piece)] = value.astype(ref.dtype)

    def fill(self, value: float, *names: str) -> None:
        """Writes one value everywhere."""
        for name in names:
            ref = self.refs[name]
            ref[...] = jnp.full(ref.shape, value, ref.dtype)

    def _at(self, piece: tuple[Any, ...]) -> tuple[Any, ...]:
        return ((0 if self.static.tiles.heads == 1 else slice(None)), *piece)

    def sum_keys(self, name: str, a: str, b: str, decay: str | None = None) -> None:
        """name[r] = decay[r] name[r] + sum_c a[c] b[r, c]."""
        across, down = self.static.pieces
        start = lambda r: self.get(name, r) if decay is None else self.get(decay, r) * self.get(name, r)
        product = lambda r, c: dot(self.get(a, c), self.get(b, r, c), NN)
        if math.prod(self.refs[name].shape[-2:]) <= HELD:
            for r in range(across):
                total = start(r)
                for c in range(down):
                    total = total + product(r, c)
                self.put(name, r, value=total)
        else:
            for r, c in self.pieces():
                self.put(name, r, value=(self.get(name, r) if c else start(r)) + product(r, c))

    def scores(self, s: Array) -> Array:
        """Products k q^T as scores, scaled and capped, in units of `Static.unit`."""
        scale, cap = self.static.scale, self.static.softcap
        if cap is None:
            return s * (scale * self.static.unit)
        return jnp.tanh(s * (scale / cap)) * (cap * self.static.unit)

    def mask(self, then: Callable[[Any, Any, Array], None]) -> None:
        """Hides the invisible pairs of an edge tile's scores; then(r, c, scores) for each piece."""
        across, down = self.static.pieces

        def piece(n: Any, _: None) -> None:
            r, c = n // down, n % down
            s = self.get("s", r, c)
            s = jnp.where(self._visible(s.shape, r, c), s, HIDDEN)
            self.put("s", r, c, value=s)
            then(r, c, s)

        if self.static.interpret:
            for n in range(across * down):
                piece(n, None)
        else:
            pl.when(self.masked)(lambda: jax.lax.fori_loop(0, across * down, piece, None))

    def _visible(self, shape: tuple[int, ...], r: Any, c: Any) -> Array:
        static = self.static
        _, q, k, rows, keys, *_ = static.tiles
        key = jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 2)
        row = jax.lax.broadcasted_iota(jnp.int32, (*shape[:-2], 1, shape[-1]), len(shape) - 1)
        first = self.i * q + static.S - static.T - self.j * k - c * keys
        if not static.causal:
            visible = key < static.S - self.j * k - c * keys
        else:
            distance = ((row + r * rows) & (q - 1)) + first - key
            if static.window is None:
                visible = distance >= 0
            else:  # as an unsigned number, what is negative is past every window
                visible = distance.astype(jnp.uint32) < static.window
        if "shared" in self.refs:
            visible &= self.get("q ids", r) == self._column(self.get("k ids", c))
        return visible

    def _column(self, row: Array) -> Array:
        """[..., 1, n] as [..., n, 1]. The transpose unit takes whole registers."""
        if self.static.interpret:
            return row.swapaxes(-1, -2)
        return jnp.broadcast_to(row, (128, row.shape[-1])).T[:, :1]


def block(static: Static, follows: str, *piece: int, first: int = 0) -> pl.BlockSpec:
    """A tile's pieces of an array [heads, pieces, *piece] that follows the query tile ("q"), or the key tile ("k").

    Index maps get (head, tile of the plan) and the tables; `first` is the tile that the array begins with.
    """
    across, down = static.pieces
    if follows == "q":
        return pl.BlockSpec((static.tiles.heads, across, *piece), lambda g, n, i, *_: (g, i[n] - first, 0, 0))
    return pl.BlockSpec((static.tiles.heads, down, *piece), lambda g, n, i, j, *_: (g, j[n] - first, 0, 0))


def call(
    kernel: Callable[..., None],
    static: Static,
    tiles: Plan,
    ins: dict[str, tuple[Array, str]],
    outs: dict[str, tuple[Any, pl.BlockSpec]],
    scratch: dict[str, tuple[tuple[int, ...], Any]],
    waiting: dict[str, tuple[tuple[int, ...], Any]],
    *,
    segments: Segments | None,
    joined: int = 1,
    name: str,
    cost: Cost,
) -> list[Array]:
    """`pallas_call` over (heads, visible tiles). The kernel gets a `Tile` whose refs have these names.

    Args:
        ins: arrays, and what their blocks follow; see `block`.
        scratch: shape, without the heads, and dtype, of what is kept from step to step.
        waiting: the same of what waits from phase to phase.
        joined: key tiles in a step, as `block_sizes` has it.
    """
    tables = {"q tile": jnp.asarray(tiles.q), "k tile": jnp.asarray(tiles.k), "flags": jnp.asarray(tiles.flags)}
    h = static.tiles.heads
    if segments is not None:
        tables["shared"] = segments.shared[:, tiles.q, tiles.k]
        ins = ins | {"q ids": (segments.q, "q"), "k ids": (segments.k, "k")}
    heads = next(iter(ins.values()))[0].shape[0]
    whole, values = {}, {}
    if static.interpret:
        # The interpreter carries blocked inputs through its loop and writes every block back, which makes XLA copy
        # whole arrays in each step. Prefetched operands it only reads: cut there, a step costs what its tile does.
        whole = {name: follows for name, (_, follows) in ins.items()}
        tables, ins = tables | {name: array for name, (array, _) in ins.items()}, {}
        values = {name: dtype for name, (_, dtype) in waiting.items()}
    else:
        scratch = scratch | waiting
    names = (*tables, *ins, *outs, *scratch)

    def body(*refs: Any) -> None:
        kernel(Tile(dict(zip(names, refs, strict=True)), whole, values, static, joined))

    run = pl.pallas_call(
        body,
        out_shape=[shape for shape, _ in outs.values()],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(tables),
            grid=(heads // h, len(tiles)),
            in_specs=[block(static, follows, *array.shape[2:]) for array, follows in ins.values()],
            out_specs=[spec for _, spec in outs.values()],
            scratch_shapes=[pltpu.VMEM((h, *shape), dtype) for shape, dtype in scratch.values()],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=cost.to_pallas(),
        interpret=static.interpret,
        name=name,
    )
    return run(*tables.values(), *(array for array, _ in ins.values()))


def spans(static: Static) -> list[tuple[int, int] | None]:
    """Ranges of key tiles whose gradients are summed on the chip together; None: all at once."""
    tiles, each = -(-static.S // static.tiles.k), static.tiles.span // static.tiles.k
    if tiles <= each:
        return [None]
    return [(first, min(first + each, tiles)) for first in range(0, tiles, each)]
