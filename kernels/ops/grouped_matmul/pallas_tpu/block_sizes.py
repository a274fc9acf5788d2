"""Block sizes of the grouped matmuls on a TPU.

Every grid step should cover the whole contraction: then a group's weights are read once and no partial sums stay in
VMEM. The model counts the bytes that a kernel moves with given blocks. A CPU's tiles are in `pallas_cpu/gmm.py`.
"""

from typing import NamedTuple

from dantinox.kernels.dispatch import Device
from dantinox.kernels.tuning import tunable

VMEM_BYTES = 56 * 2**20  # of the 64 MiB of the smallest chip
BLOCK_BYTES = 36 * 2**20  # of these for double-buffered blocks; the rest serves sums and the compiler
# Multiplications in straight-line code; more run in a loop, since the core fetches its code from memory.
MAX_UNROLLED = 7 * 2**28


class GmmBlockSizes(NamedTuple):
    """The blocks of one grid step and their parts.

    Attributes:
        block_m: rows of x.
        block_m_sub: rows per chunk; the kernel skips the chunks of a tile that a group does not touch.
        block_k: depth of the contraction; in tgmm, columns of x.
        block_n: columns of the output.
        block_n_sub: columns per strip.
        mxu_m, mxu_n: rows and columns of one product. With partial sums, a chunk is a multiple of mxu_m.
        block_k_sub: depth of the contraction of one product; if smaller than block_k, partial sums stay in VMEM.
        leading_k: leading part of the contraction, which all rows multiply first, in the first columns, so that the
            result queue fills sooner. These partial sums stay in VMEM.
        max_chunks: chunks per instruction stream at most, in a visit with fewer rows than a tile.
        vmem_bytes: VMEM that the kernel may use.
    """

    block_m: int
    block_m_sub: int
    block_k: int
    block_n: int
    block_n_sub: int
    mxu_m: int = 128
    mxu_n: int = 256
    block_k_sub: int | None = None
    leading_k: int | None = None
    max_chunks: int = 1
    vmem_bytes: int = VMEM_BYTES


def vmem_limits(device: Device) -> tuple[tuple[int, int], ...]:
    """Return pairs (VMEM bytes of a kernel, of these for blocks): the default, then the limit of a large chip.

    Only kernels that need more get more, because XLA keeps other arrays of a program in VMEM.
    """
    default = VMEM_BYTES, BLOCK_BYTES
    large = 2 * VMEM_BYTES, 80 * 2**20
    # "TPU v5" is the v5p, with 64 MiB.
    return (default, large) if any(kind in device.kind for kind in ("v5 lite", "v5e", "v6")) else (default,)


def mxu_tile(device: Device, block_k: int, *, transposed: bool) -> tuple[int, int, int | None]:
    """Return the (mxu_m, mxu_n, block_k_sub) that libtpu schedules best.

    A product is as wide as the matrix unit. The v5e unit is 128 wide; newer ones are 256 wide, and v6e accumulates in
    its 64 registers, of which 128 rows leave half free. Weights that are transposed on their way into the unit take
    twice as long to load, which only 256 rows amortize. Partial sums of a contraction in two parts occupy no registers
    while they wait. TPU7x accumulates in the unit.
    """
    if "v5" in device.kind:
        return 256, 128, None
    if "v6" not in device.kind:
        return 256, 256, None
    block_k_sub = 256 if 256 < block_k <= 512 else 512 if 512 < block_k <= 1024 else None
    return 256 if transposed else 128, 256, block_k_sub


def choose_block_m(device: Device, N: int, E: int, *, transposed: bool = False) -> tuple[int, int]:
    """Return (block_m, block_m_sub) for N rows in E groups.

    A chunk has the fewest rows that keep the matrix unit busy while it loads weights: 128, but 256 where the unit is
    fast (TPU7x) or loading is slow (v6e, transposed).
    """
    rows_per_group = max(1, N // E)
    block_m = 512 if rows_per_group >= 256 else 256 if rows_per_group >= 128 else 128
    return block_m, min(block_m, 128 if "v5" in device.kind or ("v6" in device.kind and not transposed) else 256)


@tunable
def gmm_block_sizes(
    device: Device,
    N: int,
    E: int,
    K: int,
    J: int,
    *,
    num_x: int,
    num_w: int,
    num_matrices: int,
    transposed: bool,
    itemsize: int,
    has_epilogue: bool = True,
) -> GmmBlockSizes:
    """Choose the sizes for [N, K] times [E, K, J].

    Args:
        device: the chip.
        N: rows.
        E: groups.
        K: contraction.
        J: columns of the output.
        num_x: number of arrays [N, K].
        num_w: number of arrays [E, K, J].
        num_matrices: number of arrays [N, J] read or written.
        transposed: whether the weights are [E, J, K].
        itemsize: bytes per element.
        has_epilogue: whether an epilogue transforms the sums before they are written.
    """
    block_m, block_m_sub = choose_block_m(device, N, E, transposed=transposed)
    visits = -(-N // block_m) + E - 1
    best: tuple[float, int, int, int] | None = None
    limits = vmem_limits(device)
    for block_k in _block_candidates(K, 8192):
        for block_n in _block_candidates(J, 2048 * len(limits)):
            blocks = num_x * block_m * block_k + num_w * block_k * block_n + num_matrices * block_m * block_n
            sums = 4 * num_w * (block_m_sub if block_k >= K else block_m) * block_n
            vmem_bytes = next((vmem for vmem, limit in limits if 2 * itemsize * blocks + sums <= limit), None)
            if vmem_bytes is None:
                continue
            weight_reads = visits if block_k < K else min(visits, E)  # per column of the weights
            moved = num_x * visits * block_m * K * -(-J // block_n) + num_w * weight_reads * K * J
            candidate = moved, -block_k, vmem_bytes, block_n
            best = min(best or candidate, candidate)
    _, negated_k, vmem_bytes, block_n = best or (0, -min(K, 512), VMEM_BYTES, min(J, 512))
    block_k = -negated_k
    products = num_w * block_m * min(block_k, K)
    # On v6e, more multiplications than this take minutes to compile if a step contracts more than 2048.
    max_unrolled = 2**29 if "v6" in device.kind and K == block_k > 2048 else MAX_UNROLLED
    strips = [
        size for size in _block_candidates(block_n, 2048) if block_n % size == 0 and size * products <= max_unrolled
    ]
    # A product is 256 wide: with an odd number of halves, one product leaves half of the unit idle.
    block_n_sub = max(strips, key=lambda size: (size % 256 == 0 or size == block_n, size), default=block_n)
    mxu_m, mxu_n, block_k_sub = mxu_tile(device, block_k, transposed=transposed)
    # Partial sums without an epilogue may stay in VMEM while all rows of a tile multiply weights that are loaded once:
    # the more rows, the sooner v6e's result queue is full. A sum of two parts does not occupy registers for long.
    if not has_epilogue and "v6" in device.kind and (transposed or block_k <= 1024 or block_k < K):
        mxu_m, block_k_sub = block_m, 512 if block_k > 512 else None
    can_lead = not has_epilogue and block_k_sub is None and num_w == 1
    leading_k = 512 if can_lead and "v6" in device.kind and K == block_k > 1024 else None
    max_chunks = max(1, block_m // block_m_sub - 1) if not has_epilogue and "v5" not in device.kind else 1
    if sum(range(1, max_chunks + 2)) * block_m_sub * block_k * block_n_sub > 2**31:  # libtpu takes minutes
        max_chunks = 1
    return GmmBlockSizes(
        block_m,
        block_m_sub,
        block_k,
        block_n,
        block_n_sub,
        mxu_m,
        mxu_n,
        block_k_sub,
        leading_k,
        max_chunks,
        vmem_bytes,
    )


@tunable
def tgmm_block_sizes(device: Device, N: int, E: int, M: int, F: int, *, num_dy: int, itemsize: int) -> GmmBlockSizes:
    """Choose the sizes for the sums over rows [N, M]^T [N, F]: [E, M, F], `num_dy` of them at once."""
    block_m, _ = choose_block_m(device, N, E)
    best: tuple[float, int, int] | None = None
    for block_k in _block_candidates(M, 2048):
        for block_n in _block_candidates(F, 2048):
            blocks = block_m * block_k + num_dy * block_m * block_n + num_dy * block_k * block_n
            if 2 * itemsize * blocks + 4 * num_dy * block_k * block_n > BLOCK_BYTES:
                continue
            moved = M * -(-F // block_n) + num_dy * F * -(-M // block_k)
            best = min(best or (moved, block_k, block_n), (moved, block_k, block_n))
    block_k, block_n = (min(M, 512), min(F, 512)) if best is None else best[1:]
    # 128 columns of x at a time, because the transpose also needs registers.
    mxu_n = mxu_tile(device, block_k, transposed=False)[1]
    return GmmBlockSizes(block_m, block_m, block_k, block_n, block_n, mxu_m=128, mxu_n=mxu_n)


def _block_candidates(size: int, max_size: int) -> list[int]:
    """Return the full size if it is at most `max_size` and the multiples of 128 that divide it; [512] if none do."""
    candidates = [size] if size <= max_size else []
    candidates += [block for block in range(128, min(size - 1, max_size) + 1, 128) if size % block == 0]
    return candidates or [512]
