"""Attention on Mosaic TPU, and interpreted on a CPU: flash attention over the visible tiles only.

Math      s = cap(scale q k^T) log2(e);  p = 2^(s - m);  o = sigmoid(gate) * sum(p v) / sum(p)
          backward, with do' = do sigmoid(gate) and delta = rowsum(do' o'), o' the ungated output:
          p = 2^(s - lse);  dv = p^T do';  ds = p (do' v^T - delta);  dq = scale ds k;  dk = scale ds^T q
Tiling    grid (heads, visible tiles), the tiles of one key head after each other; see `plan.py` for which are visible.
          The G query heads of a key head are packed: a tile has R = G * bq rows against bk keys.

              keys ->        bk   bk   bk   bk
              G x bq rows    ▞    ░    ░    ░       ▞ masked
              G x bq rows    █    ▞    ░    ░       █ interior: no mask is computed
              G x bq rows    ▞    █    ▞    ░       ░ not in the grid

State     forward: m, l [R] and the output [R, D] of one query tile, in float32. Backward: dq of one query tile, dk and
          dv of all keys of the head; they never leave the chip before they are done, and the sum over G is in the product.
Traffic   forward reads q, gate and writes o once, reads k and v once a visible tile: 2 T S_visible / bq rows of D.
          4 D FLOPs a visible pair forward, 10 D backward. The naive way moves T S scores three times.
Limits    float32, bfloat16, float16; any T, S, H, K, D. ValueError comes from `kernels.attention`.
Source    Dao, FlashAttention-2 (arXiv:2307.08691); jax's splash attention for the grid of visible tiles.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.attention.plan import FIRST, LAST, MASKED, Plan, plan

Array = jax.Array
LOG2E = math.log2(math.e)
FLOOR = -1e30  # below every real score
HIDDEN = -2e38  # a masked score: 2^(HIDDEN - FLOOR) is 0, so rows without a key keep l = 0
VMEM_BYTES = 100 * 2**20
NN, NT, TN = ((1,), (0,)), ((1,), (1,)), ((0,), (0,))


class Tiles(NamedTuple):
    """How much one step of the grid takes: `heads` key heads, `q` queries of each of their G heads, `k` keys."""

    heads: int
    q: int
    k: int


class Static(NamedTuple):
    """Everything that is known when a kernel is traced; T and S are the true lengths."""

    T: int
    S: int
    causal: bool
    window: int | None
    scale: float
    softcap: float | None
    tiles: Tiles
    interpret: Any

    def plan(self) -> Plan:
        """The visible tiles."""
        return plan(self.T, self.S, self.tiles.q, self.tiles.k, causal=self.causal, window=self.window)


def _dot(a: Array, b: Array, contract: tuple[tuple[int], tuple[int]]) -> Array:
    """a b in float32, over the last two axes; the axes before are heads."""
    heads = tuple(range(a.ndim - 2))
    dims = tuple(tuple(axis + len(heads) for axis in side) for side in contract)
    return jax.lax.dot_general(a, b, (dims, (heads, heads)), preferred_element_type=jnp.float32)


def _tile(ref: Any, static: Static) -> Array:
    """A block [heads, ..., rows, n] as [heads, R, n]; where a step takes one head, as [R, n]."""
    block = ref[...]
    rows = (math.prod(block.shape[1:-1]), block.shape[-1])
    return block.reshape(rows if static.tiles.heads == 1 else (block.shape[0], *rows))


def _mask(shape: tuple[int, ...], i: Array, j: Array, ids: tuple[Array, Array] | None, static: Static) -> Array:
    """Which pairs of query tile i and key tile j are visible, as [..., bk, R]."""
    _, bq, bk = static.tiles
    key = jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 2)
    query = jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1) & (bq - 1)  # R = G * bq, bq a power of two
    distance = query - key + (i * bq + static.S - static.T - j * bk)
    mask = None
    if static.causal:
        mask = distance >= 0
    elif static.S % bk:
        mask = key < static.S - j * bk
    if static.window is not None:
        mask &= distance < static.window
    if ids is not None:
        same = ids[0] == ids[1]
        mask = same if mask is None else mask & same
    return jnp.ones(shape, bool) if mask is None else mask


def _seen(mask: Array) -> Array:
    """[..., bk, 1]: keys that some query of the tile sees. What the others hold, NaN included, must reach nobody."""
    return jnp.max(mask.astype(jnp.float32), axis=-1, keepdims=True) > 0


def _ids(q_ref: Any, k_ref: Any, static: Static) -> tuple[Array, Array]:
    """Segment ids of a tile: the queries' as a row [..., 1, R], the keys' as a column [..., bk, 1]."""
    queries, keys = _tile(q_ref, static), _tile(k_ref, static)
    if static.interpret:
        return queries, keys.swapaxes(-1, -2)
    return queries, jnp.broadcast_to(keys, (128, keys.shape[-1])).T[:, :1]


def _scores(k: Array, q: Array, static: Static) -> tuple[Array, Array | None]:
    """(s [..., bk, R] in units of log2, its slope under the soft cap or None)."""
    s = _dot(k, q, NT)
    if static.softcap is None:
        return s * (static.scale * LOG2E), None
    t = jnp.tanh(s * (static.scale / static.softcap))
    return t * (static.softcap * LOG2E), 1 - t * t


def _by_kind(flag: Array, run: Array | None, static: Static, body: Any) -> None:
    """body(masked) for this tile: without the mask in interior tiles, not at all where no segment is shared.

    Interpreted, one body with the mask serves all tiles: XLA runs what is inside a branch on one core.
    """
    if static.interpret:
        body(True)
        return
    masked = (flag & MASKED) != 0
    pl.when(masked if run is None else masked & run)(lambda: body(True))
    pl.when(~masked if run is None else ~masked & run)(lambda: body(False))


def _forward_kernel(q_tile, k_tile, flags, *refs, static: Static, gated: bool, segments: bool, residuals: bool):
    refs = list(refs)
    run_ref = refs.pop(0) if segments else None
    q_ref, k_ref, v_ref, *refs = refs
    gate_ref = refs.pop(0) if gated else None
    ids = (refs.pop(0), refs.pop(0)) if segments else None
    o_ref, *refs = refs
    u_ref = refs.pop(0) if gated and residuals else None
    lse_ref = refs.pop(0) if residuals else None
    m_ref, l_ref, acc_ref = refs
    n = pl.program_id(1)
    flag = flags[n]
    clear = segments or (static.window is not None and static.T < static.S)

    @pl.when((flag & FIRST) != 0)
    def _():
        m_ref[...] = jnp.full(m_ref.shape, FLOOR, jnp.float32)
        l_ref[...] = jnp.zeros(l_ref.shape, jnp.float32)
        acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)

    def body(masked: bool) -> None:
        # Keys down, queries across: maxima and sums over keys add whole registers, and no lane is ever crossed.
        q, k, v = (_tile(ref, static) for ref in (q_ref, k_ref, v_ref))
        s, _ = _scores(k, q, static)
        if masked:
            mask = _mask(s.shape, q_tile[n], k_tile[n], ids and _ids(*ids, static), static)
            s = jnp.where(mask, s, HIDDEN)
            v = jnp.where(_seen(mask), v, 0) if clear else v
        m = m_ref[...]
        top = jnp.maximum(m, jnp.max(s, axis=-2, keepdims=True))
        p = jnp.exp2(s - top)
        decay = jnp.exp2(m - top)
        m_ref[...] = top
        l_ref[...] = decay * l_ref[...] + jnp.sum(p, axis=-2, keepdims=True)
        acc_ref[...] = decay * acc_ref[...] + _dot(v, p.astype(v.dtype), TN)  # [..., D, R]

    run = None if run_ref is None else run_ref[pl.program_id(0), n] != 0
    _by_kind(flag, run, static, body)

    @pl.when((flag & LAST) != 0)
    def _():
        l = l_ref[...]
        nobody = l == 0
        some = jnp.where(nobody, 1.0, l)
        u = (acc_ref[...] / some).swapaxes(-1, -2).reshape(o_ref.shape)
        if u_ref is not None:
            u_ref[...] = u.astype(u_ref.dtype)
        if gate_ref is not None:
            u = u * jax.nn.sigmoid(gate_ref[...].astype(jnp.float32))
        o_ref[...] = u.astype(o_ref.dtype)
        if lse_ref is not None:
            # A query without keys: so high that 2^(s - lse) is 0 in the backward pass.
            lse_ref[...] = jnp.where(nobody, -FLOOR, m_ref[...] + jnp.log2(some)).reshape(lse_ref.shape)


def _backward_kernel(q_tile, k_tile, flags, *refs, static: Static, segments: bool):
    refs = list(refs)
    run_ref = refs.pop(0) if segments else None
    q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, *refs = refs
    ids = (refs.pop(0), refs.pop(0)) if segments else None
    dq_ref, dk_ref, dv_ref, dq_acc, dk_acc, dv_acc = refs
    n, bk = pl.program_id(1), static.tiles.k
    flag = flags[n]
    clear = segments or (static.window is not None and static.T < static.S)

    @pl.when(n == 0)
    def _():
        dk_acc[...] = jnp.zeros(dk_acc.shape, jnp.float32)
        dv_acc[...] = jnp.zeros(dv_acc.shape, jnp.float32)

    @pl.when((flag & FIRST) != 0)
    def _():
        dq_acc[...] = jnp.zeros(dq_acc.shape, jnp.float32)

    def body(masked: bool) -> None:
        q, k, v, do, lse, delta = (_tile(ref, static) for ref in (q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref))
        s, slope = _scores(k, q, static)  # [..., bk, R]
        p = jnp.exp2(s - lse)
        dp = _dot(v, do, NT)
        if masked:
            mask = _mask(s.shape, q_tile[n], k_tile[n], ids and _ids(*ids, static), static)
            p = jnp.where(mask, p, 0)
            if clear:
                dp, k = jnp.where(mask, dp, 0), jnp.where(_seen(mask), k, 0)
                slope = None if slope is None else jnp.where(mask, slope, 0)
        ds = p * (dp - delta)
        ds = (ds if slope is None else ds * slope).astype(q.dtype)
        keys = pl.ds(pl.multiple_of(k_tile[n] * bk, bk), bk)
        at = (keys, slice(None)) if static.tiles.heads == 1 else (slice(None), keys, slice(None))
        dv_acc[at] += _dot(p.astype(do.dtype), do, NN)
        dk_acc[at] += _dot(ds, q, NN)
        dq_acc[...] += _dot(ds, k, TN)

    run = None if run_ref is None else run_ref[pl.program_id(0), n] != 0
    _by_kind(flag, run, static, body)

    @pl.when((flag & LAST) != 0)
    def _():
        dq_ref[...] = (dq_acc[...] * static.scale).reshape(dq_ref.shape).astype(dq_ref.dtype)

    @pl.when(n == pl.num_programs(1) - 1)
    def _():
        dk_ref[...] = (dk_acc[...] * static.scale).reshape(dk_ref.shape).astype(dk_ref.dtype)
        dv_ref[...] = dv_acc[...].reshape(dv_ref.shape).astype(dv_ref.dtype)


def _specs(static: Static, G: int, D: int, S: int) -> dict[str, pl.BlockSpec]:
    """Blocks by name. Index maps get the grid's (head, tile) and the prefetched tables."""
    h, bq, bk = static.tiles
    at_q = lambda g, n, q_tile, *_: (g, 0, q_tile[n], 0)
    at_row = lambda g, n, q_tile, *_: (g, q_tile[n], 0, 0)
    return {
        "q": pl.BlockSpec((h, G, bq, D), at_q),
        "head gate": pl.BlockSpec((h, G, bq, 1), at_q),
        "k": pl.BlockSpec((h, bk, D), lambda g, n, q_tile, k_tile, *_: (g, k_tile[n], 0)),
        "row": pl.BlockSpec((h, 1, 1, G * bq), at_row),
        "key ids": pl.BlockSpec((h, 1, 1, bk), lambda g, n, q_tile, k_tile, *_: (g, k_tile[n], 0, 0)),
        "all keys": pl.BlockSpec((h, S, D), lambda g, n, *_: (g, 0, 0)),
    }


class Segments(NamedTuple):
    """Segment ids as the kernels read them.

    Attributes:
        q: [heads, query tiles, 1, R]. k: [heads, key tiles, 1, bk].
        run: [heads, tiles of the plan], 0 where a tile's queries and keys share no segment.
    """

    q: Array
    k: Array
    run: Array


def _call(
    kernel: Any,
    static: Static,
    arrays: list[tuple[Array, Any]],
    outs: list[tuple[Any, Any]],
    scratch: list,
    **more: Any,
) -> list[Array]:
    """`pallas_call` over (heads, visible tiles); `arrays` and `outs` with their blocks."""
    segments, tables = more.pop("segments"), [jnp.asarray(column) for column in static.plan()]
    specs = more.pop("specs")
    if segments is not None:
        tables.append(segments.run)
        arrays = [*arrays, (segments.q, specs["row"]), (segments.k, specs["key ids"])]
    heads = arrays[0][0].shape[0] // static.tiles.heads
    lead = () if static.tiles.heads == 1 else (static.tiles.heads,)
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(tables),
        grid=(heads, tables[0].shape[0]),
        in_specs=[block for _, block in arrays],
        out_specs=[block for _, block in outs],
        scratch_shapes=[pltpu.VMEM((*lead, *shape), jnp.float32) for shape in scratch],
    )
    params = pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES)
    run = pl.pallas_call(
        functools.partial(kernel, static=static, segments=segments is not None),
        out_shape=[shape for shape, _ in outs],
        grid_spec=grid,
        compiler_params=params,
        interpret=static.interpret,
        **more,
    )
    return run(*tables, *(array for array, _ in arrays))


def forward(
    q: Array, k: Array, v: Array, gate: Array | None, segments: Segments | None, static: Static, *, residuals: bool
) -> tuple[Array, ...]:
    """(o,) or, with `residuals`, (o, ungated o, log-sum-exp [heads, query tiles, 1, R] in units of log2).

    Args:
        q: [heads, G, T, D], k and v: [heads, S, D], gate: [heads, G, T, D or 1]; T and S padded to whole tiles.
    """
    heads, G, T, D = q.shape
    bq, R = static.tiles.q, G * static.tiles.q
    specs = _specs(static, G, D, k.shape[1])
    arrays = [(q, specs["q"]), (k, specs["k"]), (v, specs["k"])]
    if gate is not None:
        arrays.append((gate, specs["q" if gate.shape[-1] == D else "head gate"]))
    out = (jax.ShapeDtypeStruct(q.shape, q.dtype), specs["q"])
    outs = [out, out] if residuals and gate is not None else [out]
    if residuals:
        outs.append((jax.ShapeDtypeStruct((heads, T // bq, 1, R), jnp.float32), specs["row"]))
    kernel = functools.partial(_forward_kernel, gated=gate is not None, residuals=residuals)
    scratch = [(1, R), (1, R), (D, R)]
    found = _call(kernel, static, arrays, outs, scratch, segments=segments, specs=specs, name="attention_forward")
    if not residuals:
        return (found[0],)
    return (found[0], found[0], found[1]) if gate is None else tuple(found)


def backward(
    q: Array, k: Array, v: Array, do: Array, lse: Array, delta: Array, segments: Segments | None, static: Static
) -> tuple[Array, Array, Array]:
    """(dq, dk, dv), in one pass over the tiles of the forward one.

    Args:
        do: cotangent of the ungated output, as q. lse, delta: [heads, query tiles, 1, R].
    """
    G, D = q.shape[1], q.shape[3]
    S, R = k.shape[1], G * static.tiles.q
    specs = _specs(static, G, D, S)
    blocks = ("q", "k", "k", "q", "row", "row")
    arrays = [(x, specs[block]) for x, block in zip((q, k, v, do, lse, delta), blocks, strict=True)]
    outs = [
        (jax.ShapeDtypeStruct(x.shape, x.dtype), specs[block])
        for x, block in ((q, "q"), (k, "all keys"), (v, "all keys"))
    ]
    scratch = [(R, D), (S, D), (S, D)]
    found = _call(
        _backward_kernel, static, arrays, outs, scratch, segments=segments, specs=specs, name="attention_backward"
    )
    return tuple(found)
