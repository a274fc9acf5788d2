"""dk and dv on Hopper: a block of keys loops over the queries, of all heads, that see it."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dantinox.kernels.ops.attention.pallas_sm90.block_sizes import BwdBlockSizes, bwd_block_sizes
from dantinox.kernels.ops.attention.pallas_sm90.common import (
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
    per_column,
    softmax_weights,
    split_refs,
    visible_q_blocks,
    wait_when,
    wgmma_accumulate,
    wgmma_smem,
)
from dantinox.kernels.vma import varying_shape

Array = jax.Array
Q, DO = 0, 1  # index of q and lse, of do and delta in a stage; of their factors k and v in kv_smem


class DkvOutputs(NamedTuple):
    """Outputs of the kernel, in global memory."""

    dk: Ref
    dv: Ref


class DkvScratch(NamedTuple):
    """Shared memory and barriers of a thread block."""

    kv_smem: Ref  # k and v; finally dk and dv
    q_do_smem: Ref  # per stage
    lse_delta_smem: Ref  # per stage
    q_ids_smem: Ref  # per stage; or None
    operand_smem: Ref  # or None
    p_smem: Ref  # or None
    wg_ids_smem: Ref  # the index of each warpgroup; or None
    kv_full: Ref
    q_do_full: Ref  # two per stage: q with lse, do with delta
    q_do_empty: Ref
    p_full: Ref  # or None
    p_empty: Ref  # or None


def splits_dk_dv(D: int) -> bool:
    """Return whether one warpgroup owns dv and the other dk, because one cannot hold both at this head dim."""
    return D > 128


def block_kv(D: int) -> int:
    """Return the number of keys per thread block."""
    return WARPGROUP_ROWS if splits_dk_dv(D) else WARPGROUP_ROWS * COMPUTE_WARPGROUPS


def dkv(inputs: BwdInputs, config: Sm90AttentionConfig) -> DkvOutputs:
    """Return (dk, dv); the inputs are padded by `bwd.backward`."""
    B, S, K, D = inputs.k.shape
    sizes, dtype = bwd_block_sizes(D), inputs.k.dtype
    split, has_segments = splits_dk_dv(D), inputs.q_ids is not None
    stages, parts = sizes.q_stages, block_kv(D) // WARPGROUP_ROWS

    def dkv_kernel(*refs: Ref) -> None:
        gmem, out_gmem, smem = split_refs(refs, BwdInputs, DkvOutputs, DkvScratch)
        DkvKernel(gmem, out_gmem, smem, config, sizes).run()

    out = varying_shape(inputs.k.shape, dtype, inputs.q)
    scratch = DkvScratch(
        kv_smem=wgmma_smem((2, parts, WARPGROUP_ROWS, D), dtype),
        q_do_smem=wgmma_smem((stages, 2, sizes.block_q, D), dtype),
        lse_delta_smem=plgpu.SMEM((stages, 2, sizes.block_q), jnp.float32),
        q_ids_smem=plgpu.SMEM((stages, 2, sizes.block_q), jnp.int32) if has_segments else None,
        operand_smem=interpret_operand_smem(sizes.block_q, dtype, config),
        p_smem=wgmma_smem((WARPGROUP_ROWS, sizes.block_q), jnp.float32) if split else None,
        wg_ids_smem=plgpu.SMEM((COMPUTE_WARPGROUPS,), jnp.int32) if D > 64 else None,
        kv_full=plgpu.Barrier(num_arrivals=1 if split else 2, num_barriers=COMPUTE_WARPGROUPS),
        q_do_full=plgpu.Barrier(num_arrivals=3 if has_segments else 2, num_barriers=2 * stages),
        q_do_empty=plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=2 * stages),
        p_full=plgpu.Barrier() if split else None,
        p_empty=plgpu.Barrier() if split else None,
    )
    return plgpu.kernel(
        dkv_kernel,
        out_type=DkvOutputs(out, out),
        grid=(pl.cdiv(S, block_kv(D)), B, K),
        grid_names=("tile", "b", "g"),
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="wg",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=config.interpret or False,
        kernel_name="attention_dkv",
    )(*inputs)


class DkvKernel:
    """One block of keys: two warpgroups that compute (consumers) and one that loads (producer)."""

    def __init__(
        self, gmem: BwdInputs, out: DkvOutputs, smem: DkvScratch, config: Sm90AttentionConfig, sizes: BwdBlockSizes
    ):
        self.gmem, self.out, self.smem, self.config, self.sizes = gmem, out, smem, config, sizes
        self.D, self.dtype = gmem.k.shape[-1], gmem.k.dtype
        self.split, self.block_kv = splits_dk_dv(self.D), block_kv(self.D)
        self.has_segments = gmem.q_ids is not None
        self.shape = (WARPGROUP_ROWS, sizes.block_q)  # of the transposed scores

    def run(self) -> None:
        """Run the role of this warpgroup: producer or consumer."""
        self.batch, self.kv_head, self.wg = lax.axis_index("b"), lax.axis_index("g"), lax.axis_index("wg")
        block_start = lax.axis_index("tile") * self.block_kv
        self.kv_start = block_start + (0 if self.split else self.wg) * WARPGROUP_ROWS
        self.rows = pl.ds(self.kv_start, WARPGROUP_ROWS)
        pl.when(self.wg < COMPUTE_WARPGROUPS)(self.consumer)
        pl.when(self.wg >= COMPUTE_WARPGROUPS)(self.producer)

    def segment_range(self, block: Array) -> SegmentRange:
        """Load the range where it is used: values that are live for a whole step fill the registers."""
        return SegmentRange.load(self.gmem.segment_ranges, self.batch, block)

    def q_blocks(self, block: Array) -> tuple[Array, Array]:
        """Return the first query block of each head and the number of steps over all heads, at least 1 as in dq."""
        first, steps = visible_q_blocks(block * self.block_kv, self.block_kv, self.config, self.sizes.block_q)
        if self.has_segments:
            first, steps = self.segment_range(block).clamp(first, steps)
        return first, jnp.maximum(steps * self.config.G, 1)

    # The warpgroup that loads.

    def producer(self) -> None:
        """Load q, do, lse and delta of each query block into the next stage."""
        gmem, smem, sizes = self.gmem, self.smem, self.sizes
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        # The sum equals the block index. With the index alone, the compiler hoists values that both branches need above
        # the first branch and keeps them in registers for the second while the first computes.
        first, steps = self.q_blocks(lax.axis_index("tile") + (self.wg - COMPUTE_WARPGROUPS))

        def load_q_block(i: Array, slot: Array) -> None:
            queries = pl.ds((first + lax.div(i, jnp.int32(self.config.G))) * sizes.block_q, sizes.block_q)
            head = self.kv_head * self.config.G + lax.rem(i, jnp.int32(self.config.G))
            for part, (matrix, vector) in enumerate(((gmem.q, gmem.lse), (gmem.do, gmem.delta))):
                barrier = 2 * slot + part
                wait_when(i >= sizes.q_stages, smem.q_do_empty, barrier)
                full = smem.q_do_full.at[barrier]
                plgpu.copy_gmem_to_smem(matrix.at[self.batch, queries, head], smem.q_do_smem.at[slot, part], full)
                plgpu.copy_gmem_to_smem(vector.at[self.batch, head, queries], smem.lse_delta_smem.at[slot, part], full)
                if self.has_segments:  # for both parts: all barriers of an array expect the same number of arrivals
                    plgpu.copy_gmem_to_smem(gmem.q_ids.at[self.batch, queries], smem.q_ids_smem.at[slot, part], full)

        @pl.loop(0, steps)
        def load_q_blocks(i: Array) -> None:
            load_q_block(i, lax.rem(i, jnp.int32(sizes.q_stages)))

        for part in (Q, DO):
            drain_pipeline(steps, sizes.q_stages, lambda slot, part=part: smem.q_do_empty.at[2 * slot + part])

    # The two warpgroups that compute.

    def consumer(self) -> None:
        """Load this warpgroup's keys and values, then compute and store their gradients."""
        gmem, smem, batch, wg = self.gmem, self.smem, self.batch, self.wg
        plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
        k, v = (x.at[batch, self.rows, self.kv_head] for x in (gmem.k, gmem.v))
        if self.split:

            @pl.when(wg == 0)
            def load_k() -> None:
                plgpu.copy_gmem_to_smem(k, smem.kv_smem.at[0, 0], smem.kv_full.at[0])

            @pl.when(wg == 1)
            def load_v() -> None:
                plgpu.copy_gmem_to_smem(v, smem.kv_smem.at[1, 0], smem.kv_full.at[1])
        else:
            plgpu.copy_gmem_to_smem(k, smem.kv_smem.at[Q, wg], smem.kv_full.at[wg])
            plgpu.copy_gmem_to_smem(v, smem.kv_smem.at[DO, wg], smem.kv_full.at[wg])
        plgpu.barrier_wait(smem.kv_full.at[wg])
        if self.split:
            self.split_dk_dv()
        else:
            self.fused_dk_dv()

    def operand_smem(self) -> Ref:
        """Return this warpgroup's part of the shared memory for a left operand, or None."""
        return None if self.smem.operand_smem is None else self.smem.operand_smem.at[self.wg]

    def load_vector(self, slot: Array, part: int) -> Array:
        """Load lse (Q) or delta (DO) of the queries in a stage."""
        return plgpu.load(self.smem.lse_delta_smem.at[slot, part], layout=COL_LAYOUT)

    def load_ids(self, slot: Array) -> tuple[Array, Array]:
        """Load the segment ids of the keys and of the queries in a stage."""
        kv_ids = plgpu.load(self.gmem.kv_ids.at[self.batch, self.rows], layout=ROW_LAYOUT, optimized=False)
        return kv_ids, plgpu.load(self.smem.q_ids_smem.at[slot, Q], layout=COL_LAYOUT)

    def visible_weights(self, s_acc: Ref, slot: Array, first: Array, i: Array) -> tuple[Array, Array]:
        """Wait for s; return p and the factor of (do v^T - delta) in ds."""
        config = self.config
        lse = self.load_vector(slot, Q)
        s = plgpu.wgmma_accumulator_load(s_acc, wait_n=0 if self.split else 1)
        p, slope = softmax_weights(s, per_column(lse, WARPGROUP_ROWS), config)
        # Round before the mask: two float32 arrays and the operands of a mask do not fit in the registers.
        ps = [p] if slope is None else [p * slope, p.astype(self.dtype)]
        q_block = first + lax.div(i, jnp.int32(config.G))
        one_segment = None
        if self.has_segments:
            one_segment = self.segment_range(lax.axis_index("tile")).is_interior(q_block)
        ps = apply_mask(
            *ps,
            q_start=q_block * self.sizes.block_q,
            kv_start=self.kv_start,
            config=config,
            q_axis=1,
            load_ids=functools.partial(self.load_ids, slot) if self.has_segments else None,
            one_segment=one_segment,
        )
        return ps[-1].astype(self.dtype), ps[0]

    def fused_dk_dv(self) -> None:
        """Compute dk and dv of the keys of this warpgroup."""
        smem, dtype, wg = self.smem, self.dtype, self.wg
        first, steps = self.q_blocks(lax.axis_index("tile"))
        if smem.wg_ids_smem is not None:
            smem.wg_ids_smem[wg] = wg

        def accumulate(dk_acc: Ref, dv_acc: Ref) -> tuple[Array, Array]:
            def q_block_step(i: Array, _: None) -> None:
                slot = lax.rem(i, jnp.int32(self.sizes.q_stages))
                wg_id = wg if smem.wg_ids_smem is None else smem.wg_ids_smem[wg]

                def compute_ds(s_acc: Ref, dp_acc: Ref) -> Array:
                    plgpu.wgmma(s_acc, smem.kv_smem.at[Q, wg_id], smem.q_do_smem.at[slot, Q].T)
                    plgpu.wgmma(dp_acc, smem.kv_smem.at[DO, wg_id], smem.q_do_smem.at[slot, DO].T)
                    p, p_slope = self.visible_weights(s_acc, slot, first, i)
                    wgmma_accumulate(dv_acc, p, smem.q_do_smem.at[slot, DO], self.operand_smem())
                    delta = self.load_vector(slot, DO)
                    dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=1)
                    return p_slope * (dp - per_column(delta, WARPGROUP_ROWS))

                # Wait first: an accumulator is not zeroed if its product starts right after its allocation.
                plgpu.barrier_wait(smem.q_do_full.at[2 * slot + Q])
                plgpu.barrier_wait(smem.q_do_full.at[2 * slot + DO])
                ds = pl.run_scoped(compute_ds, plgpu.ACC(self.shape), plgpu.ACC(self.shape))
                wgmma_accumulate(dk_acc, ds.astype(dtype), smem.q_do_smem.at[slot, Q], self.operand_smem())
                plgpu.wgmma_wait(1)
                plgpu.barrier_arrive(smem.q_do_empty.at[2 * slot + DO])
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(smem.q_do_empty.at[2 * slot + Q])

            lax.fori_loop(0, steps, q_block_step, None)
            return dk_acc[...], dv_acc[...]

        dk, dv = pl.run_scoped(accumulate, *(plgpu.ACC((WARPGROUP_ROWS, self.D)) for _ in range(2)))
        if self.gmem.unscale is not None:
            unscale = self.gmem.unscale[self.batch, self.kv_head]
            dk, dv = dk * unscale, dv * unscale
        smem.kv_smem.at[Q, wg][...] = (dk * self.config.scale).astype(dtype)
        smem.kv_smem.at[DO, wg][...] = dv.astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem.kv_smem.at[Q, wg], self.out.dk.at[self.batch, self.rows, self.kv_head])
        plgpu.copy_smem_to_gmem(smem.kv_smem.at[DO, wg], self.out.dv.at[self.batch, self.rows, self.kv_head])
        plgpu.wait_smem_to_gmem(0)

    def split_dk_dv(self) -> None:
        """Compute p and dv in the first warpgroup, ds and dk in the second; p goes through shared memory."""
        smem, dtype, wg = self.smem, self.dtype, self.wg
        first, steps = self.q_blocks(lax.axis_index("tile"))
        smem.wg_ids_smem[wg] = wg
        owns_dv = wg == 0

        def accumulate(acc: Ref) -> Array:
            def q_block_step(i: Array, _: None) -> None:
                slot = lax.rem(i, jnp.int32(self.sizes.q_stages))
                # Loaded in every step; otherwise the compiler keeps the addresses of all operands in registers.
                wg_id = smem.wg_ids_smem[wg]

                def p_or_ds(product: Ref) -> Array:
                    plgpu.wgmma(product, smem.kv_smem.at[wg_id, 0], smem.q_do_smem.at[slot, wg_id].T)

                    def produce_p() -> Array:
                        p, p_slope = self.visible_weights(product, slot, first, i)
                        plgpu.barrier_wait(smem.p_empty)
                        smem.p_smem[...] = p_slope
                        plgpu.barrier_arrive(smem.p_full)
                        return p

                    def consume_p() -> Array:
                        dp = product[...] - per_column(self.load_vector(slot, DO), WARPGROUP_ROWS)
                        plgpu.barrier_wait(smem.p_full)
                        ds = plgpu.load(smem.p_smem, layout=plgpu.Layout.WGMMA) * dp
                        plgpu.barrier_arrive(smem.p_empty)
                        return ds.astype(dtype)

                    return lax.cond(owns_dv, produce_p, consume_p)

                plgpu.barrier_wait(smem.q_do_full.at[2 * slot + wg])
                x = pl.run_scoped(p_or_ds, plgpu.ACC(self.shape))
                plgpu.barrier_arrive(smem.q_do_empty.at[2 * slot + wg])
                plgpu.barrier_wait(smem.q_do_full.at[2 * slot + (1 - wg)])
                wgmma_accumulate(acc, x, smem.q_do_smem.at[slot, 1 - wg_id], self.operand_smem())
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(smem.q_do_empty.at[2 * slot + (1 - wg)])

            @pl.when(~owns_dv)
            def release_p() -> None:
                plgpu.barrier_arrive(smem.p_empty)

            lax.fori_loop(0, steps, q_block_step, None)

            @pl.when(owns_dv)
            def drain_p() -> None:
                plgpu.barrier_wait(smem.p_empty)

            return acc[...]

        dk_or_dv = pl.run_scoped(accumulate, plgpu.ACC((WARPGROUP_ROWS, self.D)))
        if self.gmem.unscale is not None:
            dk_or_dv = dk_or_dv * self.gmem.unscale[self.batch, self.kv_head]
        smem.kv_smem.at[wg, 0][...] = (dk_or_dv * jnp.where(owns_dv, 1.0, self.config.scale)).astype(dtype)
        plgpu.commit_smem()

        @pl.when(owns_dv)
        def store_dv() -> None:
            plgpu.copy_smem_to_gmem(smem.kv_smem.at[0, 0], self.out.dv.at[self.batch, self.rows, self.kv_head])

        @pl.when(~owns_dv)
        def store_dk() -> None:
            plgpu.copy_smem_to_gmem(smem.kv_smem.at[1, 0], self.out.dk.at[self.batch, self.rows, self.kv_head])

        plgpu.wait_smem_to_gmem(0)
