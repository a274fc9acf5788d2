"""The mixture of experts in a form that a CPU interprets fast: one kernel forward, one backward.

Math      that of `vjp.py`
Tiling    grid (experts); a step processes its expert's rows in tiles as `grouped_matmul/pallas_cpu/gmm.py` does. A tile
          goes through all products while it is in cache, where an accelerator runs one kernel per product:

              forward   x ─┬─ gate ─┬─ h ── y      backward   dy ─── dh ─┬─ dgate ─┬─ dx    x^T dgate: dw_gate
                           └─  up  ─┘                       gate, up ────┼─  dup  ─┘        x^T dup: dw_up
                                                                         └─  p h            (p h)^T dy: dw_down
State     backward: the float32 sums of an expert's three dw, and of the gradients of its biases.
Traffic   forward reads x, p and writes y, and gate and up if they are residuals; backward reads x, dy, gate, up, p and
          writes dx, dp. h, dgate, dup and p h never leave the cache: of the eight [R, F] arrays that separate products
          would write, four remain, and XLA updates an array in place on one thread. 6 N M F FLOPs, backward 12 N M F.
Limits    float32, bfloat16, float16 (computed in float32); any N, M, F, E. One derivative.
Source    that of `grouped_matmul/pallas_cpu/gmm.py`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from dantinox.kernels.ops.grouped_matmul.common import dot_f32
from dantinox.kernels.ops.grouped_matmul.group_metadata import zero_unassigned_rows
from dantinox.kernels.ops.grouped_matmul.pallas_cpu.gmm import (
    call_interpreted,
    compact_nonempty_groups,
    for_each_row_tile,
    group_offsets,
    limit_tile_sizes,
    load_rows_masked,
    store_rows,
)
from dantinox.kernels.ops.moe.biases import add_tiles, sum_rows
from dantinox.kernels.ops.moe.swiglu import Activation, swiglu, swiglu_bwd
from dantinox.kernels.ops.moe.vjp import ExpertsGrads, ExpertsOutput, ExpertWeights
from dantinox.kernels.tuning import tunable

__all__ = ["backward", "forward", "implementation", "sum_rows"]
Array = jax.Array
Ref = Any

# Rows per tile. Without sizes below 128 the gradients of 8 experts of 256 x 1024 take 1.07 times as long; without sizes
# below 32 those of 8 experts with 16 rows each take 1.8 times as long.
TILE_SIZES = (512, 128, 16)
implementation = "pallas"


@tunable
def tile_sizes(R: int, E: int) -> tuple[int, ...]:
    """Return the rows per tile, decreasing, for R rows of E experts."""
    return limit_tile_sizes(TILE_SIZES, R, E)


def forward(
    x: Array,
    ws: ExpertWeights,
    router_weights: Array,
    group_sizes: Array,
    *,
    save_residuals: bool,
    activation: Activation,
) -> ExpertsOutput:
    """See `vjp.ExpertsBackend`."""
    (R, M), F, dtype = x.shape, ws.w_gate.shape[2], x.dtype
    has_bias = [b is not None for b in (ws.b_gate, ws.b_up)]

    def experts_kernel(
        groups_ref: Ref,
        offsets_ref: Ref,
        w_gate_ref: Ref,
        w_up_ref: Ref,
        w_down_ref: Ref,
        x_ref: Ref,
        router_weights_ref: Ref,
        *refs: Ref,
    ) -> None:
        e = groups_ref[pl.program_id(0)]
        w_gate, w_up, w_down = w_gate_ref[e], w_up_ref[e], w_down_ref[e]
        bias_refs, out_refs = refs[: sum(has_bias)], refs[sum(has_bias) :]
        biases = [ref[e][None].astype(jnp.float32) for ref in bias_refs]

        def run_tile(rows: Any, row_mask: Array | None, _: None) -> None:
            x = x_ref[rows]
            gate, up = dot_f32(x, w_gate, (1, 0)), dot_f32(x, w_up, (1, 0))
            gate, up = add_tiles((gate, up), has_bias, biases)
            y = dot_f32(swiglu(gate, up, activation).astype(dtype), w_down, (1, 0)) * router_weights_ref[rows][:, None]
            for ref, value in zip(out_refs, (y, gate, up), strict=False):
                store_rows(ref, rows, row_mask, value)

        _for_each_expert_tile(R, offsets_ref, e, run_tile)

    outs = [jax.ShapeDtypeStruct((R, width), dtype) for width in ((M, F, F) if save_residuals else (M,))]
    groups, num_groups = compact_nonempty_groups(group_sizes)
    operands = [groups, group_offsets(group_sizes), *ws[:3], x, router_weights]
    operands += [b for b in (ws.b_gate, ws.b_up) if b is not None]
    y, *residuals = call_interpreted(experts_kernel, operands, outs, num_groups, 6 * R * M * F, "experts")
    # A loop over unassigned rows in the kernel would take as long as a single token.
    return ExpertsOutput(zero_unassigned_rows(y, group_sizes), *residuals)


def backward(
    x: Array,
    dy: Array,
    ws: ExpertWeights,
    router_weights: Array,
    group_sizes: Array,
    gate: Array,
    up: Array,
    *,
    activation: Activation,
) -> ExpertsGrads:
    """See `vjp.ExpertsBackend`."""
    (R, M), (E, _, F), dtype = x.shape, ws.w_gate.shape, x.dtype
    has_bias = [b is not None for b in (ws.b_gate, ws.b_up)]

    def experts_bwd_kernel(
        offsets_ref: Ref,
        w_gate_ref: Ref,
        w_up_ref: Ref,
        w_down_ref: Ref,
        x_ref: Ref,
        dy_ref: Ref,
        router_weights_ref: Ref,
        gate_ref: Ref,
        up_ref: Ref,
        dx_ref: Ref,
        drouter_weights_ref: Ref,
        *dw_refs: Ref,
    ) -> None:
        e = pl.program_id(0)
        w_gate, w_up, w_down = w_gate_ref[e], w_up_ref[e], w_down_ref[e]

        def run_tile(rows: Any, row_mask: Array | None, dws: Sequence[Array]) -> list[Array]:
            row_refs = (x_ref, dy_ref, router_weights_ref, gate_ref, up_ref)
            x, dy, router_weight, gate, up = (load_rows_masked(ref, rows, row_mask) for ref in row_refs)
            grads = swiglu_bwd(dot_f32(dy, w_down, (1, 1)), gate, up, router_weight[:, None], activation)
            dgate, dup, weighted_h = (value.astype(dtype) for value in grads[:3])
            store_rows(dx_ref, rows, row_mask, dot_f32(dgate, w_gate, (1, 1)) + dot_f32(dup, w_up, (1, 1)))
            store_rows(drouter_weights_ref, rows, row_mask, jnp.sum(grads.drouter_weight, axis=1))
            products = [dot_f32(x, dgate, (0, 0)), dot_f32(x, dup, (0, 0)), dot_f32(weighted_h, dy, (0, 0))]
            products += [jnp.sum(value, axis=0) for value, has in zip(grads[:2], has_bias, strict=True) if has]
            return [dw + product for dw, product in zip(dws, products, strict=True)]

        zeros = [jnp.zeros(ref.shape[1:], jnp.float32) for ref in dw_refs]
        for ref, dw in zip(dw_refs, _for_each_expert_tile(R, offsets_ref, e, run_tile, zeros), strict=True):
            ref[e] = dw.astype(dtype)

    outs = [jax.ShapeDtypeStruct((R, M), dtype), jax.ShapeDtypeStruct((R,), jnp.float32)]
    outs += [jax.ShapeDtypeStruct(w.shape, dtype) for w in ws if w is not None]
    operands = [group_offsets(group_sizes), *ws[:3], x, dy, router_weights, gate, up]
    dx, drouter_weights, *dws = call_interpreted(
        experts_bwd_kernel, operands, outs, E, 12 * R * M * F, "experts_backward"
    )
    dx, dbs = zero_unassigned_rows(dx, group_sizes), iter(dws[3:])
    grads = ExpertWeights(*dws[:3], *(next(dbs) if has else None for has in has_bias))
    return ExpertsGrads(dx, grads, zero_unassigned_rows(drouter_weights, group_sizes))


def _for_each_expert_tile(R: int, offsets_ref: Ref, e: Array, run_tile: Callable[..., Any], carry: Any = None) -> Any:
    """Loop over the tiles of expert e; large tiles may be partial, since a mask costs less than a product."""
    sizes = tile_sizes(R, offsets_ref.shape[0] - 1)
    return for_each_row_tile(R, offsets_ref[e], offsets_ref[e + 1], sizes, run_tile, carry, full_large_tiles=False)
