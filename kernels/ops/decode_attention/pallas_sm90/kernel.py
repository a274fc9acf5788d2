"""Decode attention on Hopper: one kernel appends to the ring buffers and attends in splits, a reduction combines them.

Math      s = cap(scale q k^T) log2(e);  p = 2^(s - m);  o = sum(p v) / sum(p);  lse = m + log2(sum(p));
          o = sigmoid(gate) * sum(2^lse o) / sum(2^lse) over the splits in a fixed order, so two runs are bit-equal;
          a sink joins as one more split whose o is 0 and whose lse is its logit times log2(e).
Tiling    grid (splits, K, B), one thread block of one warpgroup each. The blocks of slots that hold visible tokens are
          numbered from the oldest on and divided evenly between the splits; a thread block never reads another's.

              blocks of slots ->   0   1   2   3   4   5
              split 0              ░   ░   ░   ▞   █   ░      ▞ edge: scores masked, invisible rows of v zeroed
              split 1              █   n   ░   ░   ░   █      n edge that also receives new tokens
                                                              ░ neither loaded nor computed
          The G query heads of a KV head, times T new tokens, are the first of the 64 rows of a wgmma. TMA loads blocks
          of keys and of values into two pipelines of SMEM stages; each stage is refilled as soon as it has been read.
          The kernel inserts new tokens into their blocks in SMEM and stores them from SMEM to the ring buffer: no
          other thread block reads these blocks.
State     m, l [64] and the output [64, D] of one split, in float32 registers.
Traffic   reads the visible blocks of k and v once, for any C, and q once per split; writes one slot of each ring
          buffer per new token, in place, and o [ceil8(T G), D] and lse [64] per split in float32. 256 K D FLOPs per
          visible token, as rows without a query are multiplied too: still less time than the loads take.
Limits    bfloat16, float16, with a cache of the same dtype; D a multiple of 16 up to 256; T G up to 64; C a multiple of
          8. The scaled scores times log2(e) and the sum of the visible values have to fit float32. No
          gradient. `dantinox.kernels.decode_attention` raises ValueError, and NotImplementedError beyond these limits.
Source    Dao, Flash-Decoding (2023).
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dantinox.kernels.mosaic_gpu import TMA_ROWS, tuned_head_dim, wgmma_smem
from dantinox.kernels.ops.decode_attention.gradient import without_gradient
from dantinox.kernels.ops.decode_attention.kv_cache import KVCache, append_token, append_tokens
from dantinox.kernels.ops.decode_attention.num_splits import choose_num_splits
from dantinox.kernels.ops.decode_attention.numbers import split_scale
from dantinox.kernels.ops.decode_attention.pallas_sm90.limits import BLOCK_H, num_stages, unsupported_reason
from dantinox.kernels.ops.decode_attention.pallas_sm90.refs import CacheRefs, SplitRefs, SplitScratch
from dantinox.kernels.ops.decode_attention.pallas_sm90.splits import (
    BLOCK_KV,
    RESIDENT_BLOCKS,
    SplitConfig,
    SplitRange,
    combine_splits,
    max_visible_blocks,
    split_range,
)
from dantinox.kernels.ops.decode_attention.rows import group_rows, group_sinks, ungroup_rows
from dantinox.kernels.softcap import cap_scores
from dantinox.kernels.vma import call_invariant, varying_shape

Array = jax.Array
Ref = Any  # a reference in GMEM or SMEM, or a barrier
LOG2E = math.log2(math.e)
M_INIT = float(jnp.finfo(jnp.float32).min)  # every block has a visible slot
TMA_COLUMNS = 64  # of 16 bits: TMA reads SMEM from multiples of 128 bytes on
ROW_LAYOUT, COL_LAYOUT = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
INVISIBLE = 2**30  # the age of a slot that no query sees
INSERT_COLUMNS = 64  # columns held in registers at once while the new token is inserted


def decode_attention(
    q: Array,
    k: Array,
    v: Array,
    cache: KVCache,
    *,
    gate: Array | None,
    window: int | None,
    scale: float,
    softcap: float | None,
    sinks: Array | None = None,
    num_splits: int | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[Array, KVCache]:
    """See `dantinox.kernels.decode_attention`, which checks the arguments.

    `num_splits` is the number of splits per sequence; None chooses one for an H100. `interpret` interprets the kernel
    on the CPU.

    Raises:
        NotImplementedError: the kernel does not support the dtype, head dim, number of heads or number of slots.
    """
    if (reason := unsupported_reason(q, cache)) is not None:
        raise NotImplementedError(f"decode_attention: implementation='pallas' cannot run here: {reason}")
    (B, *tokens, H, D), (K, C) = q.shape, cache.k.shape[1:3]
    T = tokens[0] if tokens else 1
    if 0 in (B, H):
        return jnp.zeros_like(q), append_tokens(cache, k, v) if tokens else append_token(cache, k, v)
    max_visible = C if window is None else min(C, int(window))
    if num_splits is None:
        num_blocks = max_visible_blocks(C, min(C, max_visible + T - 1))
        num_splits = choose_num_splits(B, K, num_blocks, RESIDENT_BLOCKS[tuned_head_dim(D)])
    q, scale = split_scale(q, scale)
    config = SplitConfig(C, max_visible, num_splits, scale, softcap, interpret, T, H // K)
    q, k, v, cache, gate, sinks = without_gradient((q, k, v, cache, gate, sinks), "pallas")
    return call_invariant(functools.partial(_append_and_attend, config), q, k, v, cache, gate, sinks)


def _append_and_attend(
    config: SplitConfig, q: Array, k: Array, v: Array, cache: KVCache, gate: Array | None, sinks: Array | None
) -> tuple[Array, KVCache]:
    """Run the kernel and combine its splits -> (o in q's shape, the updated cache)."""
    K, num_rows = k.shape[-2], config.T * config.G
    rows = jnp.pad(group_rows(q, K), ((0, 0), (0, 0), (0, -num_rows % TMA_ROWS), (0, 0)))
    new_k, new_v = (_pad_columns(group_rows(x.astype(q.dtype), K)) for x in (k, v))
    cache_k, cache_v = jax.new_ref(cache.k), jax.new_ref(cache.v)
    o, lse = _attend_in_splits(rows, new_k, new_v, cache.length.astype(jnp.int32), cache_k, cache_v, config)
    log2_sinks = None if sinks is None else group_sinks(sinks, K, config.T)[..., 0].astype(jnp.float32) * LOG2E
    o = ungroup_rows(combine_splits(o[..., :num_rows, :], lse[..., :num_rows], log2_sinks), q.shape)
    if gate is not None:
        o = o * jax.nn.sigmoid(gate.astype(jnp.float32))
    return o.astype(q.dtype), KVCache(jax.freeze(cache_k), jax.freeze(cache_v), cache.length + config.T)


def _pad_columns(x: Array) -> Array:
    """Pad the last axis so that each vector begins at an address in SMEM that TMA reads from."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % TMA_COLUMNS)])


def _attend_in_splits(
    q: Array, k: Array, v: Array, length: Array, cache_k: Ref, cache_v: Ref, config: SplitConfig
) -> tuple[Array, Array]:
    """Return (o [splits, B, K, rows, D], lse [splits, B, K, BLOCK_H]) float32; update the cache references.

    q is [B, K, rows, D] with rows a multiple of `TMA_ROWS`; k and v [B, K, T, padded D] are the new tokens.
    """
    B, K, num_rows, D = q.shape
    k_stages, v_stages = num_stages(D, config.T)

    scratch_types = SplitScratch(
        k_full=plgpu.Barrier(num_barriers=k_stages),
        k_smem=wgmma_smem((k_stages, BLOCK_KV, D), q.dtype),
        # The output reuses the memory of the values.
        v_or_out_smem=plgpu.RefUnion(
            [wgmma_smem((v_stages, BLOCK_KV, D), q.dtype)],
            [wgmma_smem((BLOCK_H, D), jnp.float32), plgpu.SMEM((BLOCK_H,), jnp.float32)],
        ),
        new_kv_smem=plgpu.SMEM((2, *k.shape[2:]), q.dtype),
        q_full=plgpu.Barrier(num_arrivals=3),
        q_smem=wgmma_smem((BLOCK_H, D), q.dtype),
        v_full=plgpu.Barrier(num_barriers=v_stages),
    )
    return plgpu.kernel(
        functools.partial(_split_kernel, config),
        out_type=(
            varying_shape((config.num_splits, B, K, num_rows, D), jnp.float32, q),
            varying_shape((config.num_splits, B, K, BLOCK_H), jnp.float32, q),
        ),
        scratch_types=scratch_types,
        grid=(config.num_splits, K, B),
        grid_names=("split", "head", "batch"),
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        interpret=config.interpret,
        kernel_name="decode_attention",
    )(q, k, v, length, cache_k, cache_v)


def _split_kernel(
    config: SplitConfig,
    q: Ref,
    new_k: Ref,
    new_v: Ref,
    length: Ref,
    cache_k: Ref,
    cache_v: Ref,
    o: Ref,
    lse: Ref,
    *scratch_refs: Ref,
) -> None:
    scratch = SplitScratch(*scratch_refs)
    (v_smem,), (o_smem, lse_smem) = scratch.v_or_out_smem
    refs = SplitRefs(
        q, new_k, new_v, o, lse, q_smem=scratch.q_smem, q_full=scratch.q_full, o_smem=o_smem, lse_smem=lse_smem
    )
    keys = CacheRefs(cache_k, scratch.k_smem, scratch.k_full, scratch.new_kv_smem, 0)
    values = CacheRefs(cache_v, v_smem, scratch.v_full, scratch.new_kv_smem, 1)
    split, kv_head, batch = (lax.axis_index(name) for name in ("split", "head", "batch"))
    SplitKernel(refs, keys, values, config, split, kv_head, batch, split_range(length[batch], split, config)).run()


def fill_rows(x: float) -> Array:
    """Return x for each row of a tile, [BLOCK_H]."""
    return plgpu.layout_cast(jnp.full((BLOCK_H,), x, jnp.float32), ROW_LAYOUT)


def broadcast_rows(x: Array, shape: tuple[int, ...]) -> Array:
    """Broadcast one value per row over the columns."""
    return lax.broadcast_in_dim(x, shape, [0])


class SplitKernel(NamedTuple):
    """One thread block, which processes one split of one sequence and KV head."""

    refs: SplitRefs
    keys: CacheRefs
    values: CacheRefs
    config: SplitConfig
    split: Any
    kv_head: Any
    batch: Any
    block_range: SplitRange

    def run(self) -> None:
        """Attend to the blocks of this split, or store a log-sum-exp of -inf if it has none."""
        refs, start, stop = self.refs, self.block_range.start, self.block_range.stop
        pl.when(start < stop)(self.attend)

        @pl.when(start == stop)
        def mark_empty() -> None:
            refs.lse_smem[...] = fill_rows(-jnp.inf)

        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(refs.lse_smem, refs.lse.at[self.split, self.batch, self.kv_head])
        plgpu.wait_smem_to_gmem(0)

    def ring_block(self, i: Any) -> Any:
        """Return the index in the ring buffer of the i-th visited block."""
        return lax.rem(self.block_range.first + i, jnp.int32(-(-self.config.C // BLOCK_KV)))

    def stage(self, cache: CacheRefs, i: Any) -> Any:
        """Return the SMEM stage of the i-th visited block."""
        return lax.rem(i - self.block_range.start, jnp.int32(cache.num_stages))

    def load(self, cache: CacheRefs, i: Any) -> None:
        """Start the load of the i-th visited block, if this split has one."""

        @pl.when(i < self.block_range.stop)
        def start_copy() -> None:
            stage = self.stage(cache, i)
            slots = pl.ds(self.ring_block(i) * BLOCK_KV, BLOCK_KV)
            block = cache.ring_buffer.at[self.batch, self.kv_head, slots]
            plgpu.copy_gmem_to_smem(block, cache.blocks.at[stage], cache.full.at[stage])

    def attend(self) -> None:
        """Store the output of this split, and its log-sum-exp in SMEM."""
        refs, (*_, start, stop) = self.refs, self.block_range
        D = refs.q.shape[-1]
        padded_rows = refs.q.at[self.batch, self.kv_head, pl.ds(0, BLOCK_H)]  # TMA fills missing rows with zeros
        plgpu.copy_gmem_to_smem(padded_rows, refs.q_smem, refs.q_full)
        for tokens, cache in ((refs.new_k, self.keys), (refs.new_v, self.values)):
            plgpu.copy_gmem_to_smem(tokens.at[self.batch, self.kv_head], cache.new_tokens, refs.q_full)
        for n in range(max(self.keys.num_stages, self.values.num_stages)):
            for cache in (self.keys, self.values):
                if n < cache.num_stages:
                    self.load(cache, start + n)
        acc = plgpu.layout_cast(jnp.zeros((BLOCK_H, D), jnp.float32), plgpu.Layout.WGMMA)
        plgpu.barrier_wait(refs.q_full)
        acc, m, l = lax.fori_loop(start, stop, self.kv_block_step, (acc, fill_rows(M_INIT), fill_rows(0.0)))
        refs.lse_smem[...] = m + jnp.log2(l)
        refs.o_smem[...] = acc * broadcast_rows(1 / l, acc.shape)
        plgpu.commit_smem()
        rows = pl.ds(0, refs.o.shape[-2])
        plgpu.copy_smem_to_gmem(refs.o_smem.at[rows], refs.o.at[self.split, self.batch, self.kv_head])

    def kv_block_step(self, i: Any, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        """Update (acc, m, l) with the i-th visited block."""
        config, refs = self.config, self.refs
        acc, m, l = carry
        first_slot = self.ring_block(i) * BLOCK_KV
        has_new_token, is_edge = self.classify(i, first_slot)

        k_stage = self.stage(self.keys, i)
        plgpu.barrier_wait(self.keys.full.at[k_stage])
        pl.when(has_new_token)(lambda: self.insert_new_tokens(self.keys, k_stage, first_slot))
        s = self.qk_scores(refs.q_smem, self.keys.blocks.at[k_stage])
        self.load(self.keys, i + self.keys.num_stages)

        score_scale = config.scale * LOG2E
        if config.softcap is not None:
            s, score_scale = cap_scores(s, scale=config.scale, softcap=config.softcap, unit=LOG2E), 1.0
        elif score_scale == 0:  # 0 times a masked score is NaN
            s, score_scale = s * score_scale, 1.0

        def mask_scores(s: Array) -> Array:
            return jnp.where(self.visible_scores(s.shape, first_slot), s, -jnp.inf)

        s = lax.cond(is_edge, mask_scores, lambda s: s, s)
        m_new = jnp.maximum(m, jnp.max(s, axis=1) * score_scale)
        decay = jnp.exp2(m - m_new)
        p = jnp.exp2(s * score_scale - broadcast_rows(m_new, s.shape))
        l = l * decay + jnp.sum(p, axis=1)
        acc = acc * broadcast_rows(decay, acc.shape)

        v_stage = self.stage(self.values, i)
        plgpu.barrier_wait(self.values.full.at[v_stage])
        pl.when(is_edge)(lambda: self.insert_new_tokens(self.values, v_stage, first_slot))
        pl.when(has_new_token)(lambda: self.store_new_tokens(first_slot))
        acc = self.accumulate_pv(acc, p.astype(self.values.ring_buffer.dtype), self.values.blocks.at[v_stage])
        self.load(self.values, i + self.values.num_stages)
        return acc, m_new, l

    def slots(self, shape: tuple[int, int], axis: int, first_slot: Any) -> Array:
        """Return the slot indices along one axis of a block that begins at `first_slot`."""
        return first_slot + plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)

    def classify(self, i: Any, first_slot: Any) -> tuple[Any, Any]:
        """Return whether the i-th visited block receives new tokens, and whether a query does not see all of it."""
        config, num_slots = self.config, self.config.C - first_slot
        if config.T == 1:
            has_new_token = lax.div(self.block_range.slot, jnp.int32(BLOCK_KV)) == self.ring_block(i)
            return has_new_token, has_new_token | (i == 0) | (num_slots < BLOCK_KV)
        age = self.age(first_slot)  # the largest of the block, unless it holds the newest token
        has_new_token = age - lax.min(num_slots, jnp.int32(BLOCK_KV)) + 1 < config.T
        seen_by_all = age < (self.block_range.num_visible if config.window is None else config.window)
        return has_new_token, has_new_token | ~seen_by_all | (num_slots < BLOCK_KV)

    def age(self, slots: Any) -> Any:
        """Return how many tokens after the token of each slot the newest one comes, modulo the ring buffer."""
        age = self.block_range.slot - slots
        return jnp.where(age < 0, age + self.config.C, age)

    def visible_slots(self, shape: tuple[int, int], axis: int, first_slot: Any) -> Array:
        """Return a mask of the slots of a block that hold tokens that a query sees, the new ones included."""
        slots = self.slots(shape, axis, first_slot)
        return (self.age(slots) < self.block_range.num_visible) & (slots < self.config.C)

    def visible_scores(self, shape: tuple[int, int], first_slot: Any) -> Array:
        """Return a mask of the scores of a block: which slots the query of each row sees."""
        config, visible = self.config, self.visible_slots(shape, 1, first_slot)
        if config.T == 1:
            return visible
        age = jnp.where(visible, self.age(self.slots(shape, 1, first_slot)), INVISIBLE)
        token = lax.div(self.slots(shape, 0, 0), jnp.int32(config.G))  # T or more in rows without a query
        distance = age + token - (config.T - 1)
        return (distance >= 0) & (distance < (config.C if config.window is None else config.window))

    def for_each_new_token(self, first_slot: Any, body: Callable[[Any, Any], None]) -> None:
        """Run body(t, slot) for each new token t of a block that has at least one."""
        config, newest = self.config, self.block_range.slot
        if config.T == 1:
            body(0, newest)
            return

        def run(t: Any, _: None) -> None:
            slot = newest - (config.T - 1) + t
            slot = jnp.where(slot < 0, slot + config.C, slot)
            pl.when((slot >= first_slot) & (slot < first_slot + BLOCK_KV))(lambda: body(t, slot))

        lax.fori_loop(0, config.T, run, None)

    def insert_new_tokens(self, cache: CacheRefs, stage: Any, first_slot: Any) -> None:
        """Write the new tokens into a block in SMEM and zero values that no query sees, which may be NaN."""

        def rewrite(t: Any = None, slot: Any = None) -> None:
            for start in range(0, cache.blocks.shape[-1], INSERT_COLUMNS):
                columns = slice(start, min(start + INSERT_COLUMNS, cache.blocks.shape[-1]))
                x = plgpu.load(cache.blocks.at[stage, :, columns], layout=plgpu.Layout.WGMMA)
                if cache is self.values:
                    x = jnp.where(self.visible_slots(x.shape, 0, first_slot), x, 0)
                if t is not None:
                    new = plgpu.load(cache.new_tokens.at[t, columns], layout=COL_LAYOUT)
                    is_new = self.slots(x.shape, 0, first_slot) == slot
                    x = jnp.where(is_new, lax.broadcast_in_dim(new, x.shape, [1]), x)
                cache.blocks[stage, :, columns] = x

        if self.config.T > 1 and cache is self.values:
            rewrite()
        self.for_each_new_token(first_slot, rewrite)
        plgpu.commit_smem()

    def store_new_tokens(self, first_slot: Any) -> None:
        """Store the new tokens of a block in their slots of the ring buffers, after the loads of the block."""

        def store(t: Any, slot: Any) -> None:
            for cache in (self.keys, self.values):
                token = cache.new_tokens.at[t, pl.ds(0, cache.blocks.shape[-1])]
                plgpu.copy_smem_to_gmem(token, cache.ring_buffer.at[self.batch, self.kv_head, slot])

        self.for_each_new_token(first_slot, store)

    # The interpreter has no wgmma, so it loads the operands from SMEM and multiplies values.

    def qk_scores(self, q: Ref, k: Ref) -> Array:
        """Compute q k^T in float32."""
        if self.config.interpret is not None:
            s = lax.dot_general(q[...], k[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
            plgpu.commit_smem()  # the loads used the generic proxy, and TMA writes through the async proxy
            return s

        def multiply(s: Ref) -> Array:
            plgpu.wgmma(s, q, k.transpose((1, 0)))
            return s[...]

        return pl.run_scoped(multiply, plgpu.ACC((q.shape[0], k.shape[0]), jnp.float32))

    def accumulate_pv(self, acc: Array, p: Array, v: Ref) -> Array:
        """Compute acc + p v in float32."""
        if self.config.interpret is not None:
            acc = acc + jnp.dot(p, v[...], preferred_element_type=jnp.float32)
            plgpu.commit_smem()
            return acc
        total: Any = pl.run_state(lambda acc: plgpu.wgmma(acc, p, v))(plgpu.ACC.init(acc))
        return total
