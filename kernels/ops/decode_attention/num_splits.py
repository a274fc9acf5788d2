"""How many splits the kernels of GPUs divide the tokens of a sequence into."""

SPLIT_OVERHEAD = 2  # prologue and epilogue of a thread block, in block loads


def choose_num_splits(B: int, K: int, num_blocks: int, resident_blocks: int) -> int:
    """Return the splits per sequence that fill the SMs; a batch gets more, because its lengths may differ.

    Args:
        B: sequences.
        K: KV heads.
        num_blocks: largest number of blocks of tokens that a sequence visits.
        resident_blocks: thread blocks that run at a time.
    """

    def estimate_time(n: int) -> float:
        """Return the block loads of a batch of equal lengths plus those of a batch of evenly spread lengths."""
        waves, blocks_per_split = -(-B * K * n // resident_blocks), num_blocks / n
        equal = waves * (blocks_per_split + SPLIT_OVERHEAD)
        if B == 1:
            return equal
        return equal + B * K * num_blocks / 2 / resident_blocks + blocks_per_split + waves * SPLIT_OVERHEAD

    candidates = range(1, max(1, min(num_blocks // 2, 4 * resident_blocks // (B * K))) + 1)
    best = min(map(estimate_time, candidates))
    return next(n for n in candidates if estimate_time(n) <= 1.1 * best)
