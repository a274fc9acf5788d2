"""Shared by the forward and backward TPU kernels: one block of the score matrix.

A block has `block_q` queries of each of the G heads of one key head, packed to R = G block_q rows, against `block_kv`
keys. Blocks are transposed, with keys down and queries across, so that maxima and sums over keys add whole registers
and never cross lanes. A kernel processes a block in subtiles of `block_kv_compute` by `block_q_compute`, one matmul
each, and in phases, each a pass over all subtiles:

            rows ->                  phase 1   s = k q^T                  matrix unit
    keys    [0,0] [1,0] [2,0]        phase 2   mask, edge blocks only     vector unit
            [0,1] [1,1] [2,1]        phase 3   p = 2^(s - m)              transcendental unit
                                     phase 4   o += v^T p                 matrix unit

Between phases the subtiles stay in scratch memory. One phase at a time needs few registers; without the phases libtpu
interleaves the work and spills more than it gains. On a CPU a block is one subtile.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from dantinox.kernels.ops.attention.pallas_tpu.block_schedule import (
    FIRST_KV_BLOCK,
    FIRST_USE_OF_KV,
    LAST_KV_BLOCK,
    NEEDS_MASK,
    BlockSchedule,
    make_block_schedule,
)
from dantinox.kernels.ops.attention.pallas_tpu.refs import BlockRef, SubtileRef

Array = jax.Array
LOG2E = math.log2(math.e)
M_INIT = -1e30  # start of the running maximum, below every real score
MASK_VALUE = -2e38  # a masked score: 2^(MASK_VALUE - M_INIT) is 0, so rows without a key keep a sum of 0
NO_OVERLAP, PARTIAL_OVERLAP, FULL_OVERLAP = 0, 1, 2  # pairs of a block that share a segment: none, some, all
MAX_ACC_IN_VREGS = 32 * 1024  # float32 of an accumulator that stays in registers: half of a TPU's 64 Ki
NN, NT = ((1,), (0,)), ((1,), (1,))  # a b and a b^T


class AttentionBlockSizes(NamedTuple):
    """How much one step of the grid processes, and one matmul of the step.

    Attributes:
        kv_heads: key heads per step.
        block_q: queries per block, of each of the G heads of a key head; a power of two.
        block_kv: keys per block.
        block_q_compute: packed queries per matmul; divides G block_q, and divides block_q or is a multiple of it.
        block_kv_compute: keys per matmul; divides block_kv.
        kv_span: keys whose gradients stay in VMEM together; a multiple of block_kv.
        kv_blocks_per_step: key blocks that a step of the forward kernel processes as one. Above 1 only in interpret
            mode, and then all that a query block sees.
    """

    kv_heads: int
    block_q: int
    block_kv: int
    block_q_compute: int
    block_kv_compute: int
    kv_span: int
    kv_blocks_per_step: int = 1


class AttentionKernelConfig(NamedTuple):
    """Everything known when a kernel is traced; T and S are the lengths without padding."""

    T: int
    S: int
    G: int
    causal: bool
    window: int | None
    scale: float
    softcap: float | None
    block_sizes: AttentionBlockSizes
    interpret: Any

    @property
    def score_scale(self) -> float:
        """Factor that makes scores exponents for `exp`: log2(e) on a TPU, whose instruction is 2^x; 1 on a CPU."""
        return 1.0 if self.interpret else LOG2E

    def exp(self, x: Array) -> Array:
        """e^(x / score_scale)."""
        return jnp.exp(x) if self.interpret else jnp.exp2(x)

    @property
    def num_subtiles(self) -> tuple[int, int]:
        """Subtiles of a block along the packed queries and along the keys."""
        sizes = self.block_sizes
        return self.G * sizes.block_q // sizes.block_q_compute, sizes.block_kv // sizes.block_kv_compute

    def block_schedule(
        self, kv_block_range: tuple[int, int] | None = None, kv_blocks_per_step: int = 1
    ) -> BlockSchedule:
        """Lists the visible blocks, of a range of key blocks or of all; see `make_block_schedule`."""
        return make_block_schedule(
            self.T,
            self.S,
            self.block_sizes.block_q,
            self.block_sizes.block_kv,
            causal=self.causal,
            window=self.window,
            kv_block_range=kv_block_range,
            kv_blocks_per_step=kv_blocks_per_step,
        )


class SegmentTables(NamedTuple):
    """Segment ids in the layout of the kernels.

    Attributes:
        q_ids: [heads, query subtiles, 1, block_q_compute].
        kv_ids: [heads, key subtiles, 1, block_kv_compute].
        overlap: [heads, query blocks, key blocks]: NO_OVERLAP, PARTIAL_OVERLAP or FULL_OVERLAP.
    """

    q_ids: Array
    kv_ids: Array
    overlap: Array


def dot_per_head(a: Array, b: Array, contract: tuple[tuple[int], tuple[int]]) -> Array:
    """a b in float32, over the last two axes; the axes before are heads."""
    heads = tuple(range(a.ndim - 2))
    dims = tuple(tuple(axis + len(heads) for axis in side) for side in contract)
    return jax.lax.dot_general(a, b, (dims, (heads, heads)), preferred_element_type=jnp.float32)


class BlockContext:
    """One step of the grid, seen from inside a kernel: which block it processes, and what phases share.

    Args:
        q_block_table: query block of each step; likewise kv_block_table and flags_table.
        overlap_table: segment overlap [head groups, steps], or None without segments.
    """

    q_ids_ref: SubtileRef | None = None
    kv_ids_ref: SubtileRef | None = None

    def __init__(
        self,
        config: AttentionKernelConfig,
        q_block_table: Any,
        kv_block_table: Any,
        flags_table: Any,
        overlap_table: Any | None = None,
    ) -> None:
        self.config = config
        self.head_step, self.step = pl.program_id(0), pl.program_id(1)
        self.q_block, self.kv_block = q_block_table[self.step], kv_block_table[self.step]
        self.flags = flags_table[self.step]
        self.is_first_kv_block = (self.flags & FIRST_KV_BLOCK) != 0
        self.is_last_kv_block = (self.flags & LAST_KV_BLOCK) != 0
        self.is_first_use_of_kv = (self.flags & FIRST_USE_OF_KV) != 0
        self.needs_mask = (self.flags & NEEDS_MASK) != 0
        self.overlaps: Array | None = None
        self.num_phases = 0
        if overlap_table is not None:
            overlap = overlap_table[self.head_step, self.step]
            self.overlaps = overlap != NO_OVERLAP
            self.needs_mask = self.overlaps & (self.needs_mask | (overlap == PARTIAL_OVERLAP))

    def run_phase(self, body: Callable[[], None]) -> None:
        """Runs a phase, unless no pair of the block shares a segment.

        On a TPU each phase has its own branch, which is always taken: it keeps libtpu from interleaving the phase with
        others, and libtpu would merge branches with equal conditions. In interpret mode XLA would run a branch on one
        core, so the phase always runs and the mask does the rest.
        """
        if self.config.interpret:
            body()
            return
        self.num_phases += 1
        always = self.flags > -self.num_phases
        pl.when(always if self.overlaps is None else always & self.overlaps)(body)

    def subtiles(self) -> Iterator[tuple[int, int]]:
        """(query subtile, key subtile), query subtiles fastest."""
        num_q_subtiles, num_kv_subtiles = self.config.num_subtiles
        return ((r, c) for c in range(num_kv_subtiles) for r in range(num_q_subtiles))

    def accumulate_over_keys(
        self, acc_ref: BlockRef, a_ref: SubtileRef, b_ref: SubtileRef, decay_ref: SubtileRef | None = None
    ) -> None:
        """acc[r] = decay[r] acc[r] + sum_c a[c] b[r, c]."""
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

    def scores(self, qk: Array) -> Array:
        """Scales and caps the products k q^T; the scores are exponents for `AttentionKernelConfig.exp`."""
        scale, softcap, score_scale = self.config.scale, self.config.softcap, self.config.score_scale
        if softcap is None:
            return qk * (scale * score_scale)
        return jnp.tanh(qk * (scale / softcap)) * (softcap * score_scale)

    def apply_mask(self, s_ref: SubtileRef, after: Callable[[Any, Any, Array], None] | None = None) -> None:
        """Masks the invisible pairs of an edge block, then calls after(r, c, scores) for each subtile."""
        num_q_subtiles, num_kv_subtiles = self.config.num_subtiles

        def mask_subtile(n: Any, _: None) -> None:
            r, c = n // num_kv_subtiles, n % num_kv_subtiles
            s = s_ref.load(r, c)
            s = jnp.where(self._visible(s.shape, r, c), s, MASK_VALUE)
            s_ref.store(s, r, c)
            if after is not None:
                after(r, c, s)

        if self.config.interpret:
            for n in range(num_q_subtiles * num_kv_subtiles):
                mask_subtile(n, None)
        else:

            @pl.when(self.needs_mask)
            def mask_all_subtiles() -> None:
                jax.lax.fori_loop(0, num_q_subtiles * num_kv_subtiles, mask_subtile, None)

    def _visible(self, shape: tuple[int, ...], r: Any, c: Any) -> Array:
        config, sizes = self.config, self.config.block_sizes
        key = jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 2)
        row = jax.lax.broadcasted_iota(jnp.int32, (*shape[:-2], 1, shape[-1]), len(shape) - 1)
        q_minus_kv_start = (
            self.q_block * sizes.block_q
            + config.S
            - config.T
            - self.kv_block * sizes.block_kv
            - c * sizes.block_kv_compute
        )
        if not config.causal:
            visible = key < config.S - self.kv_block * sizes.block_kv - c * sizes.block_kv_compute
        else:
            distance = ((row + r * sizes.block_q_compute) & (sizes.block_q - 1)) + q_minus_kv_start - key
            if config.window is None:
                visible = distance >= 0
            else:  # as an unsigned number, a negative distance is past every window
                visible = distance.astype(jnp.uint32) < config.window
        if self.q_ids_ref is not None and self.kv_ids_ref is not None:
            visible &= self.q_ids_ref.load(r) == self._row_to_column(self.kv_ids_ref.load(c))
        return visible

    def _row_to_column(self, row: Array) -> Array:
        """[..., 1, n] as [..., n, 1]. The transpose unit takes whole registers."""
        if self.config.interpret:
            return row.swapaxes(-1, -2)
        return jnp.broadcast_to(row, (128, row.shape[-1])).T[:, :1]


def kv_spans(config: AttentionKernelConfig) -> list[tuple[int, int] | None]:
    """Ranges of key blocks whose gradients are summed in VMEM together; [None] if one range holds all."""
    sizes = config.block_sizes
    num_kv_blocks, blocks_per_span = -(-config.S // sizes.block_kv), sizes.kv_span // sizes.block_kv
    if num_kv_blocks <= blocks_per_span:
        return [None]
    return [(start, min(start + blocks_per_span, num_kv_blocks)) for start in range(0, num_kv_blocks, blocks_per_span)]
