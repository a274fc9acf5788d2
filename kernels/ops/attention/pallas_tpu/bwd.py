"""The gradients of attention on Mosaic TPU, and interpreted on a CPU: dq, dk and dv in one pass over the visible tiles.

Math      with do' = do sigmoid(gate) and delta = rowsum(do' o'), o' the ungated output:
          p = 2^(s - max) share;  dv = p^T do';  ds = p (do' v^T - delta);  dq = scale ds k;  dk = scale ds^T q
Tiling    the grid of `fwd.py`, once for each span of keys:

              keys ->        span 0      span 1
              G x bq rows    ▞    ░    ░    ░       ▞ masked
              G x bq rows    █    ▞    ░    ░       █ interior
              G x bq rows    ▞    █    ▞    ░       ░ not in the grid
              G x bq rows    ░    ▞  | █    ▞       | dq of both spans is added at the end

State     dq [D, R] of one query tile, dk and dv [D, span] of all keys of the span, in float32. The sum over the G heads
          is part of the product. Nothing is written twice: no atomics, and bit-equal from run to run.
Traffic   reads q, do and three numbers a row once a span, k (both ways) and v once a visible tile. 10 D FLOPs a visible
          pair; two kernels, one for dq and one for dk and dv, would take 14 D and read everything twice.
Limits    as the forward kernel.
Source    Dao, FlashAttention-2 (arXiv:2307.08691), algorithm 2.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from dantinox.kernels.cost import Cost
from dantinox.kernels.ops.attention.pallas_tpu.common import NN, NT, Segments, Static, Tile, block, call, dot, spans

Array = jax.Array
EXACT_ROWS = 32, 128  # at least, at most


def _kernel(tile: Tile, first_key_tile: int) -> None:
    static = tile.static
    across, _ = static.pieces
    # Compiled, the sums stay on the chip for the whole span; interpreted, they are blocks of the output.
    at = () if static.interpret else (tile.j - first_key_tile,)

    @pl.when(tile.fresh if static.interpret else tile.n == 0)
    def _():
        tile.fill(0, "dk acc", "dv acc")

    @pl.when(tile.first)
    def _():
        tile.fill(0, "dq acc")

    @tile.phase
    def _():
        for r, c in tile.pieces():
            tile.put("s", r, c, value=tile.scores(dot(tile.get("k", c), tile.get("q", r), NN)))
            tile.put("dp", r, c, value=dot(tile.get("v", c), tile.get("do", r), NN) - tile.get("delta", r))

    tile.mask(then=lambda r, c, s: None)

    @tile.phase
    def _():
        few = min(64, static.tiles.keys)  # keys at a time, or registers run out
        parts = [()] if static.interpret else [(pl.ds(i, few),) for i in range(0, static.tiles.keys, few)]
        for r, c in tile.pieces():
            for at_once in parts:
                piece = (r, c, *at_once)
                s = tile.get("s", *piece)
                p = static.exp(s - tile.get("max", r)) * tile.get("share", r)
                ds = p * tile.get("dp", *piece)
                if static.softcap is not None:
                    t = s * (1 / (static.softcap * static.unit))
                    ds = ds * (1 - jnp.minimum(t * t, 1))  # masked scores are below -cap
                tile.put("p", *piece, value=p)
                tile.put("ds", *piece, value=ds)

    for name, a, b in (("dv acc", "do", "p"), ("dk acc", "q", "ds")):

        @tile.phase
        def _(name: str = name, a: str = a, b: str = b):
            for r, c in tile.pieces():
                acc = tile.get(name, *at, c) + _over_rows(tile.get(a, r), tile.get(b, r, c), static)
                tile.put(name, *at, c, value=acc)

    @tile.phase
    def _():
        tile.sum_keys("dq acc", "k^T", "ds")

    @pl.when(tile.last)
    def _():
        for r in range(across):
            tile.put("dq", r, value=tile.get("dq acc", r) * static.scale)

    if not static.interpret:

        @pl.when(tile.n == pl.num_programs(1) - 1)
        def _():
            for name, scale in (("dk", static.scale), ("dv", 1)):
                ref = tile.refs[name]
                ref[...] = (tile.refs[f"{name} acc"][...] * scale).reshape(ref.shape).astype(ref.dtype)


def _over_rows(a: Array, b: Array, static: Static) -> Array:
    """a b^T. A CPU's product adds up row after row in one float32, so it gets few at a time: T / 16, since in plain
    jnp too the errors grow with T."""
    rows = a.shape[-1]
    fewest, most = EXACT_ROWS
    step = min(max(static.T // 16, fewest), most) if static.interpret else rows
    parts = [dot(a[..., i : i + step], b[..., i : i + step], NT) for i in range(0, rows, step)]
    return functools.reduce(jnp.add, parts)


def backward(
    q: Array,
    k: Array,
    v: Array,
    do: Array,
    largest: Array,
    share: Array,
    delta: Array,
    segments: Segments | None,
    static: Static,
    *,
    cost: Cost,
) -> tuple[Array, Array, Array]:
    """(dq as q, dk and dv [heads, pieces of keys, D, keys]).

    Args:
        q, do: [heads, pieces of queries, D, rows]; do is the cotangent of the ungated output.
        k, v: [heads, pieces of keys, keys, D]. largest, share, delta: [heads, pieces of queries, 1, rows].
    """
    D, tiles, (across, down) = q.shape[2], static.tiles, static.pieces
    ins = {name: (x, "q") for name, x in {"q": q, "do": do, "max": largest, "share": share, "delta": delta}.items()}
    ins |= {name: (x, "k") for name, x in {"k": k, "v": v, "k^T": k.swapaxes(-1, -2)}.items()}
    piece = (across, down, tiles.keys, tiles.rows)
    waiting = {
        "s": (piece, jnp.float32),
        "dp": (piece, jnp.float32),
        "p": (piece, q.dtype),
        "ds": (piece, q.dtype),
    }
    plans = {span: static.plan(span) for span in spans(static)}
    dq, dks, dvs = None, [], []
    for span, visible in plans.items():
        low, high = span or (0, k.shape[1] // down)
        first, last = int(visible.q.min()) * across, (int(visible.q.max()) + 1) * across
        partial = q.dtype if span is None else jnp.float32
        queries = jax.ShapeDtypeStruct((q.shape[0], last - first, *q.shape[2:]), partial)
        outs = {"dq": (queries, block(static, "q", D, tiles.rows, first=first // across))}
        scratch = {"dq acc": ((across, D, tiles.rows), jnp.float32)}
        shape = ((high - low) * down, D, tiles.keys)
        for name in ("dk", "dv"):
            if static.interpret:
                sums = jax.ShapeDtypeStruct((q.shape[0], *shape), jnp.float32)
                outs[f"{name} acc"] = (sums, block(static, "k", D, tiles.keys, first=low))
            else:
                every = pl.BlockSpec((tiles.heads, *shape), lambda g, n, *_: (g, 0, 0, 0))
                outs[name] = (jax.ShapeDtypeStruct((q.shape[0], *shape), k.dtype), every)
                scratch[f"{name} acc"] = ((high - low, down, D, tiles.keys), jnp.float32)
        found, dk, dv = call(
            lambda tile, low=low: _kernel(tile, low),
            static,
            visible,
            ins,
            outs,
            scratch,
            waiting,
            segments=segments,
            name="attention_backward",
            cost=cost.scaled(len(visible) / sum(map(len, plans.values()))),
        )
        if span is None:
            dq = found
        else:
            dq = jnp.zeros(q.shape, jnp.float32) if dq is None else dq
            dq = dq.at[:, first:last].add(found)
        dks.append(dk)
        dvs.append(dv)
    one = lambda parts: parts[0] if len(parts) == 1 else jnp.concatenate(parts, 1)
    dk, dv = one(dks), one(dvs)
    if static.interpret:
        dk, dv = (dk * static.scale).astype(k.dtype), dv.astype(v.dtype)
    return dq.astype(q.dtype), dk, dv
