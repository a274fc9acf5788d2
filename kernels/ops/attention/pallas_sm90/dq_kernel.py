"""dq on Hopper: a block of queries loops over the keys that it sees."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dantinox.kernels.ops.attention.pallas_sm90.block_sizes import BwdBlockSizes, bwd_block_sizes
from dantinox.kernels.ops.attention.pallas_sm90.common import (
    BLOCK_ROWS,
    COL_LAYOUT,
    COMPUTE_WARPGROUPS,
    CONSUMER_REGISTERS,
    PRODUCER_REGISTERS,
    ROW_LAYOUT,
    WARPGROUP_ROWS,
    BwdInputs,
    Ref,
    SegmentRange,
    Sm90AttentionConfig,
    apply_mask,
    drain_pipeline,
    interpret_operand_smem,
    per_row,
    softmax_weights,
    split_refs,
    visible_kv_blocks,
    wait_when,
    wgmma_accumulate,
    wgmma_smem,
)
from dantinox.kernels.vma import varying_shape

Array = jax.Array


class DqOutput(NamedTuple):
    """Output of the kernel, in global memory."""

    dq: Ref


class DqScratch(NamedTuple):
    """Shared memory and barriers of a thread block."""

    q_smem: Ref  # per warpgroup, as do_smem; finally dq
    do_smem: Ref
    k_smem: Ref  # per stage, as v_smem and kv_ids_smem
    v_smem: Ref
    kv_ids_smem: Ref  # or None
    operand_smem: Ref  # or None
    address_smem: Ref  # the index of each warpgroup, then zeros; or None
    q_do_full: Ref
    k_full: Ref
    k_empty: Ref
    v_full: Ref
    v_empty: Ref


def dq(inputs: BwdInputs, config: Sm90AttentionConfig) -> Array:
    """Return dq; the inputs are padded by `bwd.backward`."""
    B, T, H, D = inputs.q.shape
    sizes, dtype = bwd_block_sizes(D), inputs.q.dtype
    has_segments = inputs.q_ids is not None

    def dq_kernel(*refs: Ref) -> None:
        gmem, (dq_gmem,), smem = split_refs(refs, BwdInputs, DqOutput, DqScratch)
        DqKernel(gmem, dq_gmem, smem, config, sizes).run()

    scratch = DqScratch(
        q_smem=wgmma_smem((COMPUTE_WARPGROUPS, WARPGROUP_ROWS, D), dtype),
        do_smem=wgmma_smem((COMPUTE_WARPGROUPS, WARPGROUP_ROWS, D), dtype),
        k_smem=wgmma_smem((sizes.k_stages, sizes.block_kv, D), dtype),
        v_smem=wgmma_smem((sizes.v_stages, sizes.block_kv, D), dtype),
        kv_ids_smem=plgpu.SMEM((sizes.k_stages, sizes.block_kv), jnp.int32) if has_segments else None,
        operand_smem=interpret_operand_smem(sizes.block_kv, dtype, config),
        address_smem=plgpu.SMEM((2 * COMPUTE_WARPGROUPS,), jnp.int32) if sizes.v_stages == 1 else None,
        q_do_full=plgpu.Barrier(num_arrivals=2, num_barriers=COMPUTE_WARPGROUPS),
        k_full=plgpu.Barrier(num_arrivals=2 if has_segments else 1, num_barriers=sizes.k_stages),
        k_empty=plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=sizes.k_stages),
        v_full=plgpu.Barrier(num_barriers=sizes.v_stages),
        v_empty=plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=sizes.v_stages),
    )
    return plgpu.kernel(
        dq_kernel,
        out_type=varying_shape(inputs.q.shape, dtype, inputs.q),
        grid=(pl.cdiv(T, BLOCK_ROWS), B, H),
        grid_names=("tile", "b", "h"),
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="wg",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=config.interpret or False,
        kernel_name="attention_dq",
    )(*inputs)


class DqKernel:
    """One block of queries: two warpgroups that compute (consumers) and one that loads (producer)."""

    def __init__(
        self, gmem: BwdInputs, dq_gmem: Ref, smem: DqScratch, config: Sm90AttentionConfig, sizes: BwdBlockSizes
    ):
        self.gmem, self.dq_gmem, self.smem, self.config, self.sizes = gmem, dq_gmem, smem, config, sizes
        _, self.T, _, self.D = gmem.q.shape
        self.dtype, self.has_segments = gmem.q.dtype, gmem.q_ids is not None
        self.shape = (WARPGROUP_ROWS, sizes.block_kv)  # of the scores
        # v has one stage, whose address the compiler would keep in registers that a long mask needs.
        has_long_mask = config.window is not None or config.softcap is not None or self.has_segments
        self.reloads_v_address = smem.address_smem is not None and has_long_mask

    def run(self) -> None:
        """Run the role of this warpgroup: producer or consumer."""
        self.batch, self.head, self.wg = lax.axis_index("b"), lax.axis_index("h"), lax.axis_index("wg")
        # The last queries see the most keys: their blocks start first.
        self.block_start = (pl.cdiv(self.T, BLOCK_ROWS) - 1 - lax.axis_index("tile")) * BLOCK_ROWS
        self.q_start = self.block_start + self.wg * WARPGROUP_ROWS
        self.rows = pl.ds(self.q_start, WARPGROUP_ROWS)
        pl.when(self.wg < COMPUTE_WARPGROUPS)(self.consumer)
        pl.when(self.wg == COMPUTE_WARPGROUPS)(self.producer)

    def segment_range(self) -> SegmentRange:
        """Load the range where it is used: values that are live for a whole step fill the registers."""
        block = lax.div(self.block_start, jnp.int32(BLOCK_ROWS))
        return SegmentRange.load(self.gmem.segment_ranges, self.batch, block)

    def kv_blocks(self) -> tuple[Array, Array]:
        """Return the first key block and the number of steps, at least one.

        A block that sees no key runs one fully masked step. If a loop may have no iterations, the compiler enters it
        through another branch and zeroes the new accumulators in every step.
        """
        first, steps = visible_kv_blocks(self.block_start, self.config, self.sizes.block_kv)
        if self.has_segments:
            first, steps = self.segment_range().clamp(first, steps)
        return first, jnp.maximum(steps, 1)

    # The warpgroup that loads.

    def producer(self) -> None:
        """Load k and v of each key block into their next stages."""
        gmem, smem, sizes, batch = self.gmem, self.smem, self.sizes, self.batch
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        first, steps = self.kv_blocks()
        kv_head = lax.div(self.head, jnp.int32(self.config.G))

        @pl.loop(0, steps)
        def load_kv_block(i: Array) -> None:
            keys = pl.ds((first + i) * sizes.block_kv, sizes.block_kv)
            slot = lax.rem(i, jnp.int32(sizes.k_stages))
            wait_when(i >= sizes.k_stages, smem.k_empty, slot)
            plgpu.copy_gmem_to_smem(gmem.k.at[batch, keys, kv_head], smem.k_smem.at[slot], smem.k_full.at[slot])
            if self.has_segments:
                ids_slot = smem.kv_ids_smem.at[slot]
                plgpu.copy_gmem_to_smem(gmem.kv_ids.at[batch, keys], ids_slot, smem.k_full.at[slot])
            slot = lax.rem(i, jnp.int32(sizes.v_stages))
            wait_when(i >= sizes.v_stages, smem.v_empty, slot)
            plgpu.copy_gmem_to_smem(gmem.v.at[batch, keys, kv_head], smem.v_smem.at[slot], smem.v_full.at[slot])

        drain_pipeline(steps, sizes.k_stages, lambda slot: smem.k_empty.at[slot])
        drain_pipeline(steps, sizes.v_stages, lambda slot: smem.v_empty.at[slot])

    # The two warpgroups that compute.

    def consumer(self) -> None:
        """Compute and store dq of this warpgroup's queries."""
        gmem, smem, batch, wg = self.gmem, self.smem, self.batch, self.wg
        plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
        plgpu.copy_gmem_to_smem(gmem.q.at[batch, self.rows, self.head], smem.q_smem.at[wg], smem.q_do_full.at[wg])
        plgpu.copy_gmem_to_smem(gmem.do.at[batch, self.rows, self.head], smem.do_smem.at[wg], smem.q_do_full.at[wg])
        first, steps = self.kv_blocks()
        lse, delta = self.load_rows(gmem.lse, batch, self.head), self.load_rows(gmem.delta, batch, self.head)
        if smem.address_smem is not None:
            smem.address_smem[wg] = wg
            smem.address_smem[COMPUTE_WARPGROUPS + wg] = jnp.int32(0)
        plgpu.barrier_wait(smem.q_do_full.at[wg])

        def accumulate(dq_acc: Ref) -> Array:
            def kv_block_step(i: Array, _: None) -> None:
                self.kv_block_step(dq_acc, i, first, lse, delta)

            lax.fori_loop(0, steps, kv_block_step, None)
            return dq_acc[...]

        dq = pl.run_scoped(accumulate, plgpu.ACC((WARPGROUP_ROWS, self.D)))
        scale = self.config.scale
        if gmem.unscale is not None:
            scale = gmem.unscale[batch, lax.div(self.head, jnp.int32(self.config.G))] * scale
        smem.q_smem.at[wg][...] = (dq * scale).astype(self.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem.q_smem.at[wg], self.dq_gmem.at[batch, self.rows, self.head])
        plgpu.wait_smem_to_gmem(0)

    def load_rows(self, ref: Ref, *index: Array) -> Array:
        """Load one value per query of this warpgroup."""
        return plgpu.load(ref.at[(*index, self.rows)], layout=ROW_LAYOUT, optimized=False)

    def load_ids(self, slot: Array) -> tuple[Array, Array]:
        """Load the segment ids of the queries and of the keys in a stage."""
        q_ids = self.load_rows(self.gmem.q_ids, self.batch)
        return q_ids, plgpu.load(self.smem.kv_ids_smem.at[slot], layout=COL_LAYOUT)

    def kv_block_step(self, dq_acc: Ref, i: Array, first: Array, lse: Array, delta: Array) -> None:
        """Add the product of ds and k of one key block."""
        smem, sizes, wg = self.smem, self.sizes, self.wg
        k_slot, v_slot = lax.rem(i, jnp.int32(sizes.k_stages)), lax.rem(i, jnp.int32(sizes.v_stages))
        # Loaded in every step; otherwise the compiler keeps the addresses of all operands in registers.
        wg_id = wg if smem.address_smem is None else smem.address_smem[wg]

        # An accumulator is not zeroed if its product starts right after its allocation, without a wait in between.
        def compute_s(s_acc: Ref) -> Array:
            plgpu.wgmma(s_acc, smem.q_smem.at[wg_id], smem.k_smem.at[k_slot].T)
            plgpu.barrier_wait(smem.v_full.at[v_slot])
            return pl.run_scoped(functools.partial(compute_ds, s_acc), plgpu.ACC(self.shape))

        def compute_ds(s_acc: Ref, dp_acc: Ref) -> Array:
            v_address = smem.address_smem[COMPUTE_WARPGROUPS + wg] if self.reloads_v_address else v_slot
            plgpu.wgmma(dp_acc, smem.do_smem.at[wg_id], smem.v_smem.at[v_address].T)
            s = plgpu.wgmma_accumulator_load(s_acc, wait_n=1)
            p = self.visible_weights(s, k_slot, first, i, lse)
            dp = dp_acc[...]
            plgpu.barrier_arrive(smem.v_empty.at[v_slot])
            return p * (dp - per_row(delta, sizes.block_kv))

        plgpu.barrier_wait(smem.k_full.at[k_slot])
        ds = pl.run_scoped(compute_s, plgpu.ACC(self.shape)).astype(self.dtype)
        operand_smem = None if smem.operand_smem is None else smem.operand_smem.at[wg]
        wgmma_accumulate(dq_acc, ds, smem.k_smem.at[k_slot], operand_smem)
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(smem.k_empty.at[k_slot])

    def visible_weights(self, s: Array, slot: Array, first: Array, i: Array, lse: Array) -> Array:
        """Return p of the visible pairs, times the slope of the soft cap."""
        config, block_kv = self.config, self.sizes.block_kv
        p, slope = softmax_weights(s, per_row(lse, block_kv), config)
        p = p if slope is None else p * slope
        one_segment = self.segment_range().is_interior(first + i) if self.has_segments else None
        (p,) = apply_mask(
            p,
            q_start=self.q_start,
            kv_start=(first + i) * block_kv,
            config=config,
            q_axis=0,
            load_ids=functools.partial(self.load_ids, slot) if self.has_segments else None,
            one_segment=one_segment,
        )
        return p
