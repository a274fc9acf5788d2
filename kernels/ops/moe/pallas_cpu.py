"""A mixture of experts as a CPU interprets it: one kernel forward, one backward.

Math      that of `vjp.py`
Tiling    grid (experts); a step walks its expert's rows in tiles as `grouped_matmul/pallas_cpu/gmm.py` does. A tile
          goes through all of the mixture while it is in cache, where an accelerator runs a kernel for each product:

              forward   x ─┬─ g ─┬─ h ── y      backward   dy ─── s ─┬─ dg ─┬─ dx      x^T dg, x^T du: dw_gate, dw_up
                           └─ u ─┘                         g, u ─────┼─ du ─┘          (p h)^T dy: dw_down
                                                                     └─ p h
State     backward: the float32 sums of an expert's three dw.
Traffic   forward reads x, p and writes y, with g and u where they are kept; backward reads x, dy, g, u, p and writes
          dx, dp. h, dg, du and p h never leave the cache: of the eight wide arrays that products alone would write,
          four are left, and XLA writes into an array in place on one thread. 6 N M F FLOPs, backward 12 N M F.
Limits    float32, bfloat16, float16; any N, M, F, E.
Source    as `grouped_matmul/pallas_cpu/gmm.py`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from dantinox.kernels.ops.grouped_matmul.common import dot
from dantinox.kernels.ops.grouped_matmul.group_metadata import zero_unassigned_rows
from dantinox.kernels.ops.grouped_matmul.pallas_cpu.gmm import bounds, busy_first, call, fitting, own, put, walk
from dantinox.kernels.ops.moe.swiglu import swiglu, swiglu_bwd

Array = jax.Array

# Rows of the tiles. With none below 128 the gradients of 8 experts of 256 x 1024 take 1.07 times as long, with none
# below 32 those of 8 experts with 16 rows each 1.8 times.
SIZES = (512, 128, 16)


def forward(x: Array, ws: Sequence[Array], p: Array, sizes: Array, *, keep: bool) -> list[Array]:
    """y [R, M]; with `keep` g and u [R, F] too. See `vjp.Mixture`."""
    (R, M), F, dtype = x.shape, ws[0].shape[2], x.dtype

    def kernel(groups: Any, starts: Any, gate_ref: Any, up_ref: Any, down_ref: Any, x_ref: Any, p_ref: Any, *outs: Any):
        e = groups[pl.program_id(0)]
        gate, up, down = gate_ref[e], up_ref[e], down_ref[e]

        def tile(rows: Any, mine: Array | None, _: None) -> None:
            x = x_ref[rows]
            g, u = dot(x, gate, (1, 0)), dot(x, up, (1, 0))
            y = dot(swiglu(g, u).astype(dtype), down, (1, 0)) * p_ref[rows][:, None]
            for ref, value in zip(outs, (y, g, u), strict=False):
                put(ref, rows, mine, value)

        _walk(R, starts, e, tile)

    shapes = [jax.ShapeDtypeStruct((R, width), dtype) for width in ((M, F, F) if keep else (M,))]
    groups, steps = busy_first(sizes)
    operands = [groups, bounds(sizes), *ws, x, p]
    y, *kept = call(kernel, operands, shapes, steps, 6 * R * M * F, "experts")
    return [
        zero_unassigned_rows(y, sizes),
        *kept,
    ]  # a loop for nobody's rows in the kernel takes as long as a single token does


def backward(
    x: Array, dy: Array, ws: Sequence[Array], p: Array, sizes: Array, g: Array, u: Array
) -> tuple[Array, list[Array], Array]:
    """dx [R, M]; dw of each of ws; dp [R]. See `vjp.Mixture`."""
    (R, M), (E, _, F), dtype = x.shape, ws[0].shape, x.dtype

    def kernel(starts: Any, *refs: Any) -> None:
        w_refs, row_refs, dx_ref, dp_ref, dw_refs = refs[:3], refs[3:8], refs[8], refs[9], refs[10:]
        e = pl.program_id(0)
        gate, up, down = (ref[e] for ref in w_refs)

        def tile(rows: Any, mine: Array | None, sums: list[Array]) -> list[Array]:
            x, dy, p, g, u = (own(ref, rows, mine) for ref in row_refs)
            dg, du, ph, sh = swiglu_bwd(dot(dy, down, (1, 1)), g, u, p[:, None])
            dg, du, ph = (each.astype(dtype) for each in (dg, du, ph))
            put(dx_ref, rows, mine, dot(dg, gate, (1, 1)) + dot(du, up, (1, 1)))
            put(dp_ref, rows, mine, jnp.sum(sh, axis=1))
            found = dot(x, dg, (0, 0)), dot(x, du, (0, 0)), dot(ph, dy, (0, 0))
            return [before + each for before, each in zip(sums, found, strict=True)]

        zeros = [jnp.zeros(ref.shape[1:], jnp.float32) for ref in dw_refs]
        for ref, value in zip(dw_refs, _walk(R, starts, e, tile, zeros), strict=True):
            ref[e] = value.astype(dtype)

    shapes = [jax.ShapeDtypeStruct((R, M), dtype), jax.ShapeDtypeStruct((R,), jnp.float32)]
    shapes += [jax.ShapeDtypeStruct(w.shape, dtype) for w in ws]
    operands = [bounds(sizes), *ws, x, dy, p, g, u]
    dx, dp, *dws = call(kernel, operands, shapes, E, 12 * R * M * F, "experts_backward")
    return zero_unassigned_rows(dx, sizes), dws, zero_unassigned_rows(dp, sizes)


def _walk(R: int, starts: Any, e: Array, tile: Callable[..., Any], carry: Any = None) -> Any:
    """The rows of expert e. A mask costs little beside three to six products: large tiles need not be full."""
    tiles = fitting(SIZES, R, starts.shape[0] - 1)
    return walk(R, starts[e], starts[e + 1], tiles, tile, carry, large_full=False)
