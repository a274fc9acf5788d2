"""The backward pass of the linear cross-entropy on Mosaic TPU: two kernels, each with the logits' gradients of a tile.

Math      ds = ((1 + 2 z_loss lse) exp(s - m) / l - [v = target]) dloss cap'(s);  dh = ds w;  dw = ds^T h
Tiling    dh: grid (blocks of rows, blocks of the vocabulary); dw: the other way round. Both compute the logits of a
          tile again, [block_v, block_n], whose gradients follow from the forward pass's logsumexp.

              dh    vocabulary ->  ██▞   one row of tiles after the other: sums over the vocabulary
                                   ██▞
              dw    rows ->        ██    one column after the other: sums over the rows; ▞ masked past the vocabulary

          dh transposes the gradients of a tile for its product, 128 rows at a time; dw takes them as they are.
State     the float32 sums of one block, [block_n, M] or [block_v, M], written after its last tile; one tile of logits
          and its gradients in the inputs' dtype.
Traffic   dh reads w once per block of rows, dw reads h once per block of the vocabulary; the rest once. 8 N M V FLOPs:
          each kernel has two products. One kernel for both would save one of four, and read and write dh or dw in every
          step.
Limits    those of the forward kernel.
Source    that of the forward kernel.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dantinox.kernels.cost import Cost
from dantinox.kernels.mosaic_tpu import in_32_bits
from dantinox.kernels.ops.linear_cross_entropy.pallas_tpu.common import (
    Config,
    Ref,
    RowRefs,
    call_kernel,
    dot_f32,
    for_each_tile,
    logit_gradients,
    rows_of_w,
    store_logits,
    strips,
    subtiles,
)

Array = jax.Array


def dh_kernel(
    h_ref: Ref,
    w_ref: Ref,
    max_ref: Ref,
    dlse_ref: Ref,
    dloss_ref: Ref,
    targets_ref: Ref,
    dh_ref: Ref,
    s_ref: Ref,
    ds_ref: Ref,
    acc_ref: Ref,
    *,
    config: Config,
) -> None:
    """Add one tile of the vocabulary to dh of its rows."""
    v_block, rows = pl.program_id(1), RowRefs(max_ref, dlse_ref, dloss_ref, targets_ref)

    @pl.when(v_block == 0)
    def init_state() -> None:
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def add_tile(masked: bool) -> None:
        for n in strips(config):
            store_logits(s_ref, w_ref, h_ref, n, config.softcap)
            for tile in subtiles(config, v_block, n):
                ds = logit_gradients(config, tile, s_ref[tile.v, n], rows, masked=masked)
                ds_ref[n, tile.v] = ds.T.astype(ds_ref.dtype)
        acc_ref[...] += dot_f32(ds_ref[...], rows_of_w(config, w_ref, v_block, masked=masked), (1, 0))

    for_each_tile(config, v_block, add_tile)

    @pl.when(v_block == config.num_v_blocks - 1)
    def write_dh() -> None:
        dh_ref[...] = acc_ref[...].astype(dh_ref.dtype)


def dw_kernel(
    h_ref: Ref,
    w_ref: Ref,
    max_ref: Ref,
    dlse_ref: Ref,
    dloss_ref: Ref,
    targets_ref: Ref,
    dw_ref: Ref,
    s_ref: Ref,
    ds_ref: Ref,
    acc_ref: Ref,
    *,
    config: Config,
) -> None:
    """Add one block of rows to dw of its words; those past the vocabulary reach no word of it."""
    v_block, rows = pl.program_id(0), RowRefs(max_ref, dlse_ref, dloss_ref, targets_ref)

    @pl.when(pl.program_id(1) == 0)
    def init_state() -> None:
        acc_ref[...] = jnp.zeros_like(acc_ref)

    for n in strips(config):
        store_logits(s_ref, w_ref, h_ref, n, config.softcap)
        for tile in subtiles(config, v_block, n):
            ds = logit_gradients(config, tile, s_ref[tile.v, n], rows, masked=False)
            ds_ref[tile.v, n] = ds.astype(ds_ref.dtype)
    acc_ref[...] += dot_f32(ds_ref[...], h_ref[...], (1, 0))

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def write_dw() -> None:
        dw_ref[...] = acc_ref[...].astype(dw_ref.dtype)


@in_32_bits
def backward(
    h: Array, w: Array, targets: Array, row_max: Array, dlse: Array, dloss: Array, config: Config
) -> tuple[Array, Array]:
    """Return (dh, dw).

    Args:
        h: [N, M], whole blocks of rows; zeros in rows that take no part.
        w: [V, M].
        targets: [1, N] int32; -1 in rows that take no part.
        row_max: maxima m of the logits, [1, N] float32.
        dlse: gradient of the logsumexps over the sums l of exponentials, [1, N] float32; 0 in rows that take no part.
        dloss: gradient of the losses, [1, N] float32; 0 in rows that take no part.
        config: static parameters.
    """
    (N, M), V, dtype = h.shape, config.V, h.dtype
    block_n, block_v = config.sizes.block_n, config.sizes.block_v
    num_n_blocks, num_v_blocks = N // block_n, config.num_v_blocks
    operands = [h, w, row_max, dlse, dloss, targets]
    logits = pltpu.VMEM((block_v, block_n), jnp.float32)
    h_spec = pl.BlockSpec((block_n, M), lambda n, v: (n, 0))
    w_spec = pl.BlockSpec((block_v, M), lambda n, v: (v, 0))
    row_spec = pl.BlockSpec((1, block_n), lambda n, v: (0, n))
    (dh,) = call_kernel(
        dh_kernel,
        config,
        (num_n_blocks, num_v_blocks),
        [h_spec, w_spec, *[row_spec] * 4],
        [h_spec],
        [(h.shape, dtype)],
        [logits, pltpu.VMEM((block_n, block_v), dtype), pltpu.VMEM((block_n, M), jnp.float32)],
        operands,
        Cost(4 * N * M * V, dtype.itemsize * (2 * h.size + V * M * num_n_blocks), N * V),
        "linear_cross_entropy_dh",
    )
    h_spec = pl.BlockSpec((block_n, M), lambda v, n: (n, 0))
    w_spec = pl.BlockSpec((block_v, M), lambda v, n: (v, 0))
    row_spec = pl.BlockSpec((1, block_n), lambda v, n: (0, n))
    (dw,) = call_kernel(
        dw_kernel,
        config,
        (num_v_blocks, num_n_blocks),
        [h_spec, w_spec, *[row_spec] * 4],
        [w_spec],
        [(w.shape, dtype)],
        [logits, pltpu.VMEM((block_v, block_n), dtype), pltpu.VMEM((block_v, M), jnp.float32)],
        operands,
        Cost(4 * N * M * V, dtype.itemsize * (2 * w.size + h.size * num_v_blocks), N * V),
        "linear_cross_entropy_dw",
    )
    return dh, dw
