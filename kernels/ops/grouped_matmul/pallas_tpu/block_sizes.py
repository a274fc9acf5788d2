"""Block sizes of the grouped matmuls on a TPU.

Every step of the grid should have the whole contraction: then a group's matrix is read once, and no sum
waits in memory. The model counts the bytes that tiles make a kernel move. A CPU's tiles are in `pallas_cpu/gmm.py`.
"""

from typing import NamedTuple

from dantinox.kernels.dispatch import Device

VMEM_BYTES = 56 * 2**20  # of the smallest chip's 64
BLOCK_BYTES = 36 * 2**20  # of them for blocks, each twice; what is left serves sums and the compiler
UNROLLED = 7 * 2**28  # multiplications that are written out, what is more in a loop: code is read from memory too


class Tiles(NamedTuple):
    """What one step takes.

    Attributes:
        rows: rows of x, and of these as many at once as `chunk`: what of a tile a group does not touch is skipped.
        inner: of the contraction; in a sum over rows, columns of x.
        columns: of the output, and of these as many at once as `strip`.
        height, width: of the output of one product. Where sums wait, a chunk is a multiple of the height.
        part: of the contraction of one product; smaller than `inner`, its sums wait in memory.
        lead: of the contraction, what a stream takes of all its rows before all else, in the first columns: the queue
            of results is full sooner. These sums wait in memory.
        chunks: a visit with fewer rows than a tile multiplies so many chunks in one stream at most.
        vmem: bytes that the kernel may take.
    """

    rows: int
    chunk: int
    inner: int
    columns: int
    strip: int
    height: int = 128
    width: int = 256
    part: int | None = None
    lead: int | None = None
    chunks: int = 1
    vmem: int = VMEM_BYTES


def vmem(here: Device) -> tuple[tuple[int, int], ...]:
    """(bytes of VMEM that a kernel may take, of them for a product's blocks), the rule and what a large chip has.

    Only what needs more takes more: XLA keeps other arrays of a program there.
    """
    small = VMEM_BYTES, BLOCK_BYTES
    return (small, (2 * VMEM_BYTES, 80 * 2**20)) if any(kind in here.kind for kind in ("v5", "v6")) else (small,)


def piece(here: Device, inner: int, *, transposed: bool) -> tuple[int, int, int | None]:
    """(height, width, part) of what libtpu multiplies at once, by its schedules.

    A product is as wide as the matrix unit. v5e's unit is 128 wide; the results of newer ones are 256 wide, and v6e
    adds them up in its 64 registers: 128 rows leave half of them free. A matrix that is transposed on its way into the
    unit takes twice as long to load, which only 256 rows pay for. A contraction that two parts make needs no register
    to wait in. TPU7x adds up in the unit.
    """
    if "v5" in here.kind:
        return 256, 128, None
    if "v6" not in here.kind:
        return 256, 256, None
    part = 256 if 256 < inner <= 512 else 512 if 512 < inner <= 1024 else None
    return 256 if transposed else 128, 256, part


def rows(here: Device, N: int, E: int, *, transposed: bool = False) -> tuple[int, int]:
    """(rows of a tile, rows of a chunk) for N rows in E groups.

    A chunk has as few rows as keep the matrix unit busy while it takes a matrix in: 128, but 256 where the unit is
    fast (TPU7x), or where taking in is slow (v6e, transposed).
    """
    each = max(1, N // E)
    tile = 512 if each >= 256 else 256 if each >= 128 else 128
    return tile, min(tile, 128 if "v5" in here.kind or ("v6" in here.kind and not transposed) else 256)


def product(
    here: Device,
    N: int,
    E: int,
    K: int,
    J: int,
    *,
    xs: int,
    ws: int,
    wide: int,
    transposed: bool,
    itemsize: int,
    plain: bool = False,
) -> Tiles:
    """For [N, K] times [E, K, J]: `xs` and `ws` such operands, `wide` arrays [N, J] read or written.

    Args:
        plain: the sums leave as they are.
    """
    tile, chunk = rows(here, N, E, transposed=transposed)
    visits = -(-N // tile) + E - 1
    best: tuple[float, int, int, int] | None = None
    limits = vmem(here)
    for inner in _sides(K, 8192):
        for columns in _sides(J, 2048 * len(limits)):
            blocks = xs * tile * inner + ws * inner * columns + wide * tile * columns
            sums = 4 * ws * (chunk if inner >= K else tile) * columns
            taken = next((taken for taken, most in limits if 2 * itemsize * blocks + sums <= most), None)
            if taken is None:
                continue
            again = visits if inner < K else min(visits, E)  # times that a column of a matrix is read
            moved = xs * visits * tile * K * -(-J // columns) + ws * again * K * J
            found = moved, -inner, taken, columns
            best = min(best or found, found)
    _, inner, taken, columns = best or (0, -min(K, 512), VMEM_BYTES, min(J, 512))
    inner = -inner
    products = ws * tile * min(inner, K)
    # On a v6e, one step with more than 2048 of a contraction takes minutes to compile from here on.
    unrolled = 2**29 if "v6" in here.kind and K == inner > 2048 else UNROLLED
    strips = [side for side in _sides(columns, 2048) if columns % side == 0 and side * products <= unrolled]
    # A product is 256 wide: of an odd half the unit's other half has nothing to do.
    strip = max(strips, key=lambda side: (side % 256 == 0 or side == columns, side), default=columns)
    height, width, part = piece(here, inner, transposed=transposed)
    # What is nothing but a product may wait in memory while all rows of a tile meet a matrix that is taken in once:
    # the more rows, the sooner v6e's queue of results is full. No sum of more than two parts is long in registers.
    if plain and "v6" in here.kind and (transposed or inner <= 1024 or inner < K):
        height, part = tile, 512 if inner > 512 else None
    lead = 512 if plain and part is None and "v6" in here.kind and K == inner > 1024 and ws == 1 else None
    chunks = max(1, tile // chunk - 1) if plain and "v5" not in here.kind else 1
    if sum(range(1, chunks + 2)) * chunk * inner * strip > 2**31:  # libtpu takes minutes
        chunks = 1
    return Tiles(tile, chunk, inner, columns, strip, height, width, part, lead, chunks, taken)


def summed(here: Device, N: int, E: int, M: int, F: int, *, dys: int, itemsize: int) -> Tiles:
    """For the sums over rows [N, M]^T [N, F]: [E, M, F], `dys` of them at once."""
    tile, _ = rows(here, N, E)
    best: tuple[float, int, int] | None = None
    for inner in _sides(M, 2048):
        for columns in _sides(F, 2048):
            blocks = tile * inner + dys * tile * columns + dys * inner * columns
            if 2 * itemsize * blocks + 4 * dys * inner * columns > BLOCK_BYTES:
                continue
            moved = M * -(-F // columns) + dys * F * -(-M // inner)
            best = min(best or (moved, inner, columns), (moved, inner, columns))
    inner, columns = (min(M, 512), min(F, 512)) if best is None else best[1:]
    # Of x as many columns at once: its transpose needs registers beside the products.
    return Tiles(tile, tile, inner, columns, columns, height=128, width=piece(here, inner, transposed=False)[1])


def _sides(size: int, most: int) -> list[int]:
    """The whole side where it is at most so long, and multiples of 128 that divide it; 512 where there are none."""
    found = [size] if size <= most else []
    found += [side for side in range(128, min(size - 1, most) + 1, 128) if size % side == 0]
    return found or [512]
