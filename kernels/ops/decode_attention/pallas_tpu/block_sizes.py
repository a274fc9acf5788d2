"""Block sizes of decode attention, and when its interpreted kernel is too slow."""

from dantinox.kernels.dispatch import current_device

CPU_BLOCK_SIZE = 512  # slots
TPU_BLOCK_BYTES = 2**20  # of a block of keys; values take as much, and both are double-buffered


def choose_block_size(C: int, max_visible: int, tile_slots: int, slot_bytes: int, interpret: bool) -> int:
    """Returns the slots per block: a power of two, or all of a short ring buffer that consists of whole memory tiles.

    Args:
        C: slots of a ring buffer.
        max_visible: upper bound on the tokens that a query attends to.
        tile_slots: slots that are written at once.
        slot_bytes: bytes of the keys in one slot.
        interpret: whether the kernel is interpreted on a CPU.
    """
    if interpret and C <= CPU_BLOCK_SIZE:
        return C
    # A window covers half of its first and last block on average: small against it, but long enough to load.
    for_window = max(256, _power_of_two_below(max_visible) // 16)
    if interpret:
        largest = CPU_BLOCK_SIZE
    else:
        largest = max(tile_slots, min(1024, for_window, _power_of_two_below(TPU_BLOCK_BYTES // slot_bytes)))
    block_size = min(largest, max(tile_slots, 1 << (max_visible - 1).bit_length()))
    if block_size < C:
        return block_size
    return C if C % tile_slots == 0 else max(tile_slots, _power_of_two_below(C))


def _power_of_two_below(n: int) -> int:
    """The largest power of two up to n."""
    return 1 << n.bit_length() - 1


def xla_is_faster(C: int) -> bool:
    """Whether plain XLA is faster than the interpreted kernel even if the ring buffers are half full.

    Measured on 2 cores, relative to `xla.py`: one full ring buffer of 4096 slots 0.8, of 32768 0.7, eight of 4096 0.7;
    3000 of 4096 slots 0.8, eight times 1500 0.5; 512 of 32768 1 / 13.
    """
    return current_device().platform == "cpu" and C < 1024
