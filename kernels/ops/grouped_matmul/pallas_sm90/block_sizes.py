"""Block sizes of the grouped matmuls on Hopper.

A tile has 128 rows, and a warpgroup skips its 64 if none belongs to the group, so only the number of columns is chosen:
a wide tile reads fewer bytes per FLOP; a narrow one leaves fewer SMs idle at the end and wastes fewer columns past the
last. The model estimates the cycles of the slowest SM; the group sizes are unknown at compile time and assumed equal.
The share of the products of 132 SMs, until the last one ends, that the output needs:

    sizes                                       128 x 256 for all   chosen      best of all widths
    Mixtral, 8192 rows: y                       97.0%               256: 97.0%  64: 99.6%, at half the FLOPs per byte
    256 experts, 512 rows each: 7168 -> 1024    97.0%               256: 97.0%  64: 99.3%
    256 experts: 1024 -> 7168; 128 groups       99.6%; 99.0%        256         64: 100%; 99.8%
    Qwen3, 128 experts, Zipf                    89.5%               256: 89.5%  256: the loss is at the ends of groups
    1000 rows, 5 groups, 384 -> 640             14.8%               64: 59.2%   64
    64 rows, 8 groups, 4096 -> 14336            85% of 4 rounds     128: 97%    64: 97%

Large problems keep the widest tile; narrow ones are for decoding and small models.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

HEIGHT, ROWS, INNER = 128, 64, 64  # rows per tile and per warpgroup; contraction per stage
PRODUCTS = 2048  # multiply-adds per cycle and SM
# Bytes per cycle and SM: from L2 while all SMs read (the port takes 64); a share of 3.35 TB/s.
L2_BYTES, MEMORY_BYTES = 38, 14.5
MIN_SPEEDUP = 1.05  # required of a narrower tile: the model is not a measurement, and a wide tile reads less
# Guesses, which `make gpu` fits: cycles before the first product of a tile, and to store one column.
TILE_OVERHEAD_CYCLES, STORE_CYCLES_PER_COLUMN = 600, 6


class Tile(NamedTuple):
    """Columns per tile of each matrix, and SMEM stages."""

    columns: int
    stages: int


def hopper(N: int, E: int, K: int, J: int, cores: int, *, widths: tuple[int, ...], matrices: int = 1) -> Tile:
    """Chooses the tile of [N, K] times [E, K, J], or of `matrices` such products of the same rows at once.

    Args:
        widths: allowed columns per tile, of all matrices together.
    """
    return _fastest(widths, matrices, lambda tile: estimate_cycles(gmm_work(N, E, K, J), tile, matrices, cores))


def choose_tgmm_tile(N: int, E: int, M: int, F: int, cores: int, *, widths: tuple[int, ...]) -> Tile:
    """Chooses the tile of the sums over rows [N, M]^T [N, F]: [E, M, F]."""
    return _fastest(widths, 1, lambda tile: estimate_cycles(tgmm_work(N, E, M, F), tile, 1, cores))


class TileWork(NamedTuple):
    """The work of one product, as the cost model sees it.

    Attributes:
        visits: tiles of rows.
        units: warpgroup halves of 64 rows that are multiplied per tile.
        sharing: tiles per group, which together read a matrix from memory once.
        K: contraction.
        J: columns.
    """

    visits: float
    units: float
    sharing: float
    K: int
    J: int


def gmm_work(N: int, E: int, K: int, J: int) -> TileWork:
    """Returns the work of [N, K] times [E, K, J]."""
    nonempty_groups = max(1, min(N, E))

    def tiles_per_group(rows: int) -> float:
        # The last tile of a group is half full on average.
        return max(1.0, N / nonempty_groups / rows + 0.5 * (E > 1))

    per_group = tiles_per_group(HEIGHT)
    return TileWork(nonempty_groups * per_group, tiles_per_group(ROWS) / per_group, per_group, K, J)


def tgmm_work(N: int, E: int, M: int, F: int) -> TileWork:
    """Returns the work of the sums over rows [N, M]^T [N, F]: [E, M, F]."""
    row_tiles = math.ceil(M / HEIGHT)
    # A group ends anywhere, so half a stage of 64 rows belongs to others on average.
    return TileWork(E * row_tiles, 2, row_tiles, N // max(1, min(N, E)) + INNER // 2, F)


def estimate_cycles(
    work: TileWork,
    tile: Tile,
    matrices: int,
    cores: int,
    *,
    start: float = TILE_OVERHEAD_CYCLES,
    column: float = STORE_CYCLES_PER_COLUMN,
    l2: float = L2_BYTES,
) -> float:
    """Estimates the cycles of the slowest SM; `l2` is in bytes per cycle and SM."""
    width = tile.columns * matrices
    products = work.units * ROWS * width * INNER / PRODUCTS
    from_l2 = 2 * (HEIGHT + width) * INNER / l2
    from_memory = 2 * width * INNER / min(work.sharing, 16) / MEMORY_BYTES
    tile_cycles = start + math.ceil(work.K / INNER) * max(products, from_l2, from_memory) + column * width
    return math.ceil(work.visits * math.ceil(work.J / tile.columns) / cores) * tile_cycles


def tile_of(width: int, matrices: int = 1) -> Tile:
    """Returns the tile of `width` columns, of all matrices together, with as many stages as fit, a power of two."""
    return Tile(width // matrices, 8 if width == 64 else 4)


def _fastest(widths: tuple[int, ...], matrices: int, time: Callable[[Tile], float]) -> Tile:
    """Returns the widest tile that is nearly the fastest."""
    tiles = [tile_of(width, matrices) for width in sorted(widths, reverse=True)]
    best = min(map(time, tiles))
    return next(tile for tile in tiles if time(tile) <= MIN_SPEEDUP * best)
