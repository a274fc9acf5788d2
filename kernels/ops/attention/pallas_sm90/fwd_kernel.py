"""The body of the forward kernel on Hopper, whose header is in `fwd.py`: one query block, three warpgroups."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dantinox.kernels.mosaic_gpu import LARGE_SOFTCAP
from dantinox.kernels.ops.attention.pallas_sm90.block_sizes import FwdBlockSizes
from dantinox.kernels.ops.attention.pallas_sm90.common import (
    COL_LAYOUT,
    COMPUTE_WARPGROUPS,
    CONSUMER_REGISTERS,
    LOG2E,
    PRODUCER_REGISTERS,
    ROW_LAYOUT,
    Index,
    KvBlockRange,
    Ref,
    Sm90AttentionConfig,
    iota,
    per_column,
    per_row,
    softcap_tanh,
    visible_kv_range,
    wait_when,
)

Array = jax.Array
Carry = tuple[Array, Array, Array]  # accumulator, maximum and sum of a row
M_INIT = float(jnp.finfo(jnp.float32).min)  # no finite score is below it
STORE_COLUMNS = 128  # columns of the output that are gated and stored at a time


class FwdInputs(NamedTuple):
    """Inputs of the kernel, in global memory."""

    q: Any
    k: Any
    v: Any
    gate: Any = None  # logits, one per element
    gate_per_head: Any = None  # sigmoid of the logits, [B, H, T]
    q_ids: Any = None
    kv_ids: Any = None
    segment_ranges: Any = None  # per query block of a warpgroup, from `segment_ids.kv_block_ranges`


class FwdOutputs(NamedTuple):
    """Outputs of the kernel, in global memory; without gradients only o."""

    o: Any  # [B, T, H, D]
    lse: Any = None  # [B, H, T], to the base 2
    o_ungated: Any = None  # [B, T, H, D]; None where there is no gate


class FwdScratch(NamedTuple):
    """Shared memory and barriers of a thread block."""

    gate_full: Ref  # per warpgroup; or None
    kv_ids_smem: Ref  # per stage; or None
    k_empty: Ref
    k_full: Ref
    k_smem: Ref
    lse_smem: Ref  # or None
    q_full: Ref  # per warpgroup
    q_smem: Ref  # per warpgroup; finally the output
    schedule_barrier: Ref  # per warpgroup: its turn to start a q k^T or p v
    v_empty: Ref
    v_full: Ref
    v_smem: Ref


class ForwardKernel:
    """One query block: two warpgroups that compute (consumers) and one that loads (producer)."""

    def __init__(
        self, gmem: FwdInputs, out: FwdOutputs, smem: FwdScratch, config: Sm90AttentionConfig, sizes: FwdBlockSizes
    ):
        self.gmem, self.out, self.smem, self.config, self.sizes = gmem, out, smem, config, sizes
        self.interpreted = config.interpret is not None

    def run(self) -> None:
        """Run the role of this warpgroup: producer or consumer."""
        wg = lax.axis_index("warpgroup")
        pl.when(wg < COMPUTE_WARPGROUPS)(functools.partial(self.consumer, wg))
        pl.when(wg == COMPUTE_WARPGROUPS)(self.producer)

    # Properties, computed where they are used: values that are live throughout occupy registers that others need.

    @property
    def batch(self) -> Array:
        """Index of the sequence."""
        return lax.axis_index("batch")

    @property
    def head(self) -> Array:
        """Index of the query head."""
        return lax.axis_index("head")

    @property
    def q_start(self) -> Array:
        """First query of the block."""
        block = lax.axis_index("tile")
        if self.config.causal:  # the longest blocks start first, so that none runs alone at the end
            block = lax.axis_size("tile") - 1 - block
        return block * (COMPUTE_WARPGROUPS * self.sizes.block_q)

    @property
    def kv_block_range(self) -> KvBlockRange:
        """Key blocks to load: all that either warpgroup sees."""
        rows = COMPUTE_WARPGROUPS * self.sizes.block_q
        visible = visible_kv_range(self.q_start, rows, self.sizes.block_kv, self.config)
        if self.gmem.segment_ranges is None:
            return visible
        first, second = (self.segment_kv_range(wg) for wg in range(COMPUTE_WARPGROUPS))
        start, end = lax.min(first.start, second.start), lax.max(first.end, second.end)
        return visible.intersect(KvBlockRange(start, first.interior_start, first.interior_end, end))

    def segment_kv_range(self, wg: Index) -> KvBlockRange:
        """Load the range of key blocks that may share a segment with a warpgroup's queries."""
        block = lax.div(self.q_start, jnp.int32(self.sizes.block_q)) + wg
        return KvBlockRange(*(self.gmem.segment_ranges[self.batch, block, n] for n in range(4)))

    def slot(self, kv_block: Array) -> Array:
        """Return the stage of a key block."""
        return kv_block & (self.sizes.stages - 1)

    def q_rows(self, ref: Ref, wg: Index) -> Ref:
        """Return the rows of a [B, T, H, D] array that belong to the queries of a warpgroup."""
        rows = pl.ds(self.q_start + wg * self.sizes.block_q, self.sizes.block_q)
        return ref.at[self.batch, rows, self.head]

    def q_rows_by_head(self, ref: Ref, wg: Index) -> Ref:
        """Return the rows of a [B, H, T] array that belong to the queries of a warpgroup."""
        rows = pl.ds(self.q_start + wg * self.sizes.block_q, self.sizes.block_q)
        return ref.at[self.batch, self.head, rows]

    # The warpgroup that loads.

    def producer(self) -> None:
        """Load q once, then each key block, and the gate last."""
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        gmem, smem = self.gmem, self.smem
        start, *_, end = self.kv_block_range
        _, block_kv, stages = self.sizes
        kv_head = lax.div(self.head, jnp.int32(self.config.G))
        for wg in range(COMPUTE_WARPGROUPS):
            plgpu.copy_gmem_to_smem(self.q_rows(gmem.q, wg), smem.q_smem.at[wg], smem.q_full.at[wg])

        @pl.loop(start, end)
        def load_kv_block(kv_block: Array) -> None:
            slot, keys = self.slot(kv_block), pl.ds(kv_block * block_kv, block_kv)
            in_use = kv_block - start >= stages
            wait_when(in_use, smem.k_empty, slot)
            full = smem.k_full.at[slot]
            plgpu.copy_gmem_to_smem(gmem.k.at[self.batch, keys, kv_head], smem.k_smem.at[slot], full)
            if gmem.kv_ids is not None:
                plgpu.copy_gmem_to_smem(gmem.kv_ids.at[self.batch, keys], smem.kv_ids_smem.at[slot], full)
            wait_when(in_use, smem.v_empty, slot)
            full = smem.v_full.at[slot]
            plgpu.copy_gmem_to_smem(gmem.v.at[self.batch, keys, kv_head], smem.v_smem.at[slot], full)

        # Waits until every stage is empty. The gate takes the stages of the blocks that would follow in the K ring.
        @pl.loop(end, end + stages)
        def drain_and_load_gate(kv_block: Array) -> None:
            slot = self.slot(kv_block)
            in_use = kv_block - start >= stages
            wait_when(in_use, smem.k_empty, slot)
            if gmem.gate is not None:
                for wg in range(COMPUTE_WARPGROUPS):
                    gate_block, rows = self.gate_stage(wg)

                    @pl.when(kv_block == gate_block)
                    def load_gate(wg: int = wg, rows: Any = rows) -> None:
                        target = smem.k_smem.at[slot, rows]
                        plgpu.copy_gmem_to_smem(self.q_rows(gmem.gate, wg), target, smem.gate_full.at[wg])

            wait_when(in_use, smem.v_empty, slot)

    def gate_stage(self, wg: Index) -> tuple[Array, Any]:
        """Return (key block whose stage holds the gate of a warpgroup, rows of the gate in that stage)."""
        block_q, block_kv, _ = self.sizes
        per_stage = block_kv // block_q  # warpgroups that share a stage: 2 or 1
        return self.kv_block_range.end + wg // per_stage, pl.ds(wg % per_stage * block_q, block_q)

    # The two warpgroups that compute.

    def consumer(self, wg: Array) -> None:
        """Compute and store the output of a warpgroup's queries."""
        plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
        smem, (block_q, block_kv, _), D = self.smem, self.sizes, self.gmem.q.shape[-1]
        q_start = self.q_start + wg * block_q

        def ranges() -> tuple[KvBlockRange, KvBlockRange]:
            """Return the ranges of the block and of this warpgroup; computed per loop, since registers are scarce."""
            block_range, visible = self.kv_block_range, visible_kv_range(q_start, block_q, block_kv, self.config)
            if self.gmem.segment_ranges is not None:
                visible = visible.intersect(self.segment_kv_range(wg))
            return block_range, KvBlockRange(*(lax.clamp(block_range.start, x, block_range.end) for x in visible))

        def full(value: float) -> Array:
            return plgpu.layout_cast(jnp.full((block_q,), value, jnp.float32), ROW_LAYOUT)

        def step(end: Array, masked: bool) -> Callable[[Array, Carry], Carry]:
            return functools.partial(self.kv_block_step, wg, q_start, end, masked)

        def skip(end: Array) -> Callable[[Array, None], None]:
            return functools.partial(self.skip_block, wg, end)

        acc = plgpu.layout_cast(jnp.zeros((block_q, D), jnp.float32), plgpu.Layout.WGMMA)
        carry = acc, full(M_INIT), full(0.0)
        plgpu.barrier_wait(smem.q_full.at[wg])
        block_range, wg_range = ranges()
        self.wait_k_full(block_range.start, block_range.end)
        wait_when(wg == 1, smem.schedule_barrier, wg)
        if self.config.window is not None or self.gmem.segment_ranges is not None:
            lax.fori_loop(block_range.start, wg_range.start, skip(block_range.end), None)
            carry = lax.fori_loop(wg_range.start, wg_range.interior_start, step(block_range.end, masked=True), carry)
        block_range, wg_range = ranges()
        carry = lax.fori_loop(
            wg_range.interior_start, wg_range.interior_end, step(block_range.end, masked=False), carry
        )
        block_range, wg_range = ranges()
        carry = lax.fori_loop(wg_range.interior_end, wg_range.end, step(block_range.end, masked=True), carry)
        block_range, wg_range = ranges()
        lax.fori_loop(wg_range.end, block_range.end, skip(block_range.end), None)

        @pl.when(wg == 0)
        def end_turn() -> None:
            plgpu.barrier_arrive(smem.schedule_barrier.at[1])

        self.epilogue(wg, *carry)

    def skip_block(self, wg: Array, end: Array, kv_block: Array, _: None) -> None:
        """Arrive at the barriers for a key block that only the other warpgroup sees."""
        smem, slot = self.smem, self.slot(kv_block)
        plgpu.barrier_arrive(smem.schedule_barrier.at[1 - wg])
        plgpu.barrier_arrive(smem.k_empty.at[slot])
        plgpu.barrier_wait(smem.v_full.at[slot])
        plgpu.barrier_wait(smem.schedule_barrier.at[wg])
        self.wait_k_full(kv_block + 1, end)
        plgpu.barrier_arrive(smem.v_empty.at[slot])

    def wait_k_full(self, kv_block: Array, end: Array) -> None:
        """Wait for the keys of a block, if it exists: each wait happens while the preceding block is in use."""

        @pl.when(kv_block < end)
        def wait() -> None:
            plgpu.barrier_wait(self.smem.k_full.at[self.slot(kv_block)])

    def kv_block_step(
        self, wg: Array, q_start: Array, end: Array, masked: bool, kv_block: Array, carry: Carry
    ) -> Carry:
        """Add one key block to the output."""
        config, smem, slot = self.config, self.smem, self.slot(kv_block)
        acc, m, l = carry

        def end_turn() -> None:
            plgpu.barrier_arrive(smem.schedule_barrier.at[1 - wg])

        def wait_for_next_k() -> None:
            self.wait_k_full(kv_block + 1, end)

        s = self.qk(smem.q_smem.at[wg], smem.k_smem.at[slot], end_turn)
        visible = self.visible(s.shape, q_start, kv_block, wg, slot) if masked else None
        plgpu.barrier_arrive(smem.k_empty.at[slot])

        unit = config.scale * LOG2E
        if config.softcap is not None:
            exact = self.out.lse is not None or config.softcap > LARGE_SOFTCAP
            s = softcap_tanh(s, config) if exact else jnp.tanh(s * (config.scale / config.softcap))
            unit = config.softcap * LOG2E
        elif unit <= 0:  # the largest product is not the largest score
            s, unit = s * unit, 1.0
        if visible is not None:
            s = jnp.where(visible, s, -jnp.inf)
        m_next = jnp.maximum(m, jnp.max(s, axis=1) * unit)
        decay = jnp.exp2(m - m_next)
        p = jnp.exp2(s * unit - per_row(m_next, s.shape[1]))
        l = l * decay + jnp.sum(p, axis=1)
        acc = acc * per_row(decay, acc.shape[1])
        p = p.astype(self.gmem.v.dtype)
        if not self.interpreted:  # orders the work before the turn for LLVM; ptxas 13.5 still scales acc after it
            acc, m_next, l, p = lax.optimization_barrier((acc, m_next, l, p))
        plgpu.barrier_wait(smem.v_full.at[slot])
        plgpu.barrier_wait(smem.schedule_barrier.at[wg])
        acc = self.add_pv(acc, p, smem.v_smem.at[slot], wait_for_next_k)
        plgpu.barrier_arrive(smem.v_empty.at[slot])
        return acc, m_next, l

    def visible(self, shape: tuple[int, int], q_start: Array, kv_block: Array, wg: Array, slot: Array) -> Array:
        """Return a mask of the visible pairs of the queries from `q_start` on and the keys of a block."""
        config, (rows, columns) = self.config, shape
        if config.causal:
            # Indices per row and per column: the compiler would keep indices per pair in registers across blocks.
            last_key = iota(rows, ROW_LAYOUT) + (q_start + config.S - config.T - kv_block * self.sizes.block_kv)
            column = iota(columns, COL_LAYOUT)
            if config.window is None:
                visible = per_column(column, rows) <= per_row(last_key, columns)
            else:  # as unsigned numbers, negative distances are longer than any window
                distance = per_row(last_key, columns) - per_column(column, rows)
                visible = distance.astype(jnp.uint32) < jnp.uint32(config.window)
        else:
            key = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
            visible = key < config.S - kv_block * self.sizes.block_kv
        if self.gmem.q_ids is not None:
            queries = pl.ds(self.q_start + wg * self.sizes.block_q, self.sizes.block_q)
            q_ids = plgpu.load(self.gmem.q_ids.at[self.batch, queries], layout=ROW_LAYOUT, optimized=False)
            kv_ids = plgpu.load(self.smem.kv_ids_smem.at[slot], layout=COL_LAYOUT)
            plgpu.commit_smem()  # before TMA writes the next ids there
            visible &= per_row(q_ids, columns) == per_column(kv_ids, rows)
        return visible

    # The interpreter has no wgmma, so it loads the operands from SMEM and multiplies values.

    def qk(self, q: Ref, k: Ref, meanwhile: Callable[[], None]) -> Array:
        """Return q k^T in float32; call `meanwhile` once the wgmma has started."""
        if self.interpreted:
            s = lax.dot_general(q[...], k[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
            plgpu.commit_smem()  # the loads used the generic proxy, and TMA writes through the async proxy
            meanwhile()
            return s

        def multiply(s_acc: Ref) -> Array:
            plgpu.wgmma(s_acc, q, k.transpose((1, 0)))
            meanwhile()
            return s_acc[...]

        return pl.run_scoped(multiply, plgpu.ACC((q.shape[0], k.shape[0]), jnp.float32))

    def add_pv(self, acc: Array, p: Array, v: Ref, meanwhile: Callable[[], None]) -> Array:
        """Return acc + p v in float32; call `meanwhile` once the wgmma has started."""
        if self.interpreted:
            acc = acc + jnp.dot(p, v[...], preferred_element_type=jnp.float32)
            plgpu.commit_smem()
            meanwhile()
            return acc

        def multiply(acc_ref: Ref) -> None:
            plgpu.wgmma(acc_ref, p, v)
            meanwhile()

        total: Any = pl.run_state(multiply)(plgpu.ACC.init(acc))
        return total

    def epilogue(self, wg: Array, acc: Array, m: Array, l: Array) -> None:
        """Normalize, gate and store the output of a warpgroup."""
        gmem, out, smem, D = self.gmem, self.out, self.smem, acc.shape[1]
        sees_no_key = l == 0.0
        acc = acc * per_row(jnp.where(sees_no_key, 0.0, 1.0 / jnp.where(sees_no_key, 1.0, l)), D)
        if out.lse is not None:
            lse = m + jnp.log2(jnp.where(sees_no_key, 1.0, l))
            smem.lse_smem[wg] = jnp.where(sees_no_key, jnp.inf, lse)
        if out.o_ungated is not None:
            self.store(wg, out.o_ungated, lambda columns: acc[:, columns])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        if gmem.gate_per_head is not None:
            sigmoid_gate = plgpu.load(self.q_rows_by_head(gmem.gate_per_head, wg), layout=ROW_LAYOUT, optimized=False)
            acc = acc * per_row(sigmoid_gate, D)
        if gmem.gate is not None:
            plgpu.barrier_wait(smem.gate_full.at[wg])
        self.store(wg, out.o, lambda columns: self.apply_gate(wg, acc[:, columns], columns))
        if out.lse is not None:
            plgpu.copy_smem_to_gmem(smem.lse_smem.at[wg], self.q_rows_by_head(out.lse, wg))
        plgpu.wait_smem_to_gmem(0)

    def apply_gate(self, wg: Array, o: Array, columns: slice) -> Array:
        """Multiply columns of the output by the sigmoid of the gate, if it has one logit per element."""
        if self.gmem.gate is None:
            return o
        gate_block, rows = self.gate_stage(wg)
        gate = plgpu.load(self.smem.k_smem.at[self.slot(gate_block), rows, columns], layout=plgpu.Layout.WGMMA)
        return o * jax.nn.sigmoid(gate.astype(jnp.float32))

    def store(self, wg: Array, ref: Ref, columns_of: Callable[[slice], Array]) -> None:
        """Store an output through q_smem, which is free by now, in strips of columns to save registers."""
        o_smem = self.smem.q_smem.at[wg]
        for start in range(0, o_smem.shape[1], STORE_COLUMNS):
            columns = slice(start, min(start + STORE_COLUMNS, o_smem.shape[1]))
            o_smem[:, columns] = columns_of(columns).astype(o_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(o_smem, self.q_rows(ref, wg))
