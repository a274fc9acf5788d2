"""Block sizes of decode attention on TPU."""

MAX_BLOCK_BYTES = 2**20  # of a block of keys; values take as much, and both are double-buffered


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


def _power_of_two_below(n: int) -> int:
    """Return the largest power of two up to n."""
    return 1 << n.bit_length() - 1
