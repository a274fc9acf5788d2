"""Block sizes of the grouped matmuls on Hopper.

A tile has 128 rows, of which 64 are not multiplied where they are nobody's, so what is chosen is
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
