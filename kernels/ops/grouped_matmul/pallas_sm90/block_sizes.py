"""Block sizes of the grouped matmuls on Hopper.

A tile has 128 rows, and a warpgroup skips its 64 if none belongs to the group, so only the number of columns is chosen:
a wide tile reads fewer bytes per FLOP; a narrow one leaves fewer SMs idle at the end and wastes fewer columns past the
last. The model estimates the cycles of the slowest SM; the group sizes are unknown at compile time and assumed equal.
The table lists the share of the multiply-adds of 132 SMs, until the last SM ends, that the output needs:

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

from dantinox.kernels.mosaic_gpu import TMA_ROWS as TMA_ROWS
from dantinox.kernels.tuning import tunable

BLOCK_M = 128  # rows of the output per tile
BLOCK_K = 64  # of the contraction per stage
WARPGROUP_ROWS = 64  # rows of a tile per warpgroup: those of one wgmma
MULTIPLY_ADDS_PER_CYCLE = 2048  # of an SM's tensor cores
# Bytes per cycle and SM: from L2 while all SMs read (the port takes 64); a share of 3.35 TB/s.
L2_BYTES, MEMORY_BYTES = 38, 14.5
MIN_SPEEDUP = 1.05  # required of a narrower tile: the model is not a measurement, and a wide tile reads less
MAX_TILES_PER_READ = 16  # tiles that share one read of a weight from memory
# Guesses, which `make gpu` fits: cycles before the first product of a tile, and to store one column.
TILE_OVERHEAD_CYCLES, STORE_CYCLES_PER_COLUMN = 600, 6


class Sm90GmmBlockSizes(NamedTuple):
    """The sizes that depend on the problem; `BLOCK_M` and `BLOCK_K` are fixed.

    Attributes:
        block_n: columns of the output per tile, for each weight.
        stages: SMEM stages of the pipeline, a power of two.
    """

    block_n: int
    stages: int


@tunable
def gmm_block_sizes(
    N: int, E: int, K: int, J: int, num_sms: int, *, widths: tuple[int, ...], num_weights: int = 1
) -> Sm90GmmBlockSizes:
    """Choose the sizes for [N, K] times [E, K, J], or for `num_weights` such products of the same rows at once.

    Args:
        N: rows.
        E: groups.
        K: contraction.
        J: columns of the output.
        num_sms: SMs of the device.
        widths: allowed columns per tile, of all weights together.
        num_weights: weights that a tile multiplies its rows with.
    """
    work = gmm_work(N, E, K, J)
    return _widest_fast(widths, num_weights, lambda sizes: estimate_cycles(work, sizes, num_weights, num_sms))


@tunable
def tgmm_block_sizes(N: int, E: int, M: int, F: int, num_sms: int, *, widths: tuple[int, ...]) -> Sm90GmmBlockSizes:
    """Choose the sizes for the sums over rows [N, M]^T [N, F]: [E, M, F]."""
    work = tgmm_work(N, E, M, F)
    return _widest_fast(widths, 1, lambda sizes: estimate_cycles(work, sizes, 1, num_sms))


class TileWork(NamedTuple):
    """The work of one kernel, as the cost model sees it.

    Attributes:
        row_tiles: tiles of 128 rows.
        warpgroups_per_tile: warpgroups that multiply, per tile, on average; the others have no row of the group.
        tiles_per_group: row tiles of a group, which together read its weights from memory once.
        K: contraction.
        J: columns of the output.
    """

    row_tiles: float
    warpgroups_per_tile: float
    tiles_per_group: float
    K: int
    J: int


def gmm_work(N: int, E: int, K: int, J: int) -> TileWork:
    """Return the work of [N, K] times [E, K, J]."""
    nonempty_groups = max(1, min(N, E))

    def tiles_per_group(rows: int) -> float:
        # The last tile of a group is half full on average.
        return max(1.0, N / nonempty_groups / rows + 0.5 * (E > 1))

    per_group = tiles_per_group(BLOCK_M)
    return TileWork(nonempty_groups * per_group, tiles_per_group(WARPGROUP_ROWS) / per_group, per_group, K, J)


def tgmm_work(N: int, E: int, M: int, F: int) -> TileWork:
    """Return the work of the sums over rows [N, M]^T [N, F]: [E, M, F]."""
    row_tiles = math.ceil(M / BLOCK_M)
    # A group ends anywhere, so half a stage of 64 rows belongs to others on average.
    return TileWork(E * row_tiles, 2, row_tiles, N // max(1, min(N, E)) + BLOCK_K // 2, F)


def estimate_cycles(
    work: TileWork,
    sizes: Sm90GmmBlockSizes,
    num_weights: int,
    num_sms: int,
    *,
    tile_overhead: float = TILE_OVERHEAD_CYCLES,
    store_per_column: float = STORE_CYCLES_PER_COLUMN,
    l2_bytes: float = L2_BYTES,
) -> float:
    """Estimate the cycles of the slowest SM; `l2_bytes` is per cycle and SM."""
    width = sizes.block_n * num_weights
    multiply = work.warpgroups_per_tile * WARPGROUP_ROWS * width * BLOCK_K / MULTIPLY_ADDS_PER_CYCLE
    from_l2 = 2 * (BLOCK_M + width) * BLOCK_K / l2_bytes
    from_memory = 2 * width * BLOCK_K / min(work.tiles_per_group, MAX_TILES_PER_READ) / MEMORY_BYTES
    k_steps = math.ceil(work.K / BLOCK_K)
    tile_cycles = tile_overhead + k_steps * max(multiply, from_l2, from_memory) + store_per_column * width
    return math.ceil(work.row_tiles * math.ceil(work.J / sizes.block_n) / num_sms) * tile_cycles


def block_sizes_of_width(width: int, num_weights: int = 1) -> Sm90GmmBlockSizes:
    """Return the sizes of a tile of `width` columns, of all weights together, with as many stages as fit in SMEM."""
    return Sm90GmmBlockSizes(width // num_weights, 8 if width == 64 else 4)


def _widest_fast(
    widths: tuple[int, ...], num_weights: int, estimate: Callable[[Sm90GmmBlockSizes], float]
) -> Sm90GmmBlockSizes:
    """Return the sizes of the widest tile that is nearly as fast as the fastest."""
    candidates = [block_sizes_of_width(width, num_weights) for width in sorted(widths, reverse=True)]
    best = min(map(estimate, candidates))
    return next(sizes for sizes in candidates if estimate(sizes) <= MIN_SPEEDUP * best)
