"""Block sizes and memory layout of decode attention on TPU."""

from dantinox.kernels.tuning import tunable

LANES = 128
TILE_BYTES = 32  # rows x bytes per value of a memory tile
MAX_BLOCK_BYTES = 2**20  # of a block of keys; values take as much, and both are double-buffered
MAX_BYTES_PER_HEAD = 64 * 2**10  # of the keys of a block, if the core processes two heads at a time
VMEM_LIMIT_BYTES = 48 * 2**20  # of the smallest chip's 64 MiB


def tokens_in_lanes(C: int, D: int) -> bool:
    """Return whether XLA keeps a ring buffer [B, K, C, D] with the tokens in lanes, and so does the kernel.

    XLA chooses the layout with less padding: heads of 64 in lanes would be padded to 128. A kernel that asked for the
    other layout would make XLA copy all ring buffers before and after each step.
    """
    return _round_up(D, 8) * _round_up(C, LANES) < _round_up(C, 8) * _round_up(D, LANES)


def slot_bytes(*, K: int, C: int, D: int, itemsize: int) -> int:
    """Return the bytes of the keys of one slot in VMEM, padding included."""
    return K * itemsize * _round_up(D, TILE_BYTES // itemsize if tokens_in_lanes(C, D) else LANES)


def smallest_block_bytes(*, H: int, K: int, C: int, D: int, itemsize: int) -> int:
    """Return the VMEM that the kernel takes with its smallest block, about."""
    tile_slots = LANES if tokens_in_lanes(C, D) else TILE_BYTES // itemsize
    queries = K * _round_up(H // K, 8) * _round_up(D, LANES) * 4
    return 4 * tile_slots * slot_bytes(K=K, C=C, D=D, itemsize=itemsize) + 8 * queries


@tunable
def choose_block_size(C: int, max_visible: int, tile_slots: int, slot_bytes: int) -> int:
    """Return the slots per block: a power of two, or C if a short ring buffer consists of whole memory tiles.

    Args:
        C: slots of a ring buffer.
        max_visible: upper bound on the tokens that a query attends to.
        tile_slots: slots that are written at once.
        slot_bytes: bytes of the keys in one slot.
    """
    # A window covers half of its first and last block on average: small against it, but long enough to load.
    for_window = max(256, _power_of_two_below(max_visible) // 16)
    largest = max(tile_slots, min(1024, for_window, _power_of_two_below(MAX_BLOCK_BYTES // slot_bytes)))
    block_size = min(largest, max(tile_slots, 1 << (max_visible - 1).bit_length()))
    if block_size < C:
        return block_size
    return C if C % tile_slots == 0 else max(tile_slots, _power_of_two_below(C))


def heads_per_iteration(*, K: int, D: int, block_size: int, itemsize: int) -> int:
    """Return how many heads the loop over the heads of a block processes at a time.

    Two heads fill each other's gaps: on v6e, with 32 heads of 128 slots, the second adds 151 bundles to the masked and
    the unmasked loop together. Where a head's keys take longer to load than to multiply, they would only spill.
    """
    return 2 if K % 2 == 0 and block_size * D * itemsize <= MAX_BYTES_PER_HEAD else 1


def _power_of_two_below(n: int) -> int:
    """Return the largest power of two up to n."""
    return 1 << n.bit_length() - 1


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
