"""The forward pass of the linear cross-entropy on Mosaic TPU: an online logsumexp over tiles of the vocabulary.

Math      s = cap(h w^T);  lse = log sum_v exp(s);  loss = lse - s[target] + z_loss lse^2
Tiling    grid (blocks of rows, blocks of the vocabulary), the second one after the other. A tile holds the logits of
          its rows as columns, [block_v, block_n], so that sums over the vocabulary are sums of registers.

              vocabulary ->   bv   bv   bv   V
              bn rows         █    █    █    ▞        █ every logit   ▞ masked past the vocabulary
              bn rows         █    █    █    ▞

State     running maximum, sum of exponentials and target's logit of the rows, float32 [1, block_n]; one tile of logits.
Traffic   reads h once and w once per block of rows; writes two numbers per row. 2 N M V FLOPs. With all logits it
          writes and reads N V float32 numbers more.
Limits    float32, bfloat16, and float16, which is computed in float32; any N and V. A block has all M columns, which
          limits M by VMEM. Rows are padded to whole blocks with rows that take no part.
Source    Milakov and Gimelshein, Online normalizer calculation for softmax (arXiv:1805.02867); Wijmans et al., Cut Your
          Losses in Large-Vocabulary Language Models (arXiv:2411.09009).
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
    call_kernel,
    for_each_tile,
    store_logits,
    strips,
    subtiles,
)

Array = jax.Array


def fwd_kernel(
    h_ref: Ref,
    w_ref: Ref,
    targets_ref: Ref,
    loss_ref: Ref,
    max_out_ref: Ref,
    sum_out_ref: Ref,
    s_ref: Ref,
    max_ref: Ref,
    sum_ref: Ref,
    target_logit_ref: Ref,
    *,
    config: Config,
) -> None:
    """Add one tile of the vocabulary to the state of its rows; write the losses after the last one."""
    v_block = pl.program_id(1)

    @pl.when(v_block == 0)
    def init_state() -> None:
        max_ref[...] = jnp.full_like(max_ref, -jnp.inf)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        target_logit_ref[...] = jnp.zeros_like(target_logit_ref)

    def add_tile(masked: bool) -> None:
        for n in strips(config):
            store_logits(s_ref, w_ref, h_ref, n, config.softcap)
            old_max = new_max = max_ref[:, n]
            for tile in subtiles(config, v_block, n):
                s = s_ref[tile.v, n]
                if masked:  # past the vocabulary, w holds anything
                    s = jnp.where(tile.in_vocabulary(config.V, s.shape[1]), s, -jnp.inf)
                    s_ref[tile.v, n] = s
                new_max = jnp.maximum(new_max, jnp.max(s, axis=0, keepdims=True))
            total = sum_ref[:, n] * jnp.exp(old_max - new_max)
            target_logit = target_logit_ref[:, n]
            for tile in subtiles(config, v_block, n):
                s = s_ref[tile.v, n]
                total += jnp.sum(jnp.exp(s - new_max), axis=0, keepdims=True)
                is_target = tile.is_target(targets_ref[:, n])
                target_logit += jnp.sum(jnp.where(is_target, s, 0.0), axis=0, keepdims=True)
            max_ref[:, n], sum_ref[:, n], target_logit_ref[:, n] = new_max, total, target_logit

    for_each_tile(config, v_block, add_tile)

    @pl.when(v_block == config.num_v_blocks - 1)
    def write_losses() -> None:
        lse = max_ref[...] + jnp.log(sum_ref[...])
        loss = lse - target_logit_ref[...]
        if config.z_loss:
            loss += config.z_loss * lse * lse
        loss_ref[...] = jnp.where(targets_ref[...] >= 0, loss, 0.0)
        max_out_ref[...], sum_out_ref[...] = max_ref[...], sum_ref[...]


@in_32_bits
def forward(h: Array, w: Array, targets: Array, config: Config) -> tuple[Array, Array, Array]:
    """Return the losses, and the maxima and sums of exponentials of the logits, [1, N].

    The logsumexp is in two parts, because the rounding error of one number would scale every weight of the row.

    Args:
        h: [N, M], whole blocks of rows.
        w: [V, M].
        targets: [1, N] int32; -1 in rows that take no part.
        config: static parameters.
    """
    (N, M), V = h.shape, config.V
    block_n, block_v = config.sizes.block_n, config.sizes.block_v
    row_spec = pl.BlockSpec((1, block_n), lambda n, v: (0, n))
    row_scratch = pltpu.VMEM((1, block_n), jnp.float32)
    moved = h.dtype.itemsize * (h.size + V * M * (N // block_n)) + 16 * N
    loss, row_max, total = call_kernel(
        fwd_kernel,
        config,
        (N // block_n, config.num_v_blocks),
        [
            pl.BlockSpec((block_n, M), lambda n, v: (n, 0)),
            pl.BlockSpec((block_v, M), lambda n, v: (v, 0)),
            row_spec,
        ],
        [row_spec] * 3,
        [((1, N), jnp.float32)] * 3,
        [pltpu.VMEM((block_v, block_n), jnp.float32), *[row_scratch] * 3],
        [h, w, targets],
        Cost(2 * N * M * V, moved, N * V),
        "linear_cross_entropy",
    )
    return loss, row_max, total
