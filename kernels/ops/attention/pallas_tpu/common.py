"""One block of the score matrix, as the forward and backward TPU kernels process it.

A block has `block_q` queries of each of the G heads of one key head, packed to R = G block_q rows, against `block_kv`
keys. Blocks are transposed, with keys down and queries across, so that maxima and sums over keys add whole registers
and never cross lanes. A kernel processes a block in subtiles of `block_kv_compute` by `block_q_compute`, one matmul
each, and in phases, each a pass over all subtiles:

            rows ->                  phase 1   s = k q^T                  matrix unit
    keys    [0,0] [1,0] [2,0]        phase 2   mask, edge blocks only     vector unit
            [0,1] [1,1] [2,1]        phase 3   p = 2^(s - m)              transcendental unit
                                     phase 4   o += v^T p                 matrix unit

Blocks of q, gate, do, o and dq are [G, block_q, D] and those of k, v, dk and dv [keys, D], with D across; a subtile of
queries is one or more heads, or a part of one. Between phases the subtiles stay in scratch memory. One phase at a time
needs few registers; without the phases libtpu interleaves the work and spills more than it gains.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from dantinox.kernels.ops.attention.block_schedule import (
    FIRST_KV_BLOCK,
    LAST_KV_BLOCK,
    NEEDS_MASK,
    BlockSchedule,
)
from dantinox.kernels.ops.attention.common import (
    MASK_VALUE,
    NN,
    NO_OVERLAP,
    NT,
    PARTIAL_OVERLAP,
    AttentionConfig,
    dot_per_head,
    scale_scores,
    visible_mask,
)
from dantinox.kernels.ops.attention.pallas_tpu.block_sizes import TpuBlockSizes
from dantinox.kernels.ops.attention.pallas_tpu.refs import BlockRef

Array = jax.Array
KV_SHIFT, Q_SHIFT = 4, 18  # a packed block has 4 bits of flags, 14 of the key block and 13 of the query block
MAX_KV_BLOCKS, MAX_Q_BLOCKS = 2**14, 2**13
LOG2E = math.log2(math.e)  # factor that makes scores exponents of 2: the instruction is 2^x
MIN_D_TO_TRANSPOSE_ON_LOAD = 128  # the matrix unit takes as long to transpose fewer columns
MAX_ACC_IN_VREGS = 32 * 1024  # float32 of an accumulator that stays in registers: half of a TPU's 64 Ki


class PackedBlock(NamedTuple):
    """One step of a schedule; see `BlockSchedule`."""

    q: Any
    kv: Any
    flags: Any


def pack_blocks(schedule: BlockSchedule) -> np.ndarray:
    """Pack the query block, key block and flags of each step into one int32: scalar memory holds 2^18 of them."""
    return schedule.q << Q_SHIFT | schedule.kv << KV_SHIFT | schedule.flags


def unpack_block(word: Any) -> PackedBlock:
    """Undo `pack_blocks` for one step."""
    return PackedBlock(word >> Q_SHIFT, (word >> KV_SHIFT) & (MAX_KV_BLOCKS - 1), word & (2**KV_SHIFT - 1))


class BlockContext:
    """One grid step, as the kernel body sees it: a block of the score matrix, and the phases that process it.

    Args:
        config: static parameters of the kernel.
        block_table: packed block of each step; see `pack_blocks`.
        overlap_table: segment overlap [B, steps], or None without segments.
    """

    q_ids_ref: BlockRef | None = None
    kv_ids_ref: BlockRef | None = None

    def __init__(
        self,
        config: AttentionConfig[TpuBlockSizes],
        block_table: Any,
        overlap_table: Any | None = None,
    ) -> None:
        self.config = config
        self.head_step, self.step = pl.program_id(0), pl.program_id(1)
        self.word = block_table[self.step]
        self.q_block, self.kv_block, flags = unpack_block(self.word)
        self.is_first_kv_block = (flags & FIRST_KV_BLOCK) != 0
        self.is_last_kv_block = (flags & LAST_KV_BLOCK) != 0
        self.needs_mask = (flags & NEEDS_MASK) != 0
        self.overlaps: Array | None = None
        self.num_phases = 0
        if overlap_table is not None:
            heads_per_sequence = np.int32(pl.num_programs(0) // overlap_table.shape[0])
            overlap = overlap_table[jax.lax.div(self.head_step, heads_per_sequence), self.step]
            self.overlaps = overlap != NO_OVERLAP
            self.needs_mask = self.overlaps & (self.needs_mask | (overlap == PARTIAL_OVERLAP))

    def run_phase(self, body: Callable[[], None]) -> None:
        """Run a phase, unless no pair of the block shares a segment.

        Each phase has its own branch, which is always taken: it keeps libtpu from interleaving the phase with others,
        and libtpu would merge branches with equal conditions.
        """
        self.num_phases += 1
        always = self.word > -self.num_phases  # no word is negative, which libtpu cannot know
        pl.when(always if self.overlaps is None else always & self.overlaps)(body)

    def subtiles(self) -> Iterator[tuple[int, int]]:
        """Yield (query subtile, key subtile), query subtiles fastest."""
        num_q_subtiles, num_kv_subtiles = self.config.num_subtiles
        return ((r, c) for c in range(num_kv_subtiles) for r in range(num_q_subtiles))

    def accumulate_over_keys(
        self, acc_ref: BlockRef, a_ref: BlockRef, b_ref: BlockRef, decay_ref: BlockRef | None = None
    ) -> None:
        """Compute acc[r] = decay[r] acc[r] + sum_c a[c] b[r, c]."""
        num_q_subtiles, num_kv_subtiles = self.config.num_subtiles

        def decayed_acc(r: int) -> Array:
            return acc_ref.load(r) if decay_ref is None else decay_ref.load(r) * acc_ref.load(r)

        def partial_product(r: int, c: int) -> Array:
            return dot_per_head(a_ref.load(c), b_ref.load(r, c), NN)

        if acc_ref.subtile_size <= MAX_ACC_IN_VREGS:
            for r in range(num_q_subtiles):
                acc = decayed_acc(r)
                for c in range(num_kv_subtiles):
                    acc = acc + partial_product(r, c)
                acc_ref.store(acc, r)
        else:
            for r, c in self.subtiles():
                acc_ref.store((acc_ref.load(r) if c else decayed_acc(r)) + partial_product(r, c), r)

    def keys_times_queries(
        self, keys_ref: BlockRef, queries_ref: BlockRef, transposed_ref: BlockRef | None, r: int, c: int
    ) -> Array:
        """Compute k q^T [keys, rows] of a subtile, from the transposed queries if D is small.

        Args:
            keys_ref: subtiles [keys, D].
            queries_ref: subtiles [rows, D].
            transposed_ref: the same, [D, rows]; unused from `MIN_D_TO_TRANSPOSE_ON_LOAD` on.
            r: index of the subtile along the queries.
            c: index of the subtile along the keys.
        """
        k = keys_ref.load(c)
        if transposed_ref is not None and k.shape[-1] < MIN_D_TO_TRANSPOSE_ON_LOAD:
            return dot_per_head(k, transposed_ref.load(r), NN)
        return dot_per_head(k, queries_ref.load(r), NT)

    def transpose_keys(
        self, ref: BlockRef, transposed_ref: BlockRef, phase: Literal["exponentials", "products"]
    ) -> None:
        """Transpose the subtiles [keys, D] of the key block, in the phase where that takes the fewest bundles.

        The transpose unit is idle in both. Several subtiles would be transposed again for each product.
        """
        _, num_kv_subtiles = self.config.num_subtiles
        if phase == ("products" if num_kv_subtiles == 1 else "exponentials"):
            for c in range(num_kv_subtiles):
                transposed_ref.store(ref.load(c).T, c)

    def scores(self, qk: Array) -> Array:
        """Scale and cap the products k q^T; the scores are exponents of 2."""
        return scale_scores(self.config, qk, LOG2E)

    def apply_mask(self, s_ref: BlockRef, after: Callable[[Any, Any, Array], None] | None = None) -> None:
        """Mask the invisible pairs of an edge block, then call after(r, c, scores) for each subtile."""
        num_q_subtiles, num_kv_subtiles = self.config.num_subtiles

        def mask_subtile(n: Any, _: None) -> None:
            r, c = jax.lax.div(n, jnp.int32(num_kv_subtiles)), jax.lax.rem(n, jnp.int32(num_kv_subtiles))
            s = s_ref.load(r, c)
            s = jnp.where(self._visible(s.shape, r, c), s, MASK_VALUE)
            s_ref.store(s, r, c)
            if after is not None:
                after(r, c, s)

        @pl.when(self.needs_mask)
        def mask_all_subtiles() -> None:
            jax.lax.fori_loop(0, num_q_subtiles * num_kv_subtiles, mask_subtile, None)

    def _visible(self, shape: tuple[int, ...], r: Any, c: Any) -> Array:
        visible = visible_mask(self.config, shape, self.q_block, self.kv_block, r, c)
        if self.q_ids_ref is not None and self.kv_ids_ref is not None:
            q_ids, kv_ids = self.q_ids_ref.load(r), self.kv_ids_ref.load(c)
            # [1, n] as [n, 1]: the transpose unit takes whole registers.
            visible &= q_ids == jnp.broadcast_to(kv_ids, (128, kv_ids.shape[-1])).T[:, :1]
        return visible


class KvSpan(NamedTuple):
    """A range of keys whose gradients are summed in VMEM together, and the query blocks that see one of them.

    Query blocks before `shared_start` see no later key: their dq is finished here. Those before `continued_stop` see
    earlier keys too, and begin with the sum of the span before.

    Attributes:
        start: the first key block.
        stop: the key block after the last.
        schedule: the visible blocks.
        q_start: the first query block.
        q_stop: the query block after the last.
        shared_start: the first query block that the next span continues, or q_stop.
        continued_stop: the query block after the last that continues the span before, or q_start.
    """

    start: int
    stop: int
    schedule: BlockSchedule
    q_start: int
    q_stop: int
    shared_start: int
    continued_stop: int


def kv_spans(config: AttentionConfig[TpuBlockSizes]) -> list[KvSpan]:
    """Divide the keys into spans."""
    sizes = config.block_sizes
    num_kv_blocks, blocks_per_span = -(-config.S // sizes.block_kv), sizes.kv_span // sizes.block_kv
    starts = range(0, num_kv_blocks, blocks_per_span)
    ranges = [(start, min(start + blocks_per_span, num_kv_blocks)) for start in starts]
    # Only the schedule of all keys visits queries without a key.
    schedules = [config.block_schedule(each if len(ranges) > 1 else None) for each in ranges]
    q_starts = [int(schedule.q.min()) for schedule in schedules]
    q_stops = [int(schedule.q.max()) + 1 for schedule in schedules]
    return [
        KvSpan(
            *kv_range,
            schedules[n],
            q_starts[n],
            q_stops[n],
            shared_start=min([q_stops[n], *q_starts[n + 1 : n + 2]]),
            continued_stop=max([q_starts[n], *q_stops[max(n - 1, 0) : n]]),
        )
        for n, kv_range in enumerate(ranges)
    ]
