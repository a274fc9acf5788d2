"""Attention on Mosaic TPU, and interpreted on a CPU: flash attention over the visible tiles only.

Math      s = cap(scale q k^T) log2(e);  p = 2^(s - m);  o = sigmoid(gate) * sum(p v) / sum(p)
Tiling    grid (heads, visible tiles), the tiles of one query tile in a row; see `block_schedule.py` for which are
          visible, `common.py` for what happens inside one. The G query heads of a key head are packed: R = G * bq rows.

              keys ->        bk   bk   bk   bk
              G x bq rows    ▞    ░    ░    ░       ▞ masked
              G x bq rows    █    ▞    ░    ░       █ interior: no mask is computed
              G x bq rows    ▞    █    ▞    ░       ░ not in the grid

State     m, l [1, R] and the output [D, R] of one query tile, in float32; they leave the chip when they are done.
Traffic   reads q, gate and writes o once, reads k and v once a visible tile: 2 T S_visible / bq rows of D.
          4 D FLOPs a visible pair. The naive way moves T S scores three times.
Limits    float32, bfloat16, float16; any T, S, H, K, D. ValueError comes from `dantinox.kernels.attention`.
Source    Dao, FlashAttention-2 (arXiv:2307.08691); jax's splash attention for the grid of visible tiles.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from dantinox.kernels.cost import Cost
from dantinox.kernels.ops.attention.pallas_tpu.common import FLOOR, NN, Segments, Static, Tile, block, call, dot

Array = jax.Array


def _kernel(tile: Tile) -> None:
    across, down = tile.static.pieces
    gated, residuals = "gate" in tile.refs, "max" in tile.refs

    @pl.when(tile.first)
    def _():
        tile.fill(FLOOR, "m")
        tile.fill(0, "l", "acc")

    def top(r: int, c: int, s: Array) -> None:
        tile.put("top", r, c, value=jnp.max(s, axis=-2, keepdims=True))

    @tile.phase
    def _():
        for r, c in tile.pieces():
            s = tile.scores(dot(tile.get("k", c), tile.get("q", r), NN))
            tile.put("s", r, c, value=s)
            top(r, c, s)

    tile.mask(then=top)

    @tile.phase
    def _():
        for r in range(across):
            old = tile.get("m", r)
            m = functools.reduce(jnp.maximum, (tile.get("top", r, c) for c in range(down)), old)
            decay = tile.static.exp(old - m)
            tile.put("m", r, value=m)
            tile.put("decay", r, value=decay)
            tile.put("l", r, value=decay * tile.get("l", r))
            for c in range(down):
                p = tile.static.exp(tile.get("s", r, c) - m)
                tile.put("l", r, value=tile.get("l", r) + jnp.sum(p, axis=-2, keepdims=True))
                tile.put("p", r, c, value=p)

    @tile.phase
    def _():
        tile.sum_keys("acc", "v", "p", "decay")

    @pl.when(tile.last)
    def _():
        for r in range(across):
            l = tile.get("l", r)
            nobody = l == 0
            some = jnp.where(nobody, 1.0, l)
            o = tile.get("acc", r) / some
            if residuals and gated:
                tile.put("ungated", r, value=o)
            if gated:
                o = o * jax.nn.sigmoid(tile.get("gate", r).astype(jnp.float32))
            tile.put("o", r, value=o)
            if residuals:
                tile.put("max", r, value=tile.get("m", r))
                tile.put("share", r, value=jnp.where(nobody, 0.0, 1 / some))


def forward(
    q: Array,
    k: Array,
    v: Array,
    gate: Array | None,
    segments: Segments | None,
    static: Static,
    *,
    residuals: bool,
    cost: Cost,
) -> dict[str, Array]:
    """{"o"} or, with `residuals`, {"o", "ungated", "max", "share"}: the log-sum-exp of a row in two parts, its
    largest score in units of `Static.unit` and 1 / sum. One number would carry a rounding error to every p of the row.

    Args:
        q: [heads, pieces of queries, D, rows], as o and ungated; gate: the same or [..., 1, rows], as max and share.
        k: [heads, pieces of keys, keys, D]. v: [heads, pieces of keys, D, keys].
    """
    D, tiles, (across, down) = q.shape[2], static.tiles, static.pieces
    queries, row = block(static, "q", D, tiles.rows), block(static, "q", 1, tiles.rows)
    ins = {"q": (q, "q"), "k": (k, "k"), "v": (v, "k")}
    outs = {"o": (jax.ShapeDtypeStruct(q.shape, q.dtype), queries)}
    if gate is not None:
        ins["gate"] = (gate, "q")
        if residuals:
            outs["ungated"] = outs["o"]
    if residuals:
        one_row = (jax.ShapeDtypeStruct((*q.shape[:2], 1, tiles.rows), jnp.float32), row)
        outs |= {"max": one_row, "share": one_row}
    one = (across, 1, tiles.rows)
    scratch = {
        "m": (one, jnp.float32),
        "l": (one, jnp.float32),
        "acc": ((across, D, tiles.rows), jnp.float32),
    }
    waiting = {
        "s": ((across, down, tiles.keys, tiles.rows), jnp.float32),
        "top": ((across, down, 1, tiles.rows), jnp.float32),
        "p": ((across, down, tiles.keys, tiles.rows), v.dtype),
        "decay": (one, jnp.float32),
    }
    found = call(
        _kernel,
        static,
        static.plan(joined=tiles.joined),
        ins,
        outs,
        scratch,
        waiting,
        segments=segments,
        joined=tiles.joined,
        name="attention_forward",
        cost=cost,
    )
    return {"ungated": found[0]} | dict(zip(outs, found, strict=True))
