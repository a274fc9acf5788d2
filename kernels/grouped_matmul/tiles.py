"""Tile sizes of the grouped matmuls.

On a TPU every step of the grid should have the whole contraction: then a group's matrix is read once, and no sum
waits in memory. The model counts the bytes that tiles make a kernel move. A CPU's tiles are in `interpreted.py`.

On Hopper (`hopper`) a tile has 128 rows, of which 64 are not multiplied where they are nobody's, so what is chosen is
how many columns: a wide tile reads less for what it multiplies; a narrow one leaves fewer cores idle at the end, and
fewer columns past the last. The model counts clocks, of the slowest core; how rows are spread over groups is not known
when a program is compiled, and is taken for even. Of what 132 cores can multiply until the last is done, so much is
wanted:

    sizes                                       128 x 256 for all   chosen      the best of all widths
    Mixtral, 8192 rows: y                       97.0%               256: 97.0%  64: 99.6%, at half the FLOPs a byte
    256 experts, 512 rows each: 7168 -> 1024    97.0%               256: 97.0%  64: 99.3%
    256 experts: 1024 -> 7168; 128 groups       99.6%; 99.0%        256         64: 100%; 99.8%
    Qwen3, 128 experts, Zipf                    89.5%               256: 89.5%  256: what is lost is ends of groups
    1000 rows, 5 groups, 384 -> 640             14.8%               64: 59.2%   64
    64 rows, 8 groups, 4096 -> 14336            85% of 4 rounds     128: 97%    64: 97%

Where there is enough to do the widest tile stays; narrow ones are for decoding and for small models.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from kernels.dispatch import Device

VMEM_BYTES = 56 * 2**20  # of the smallest chip's 64
BLOCK_BYTES = 36 * 2**20  # of them for blocks, each twice; what is left serves sums and the compiler
UNROLLED = 7 * 2**28  # multiplications that are written out, what is more in a loop: code is read from memory too

HEIGHT, ROWS, INNER = 128, 64, 64  # Hopper: rows of a tile, and of a warpgroup; of the contraction at once
PRODUCTS = 2048  # multiplications a clock of a core
# Per clock and core: what L2 delivers where all cores read at once (the port takes 64); a share of 3.35 TB/s.
L2_BYTES, MEMORY_BYTES = 38, 14.5
WORTH = 1.05  # a narrower tile must be faster by that: the model is no measurement, and a wide one reads less
START, COLUMN = 600, 6  # clocks, guessed (`make gpu` fits them): before a tile's first product; to write a column


class Tile(NamedTuple):
    """On Hopper: columns of each matrix that a tile has, and the stages of its ring."""

    columns: int
    stages: int


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


def hopper(N: int, E: int, K: int, J: int, cores: int, *, widths: tuple[int, ...], matrices: int = 1) -> Tile:
    """For [N, K] times [E, K, J] on Hopper; with `matrices` as many such products at once of the same rows.

    Args:
        widths: columns of all matrices together that a tile may have.
    """
    return _fastest(widths, matrices, lambda tile: clocks(product_work(N, E, K, J), tile, matrices, cores))


def hopper_sum(N: int, E: int, M: int, F: int, cores: int, *, widths: tuple[int, ...]) -> Tile:
    """For the sums over rows [N, M]^T [N, F]: [E, M, F] on Hopper."""
    return _fastest(widths, 1, lambda tile: clocks(sum_work(N, E, M, F), tile, 1, cores))


class Work(NamedTuple):
    """What is to be multiplied, as the model of a Hopper chip sees it.

    Attributes:
        visits: tiles of rows. units: of 64 rows that are multiplied, of each. sharing: visits of a group, which read
            a matrix from memory once.
        K: the contraction. J: columns.
    """

    visits: float
    units: float
    sharing: float
    K: int
    J: int


def product_work(N: int, E: int, K: int, J: int) -> Work:
    """Of [N, K] times [E, K, J]."""
    busy = max(1, min(N, E))
    # What is left over at the end of a group is half a tile on average.
    of_group = lambda size: max(1.0, N / busy / size + 0.5 * (E > 1))
    return Work(busy * of_group(HEIGHT), of_group(ROWS) / of_group(HEIGHT), of_group(HEIGHT), K, J)


def sum_work(N: int, E: int, M: int, F: int) -> Work:
    """Of the sums over rows [N, M]^T [N, F]: [E, M, F]."""
    down = math.ceil(M / HEIGHT)
    # A group begins at a multiple of 8 and ends anywhere: half a piece of 64 rows is not its own.
    return Work(E * down, 2, down, N // max(1, min(N, E)) + INNER // 2, F)


def clocks(
    work: Work,
    tile: Tile,
    matrices: int,
    cores: int,
    *,
    start: float = START,
    column: float = COLUMN,
    l2: float = L2_BYTES,
) -> float:
    """What the slowest core of a Hopper chip takes, in clocks; `l2`: bytes per clock and core."""
    width = tile.columns * matrices
    products = work.units * ROWS * width * INNER / PRODUCTS
    from_l2 = 2 * (HEIGHT + width) * INNER / l2
    from_memory = 2 * width * INNER / min(work.sharing, 16) / MEMORY_BYTES
    each = start + math.ceil(work.K / INNER) * max(products, from_l2, from_memory) + column * width
    return math.ceil(work.visits * math.ceil(work.J / tile.columns) / cores) * each


def tile_of(width: int, matrices: int = 1) -> Tile:
    """A tile of so many columns of all matrices together: as many stages as there is memory for, a power of two."""
    return Tile(width // matrices, 8 if width == 64 else 4)


def _fastest(widths: tuple[int, ...], matrices: int, time: Callable[[Tile], float]) -> Tile:
    """The widest that is nearly the fastest."""
    found = [tile_of(width, matrices) for width in sorted(widths, reverse=True)]
    best = min(map(time, found))
    return next(tile for tile in found if time(tile) <= WORTH * best)
