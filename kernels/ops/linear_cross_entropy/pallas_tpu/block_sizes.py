"""Block sizes of the linear cross-entropy on a TPU, and of the same kernels where a CPU interprets them.

A kernel that goes through the vocabulary for one block of rows reads all of w once per block: 2 block_n FLOPs per
element of w, of which a TPU v6e needs 570 per byte in bfloat16. So blocks of rows are as large as fits.
"""

from typing import NamedTuple

from dantinox.kernels.dispatch import Device
from dantinox.kernels.tuning import tunable

VMEM_BYTES = 56 * 2**20  # of the 64 MiB of the smallest chip
BLOCK_BYTES = 40 * 2**20  # of these for blocks and scratch memory; the rest serves the compiler
LANES, PACKED_ROWS = 128, 16  # rows of w are padded to whole registers of 16 bits
SIZES = ((1024, 512), (512, 512), (512, 256), (256, 256), (256, 128), (128, 128))  # (block_n, block_v), decreasing
CPU_SIZES = (8192, 2048)


class BlockSizes(NamedTuple):
    """The blocks of one grid step and their parts.

    Attributes:
        block_n: rows of h.
        block_v: rows of w.
        sub_n, sub_v: rows of h and of w whose logits are in registers at a time.
    """

    block_n: int
    block_v: int
    sub_n: int = 256
    sub_v: int = 128


def round_up(size: int, multiple: int) -> int:
    """Return the least multiple that is at least `size`."""
    return -(-size // multiple) * multiple


def vmem_bytes(block_n: int, block_v: int, M: int, itemsize: int) -> int:
    """Return the VMEM of a step of the larger backward kernel: two buffers per block, sums, logits, gradients."""
    width = round_up(M, LANES)
    blocks = 2 * itemsize * width * (block_n + block_v + max(block_n, block_v))
    return blocks + 4 * width * max(block_n, block_v) + (4 + itemsize) * block_n * block_v


def fitting_sizes(M: int, itemsize: int) -> tuple[int, int] | None:
    """Return the largest (block_n, block_v) that fit into VMEM, or None."""
    return next((sizes for sizes in SIZES if vmem_bytes(*sizes, M, itemsize) <= BLOCK_BYTES), None)


@tunable
def block_sizes(device: Device, N: int, V: int, M: int, itemsize: int) -> BlockSizes:
    """Return the block sizes for N rows and a vocabulary of V; small problems are one block.

    Args:
        device: the device.
        N: rows of h.
        V: rows of w.
        M: width of both.
        itemsize: bytes per element.
    """
    if device.platform == "cpu":
        block_n, block_v = (min(size, most) for size, most in zip(CPU_SIZES, (N, V), strict=True))
        return BlockSizes(block_n, block_v, block_n, block_v)
    sizes = fitting_sizes(M, itemsize)
    assert sizes is not None  # `limits.py` refuses the others
    return BlockSizes(min(sizes[0], round_up(N, LANES)), min(sizes[1], round_up(V, PACKED_ROWS)))
