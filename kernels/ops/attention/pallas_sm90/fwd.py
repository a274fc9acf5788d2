"""Attention on Hopper, forward: flash attention with two ping-pong consumer warpgroups and one producer warpgroup.

Math      s = cap(scale q k^T) log2(e);  p = 2^(s - m);  o = sigmoid(gate) * sum(p v) / sum(p);  lse = m + log2(sum(p))
Tiling    The grid is (H, query blocks, B), one thread block each; a query block has 2 x block_q rows, block_q per
          consumer warpgroup. The first query of a warpgroup determines its key range: blocks outside it are neither
          loaded nor computed, and the loop is split in three so that only the edges apply a mask. With a window the
          work is linear in S.

              keys ->        k    k    k    k    k
              warpgroup 0    ▞    █    ▞    ░    ░       ▞ left edge, diagonal: masked
              warpgroup 1    ░    ▞    █    ▞    ░       █ interior: no mask is computed
              (next block)   ░    ░    ▞    █    ▞       ░ neither loaded nor computed

          The producer loads q once, then K and V blocks by TMA into ring buffers of stages. Each stage has a full and
          an empty barrier, and K and V have their own: the next K is loaded while V is still in use. The gate is
          loaded last, into the stages of the K blocks that would follow.

              warpgroup 0    q k^T ....softmax....  p v, q k^T ....softmax....
              warpgroup 1          q k^T ....softmax....       p v, q k^T ...    they multiply in turns

State     Per warpgroup m and l [block_q] and the output [block_q, D], in float32 registers.
Traffic   Reads q and gate and writes o once; reads K and V once per query block and head. The heads of a group run at
          the same time, so most of K and V comes from L2. 4 D FLOPs per visible pair.
Limits    bfloat16, float16; D a multiple of 16 up to 256, of which 64, 128 and 256 were tuned. T and S of the
          arrays are multiples of 8; the config has the lengths before padding. Segment ids in any order; where they
          ascend, blocks of other segments are skipped like those outside the window, and blocks of one segment apply
          no segment mask.
          Soft caps from 2^-40 to 2^40. Scores lose precision beyond 2^22, where a product and its rounding differ by 1.
Source    Shah et al., FlashAttention-3 (arXiv:2407.08608), for the ping-pong schedule of the two warpgroups.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dantinox.kernels.ops.attention import segment_ids
from dantinox.kernels.ops.attention.pallas_sm90.block_sizes import fwd_block_sizes
from dantinox.kernels.ops.attention.pallas_sm90.common import (
    COMPUTE_WARPGROUPS,
    Ref,
    Segments,
    Sm90AttentionConfig,
    split_refs,
    wgmma_smem,
)
from dantinox.kernels.ops.attention.pallas_sm90.fwd_kernel import (
    ForwardKernel,
    FwdInputs,
    FwdOutputs,
    FwdScratch,
)
from dantinox.kernels.vma import varying_shape

Array = jax.Array


def forward(
    q: Array,
    k: Array,
    v: Array,
    gate: Array | None,
    segments: Segments | None,
    config: Sm90AttentionConfig,
    *,
    residuals: bool,
    lse: bool,
) -> FwdOutputs:
    """Return the output, with `residuals` or `lse` the lse, and with `residuals` and a gate the ungated output.

    Args:
        q: queries [B, T, H, D]; T is a multiple of `common.TMA_ROWS`.
        k: keys [B, S, K, D]; S is a multiple of `common.TMA_ROWS`.
        v: values [B, S, K, D].
        gate: logits [B, T, H, D], or one per head [B, T, H, 1], or None.
        segments: (q_ids, kv_ids) int32, of the lengths before padding, or None.
        config: static parameters of the kernel.
        residuals: whether the backward pass needs lse and the ungated output.
        lse: whether the caller needs the lse.
    """
    B, T, H, D = q.shape
    sizes = fwd_block_sizes(D)
    rows = COMPUTE_WARPGROUPS * sizes.block_q
    inputs = FwdInputs(q, k, v)
    if gate is not None and gate.shape[-1] == D:
        inputs = inputs._replace(gate=gate)
    elif gate is not None:
        per_head = jax.nn.sigmoid(gate[..., 0].swapaxes(1, 2).astype(jnp.float32))
        inputs = inputs._replace(gate_per_head=jnp.pad(per_head, ((0, 0), (0, 0), (0, -T % rows))))
    if segments is not None:
        q_ids = segment_ids.pad_ids_to_block(segments[0], rows)
        kv_ids = segment_ids.pad_ids_to_block(segments[1], sizes.block_kv)
        ranges = segment_ids.kv_block_ranges(q_ids, sizes.block_q, kv_ids, sizes.block_kv)
        inputs = inputs._replace(q_ids=q_ids, kv_ids=kv_ids, segment_ranges=ranges)

    outputs = FwdOutputs(o=varying_shape(q.shape, q.dtype, q))
    if residuals or lse:
        outputs = outputs._replace(lse=varying_shape((B, H, pl.cdiv(T, rows) * rows), jnp.float32, q))
    if residuals and gate is not None:
        outputs = outputs._replace(o_ungated=outputs.o)

    stages, has_segments = sizes.stages, segments is not None
    kv_smem = wgmma_smem((stages, sizes.block_kv, D), q.dtype)
    scratch = FwdScratch(
        gate_full=plgpu.Barrier(num_barriers=COMPUTE_WARPGROUPS) if inputs.gate is not None else None,
        kv_ids_smem=plgpu.SMEM((stages, sizes.block_kv), jnp.int32) if has_segments else None,
        k_empty=plgpu.Barrier(num_barriers=stages, num_arrivals=COMPUTE_WARPGROUPS),
        k_full=plgpu.Barrier(num_barriers=stages, num_arrivals=2 if has_segments else 1),
        k_smem=kv_smem,
        lse_smem=plgpu.SMEM((COMPUTE_WARPGROUPS, sizes.block_q), jnp.float32) if residuals or lse else None,
        q_full=plgpu.Barrier(num_barriers=COMPUTE_WARPGROUPS),
        q_smem=wgmma_smem((COMPUTE_WARPGROUPS, sizes.block_q, D), q.dtype),
        schedule_barrier=plgpu.Barrier(num_barriers=COMPUTE_WARPGROUPS),
        v_empty=plgpu.Barrier(num_barriers=stages, num_arrivals=COMPUTE_WARPGROUPS),
        v_full=plgpu.Barrier(num_barriers=stages),
        v_smem=kv_smem,
    )

    def fwd_kernel(*refs: Ref) -> None:
        gmem, out_gmem, smem = split_refs(refs, FwdInputs, FwdOutputs, FwdScratch)
        ForwardKernel(gmem, out_gmem, smem, config, sizes).run()

    return plgpu.kernel(
        fwd_kernel,
        out_type=outputs,
        scratch_types=scratch,
        grid=(H, pl.cdiv(T, rows), B),
        grid_names=("head", "tile", "batch"),
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=config.interpret,
        kernel_name="attention_forward",
    )(*inputs)
