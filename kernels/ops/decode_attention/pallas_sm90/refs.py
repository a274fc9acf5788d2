"""The memory of one thread block of Hopper's decode kernel."""

from typing import Any, NamedTuple

Ref = Any  # a reference in GMEM or SMEM, or a barrier


class SplitScratch(NamedTuple):
    """Scratch memory of one thread block, in order of allocation."""

    k_full: Ref
    k_smem: Ref
    v_or_out_smem: Ref
    new_kv_smem: Ref
    q_full: Ref
    q_smem: Ref
    v_full: Ref


class SplitRefs(NamedTuple):
    """References of one thread block: operands and results in GMEM, then SMEM and barriers."""

    q: Ref
    new_k: Ref
    new_v: Ref
    o: Ref
    lse: Ref
    q_smem: Ref
    q_full: Ref
    o_smem: Ref
    lse_smem: Ref


class CacheRefs(NamedTuple):
    """The keys or the values of one thread block.

    Attributes:
        ring_buffer: [B, K, C, D] in GMEM.
        blocks: [stages, BLOCK_KV, D] in SMEM.
        full: one barrier per stage.
        new_kv: keys and values of the T new tokens, [2, T, D] in SMEM, with D padded to rows that TMA reads.
        index: index of this cache in new_kv: 0 for keys, 1 for values.
    """

    ring_buffer: Ref
    blocks: Ref
    full: Ref
    new_kv: Ref
    index: int

    @property
    def new_tokens(self) -> Ref:
        """The new tokens' vectors, [T, D] in SMEM."""
        return self.new_kv.at[self.index]

    @property
    def num_stages(self) -> int:
        """Number of SMEM stages."""
        return self.blocks.shape[0]
