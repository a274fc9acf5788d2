"""The tile width of the Hopper grouped matmul: the useful fraction of its tensor core time, counted tile by tile."""

import numpy as np
import pytest

from dantinox.kernels import workloads
from dantinox.kernels.ops.grouped_matmul.group_metadata import make_group_metadata
from dantinox.kernels.ops.grouped_matmul.pallas_sm90 import block_sizes
from dantinox.kernels.ops.grouped_matmul.pallas_sm90.block_sizes import TMA_ROWS
from dantinox.kernels.ops.grouped_matmul.pallas_sm90.gmm import TILE_WIDTHS
from dantinox.kernels.ops.grouped_matmul.pallas_sm90.tile_scheduler import PANEL_ROW_TILES

NUM_SMS = 132
ROWS = [row for row in workloads.select("grouped_matmul", "aot", "h100") if "bfloat16" in row.dtypes]
SMALL = (
    "aot E=8 uniform",
    "aot E=8 zipf",
    "aot odd sizes",
    "aot multiples of 16",
    "aot multiples of 32",
    "decode, 128 experts",
)


def wanted(sizes: np.ndarray, J: int, columns: int) -> float:
    """The share of the products of the slowest core that are rows of a group times columns that are there.

    Tiles go to the cores in turns, those of a panel column after column; a half of 64 rows without a row is left out.
    """
    metadata = make_group_metadata(sizes, int(sizes.sum()), block_sizes.BLOCK_M, align=TMA_ROWS)
    top, low, high = (np.asarray(x)[: int(metadata.count)] for x in metadata[2:])
    halves = sum((np.maximum(top + n, low) < np.minimum(top + n + 64, high)).astype(int) for n in (0, 64))
    across = -(-J // columns)
    panels = [np.tile(halves[n : n + PANEL_ROW_TILES], across) for n in range(0, len(halves), PANEL_ROW_TILES)]
    work = np.concatenate(panels)
    load = np.bincount(np.arange(len(work)) % NUM_SMS, weights=work, minlength=NUM_SMS)
    return sizes.sum() * J / (load.max() * block_sizes.WARPGROUP_ROWS * columns * NUM_SMS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("skew", ["uniform", "zipf", "empty"])
@pytest.mark.sampled(6)
def test_chosen_tile_width_wastes_no_more_than_a_fixed_one(row, skew):
    sizes = np.asarray(workloads.GroupedMatmul(**(vars(row) | {"skew": skew})).integer_inputs()["group_sizes"])
    for K, J in ((row.M, row.F), (row.F, row.M)):
        chosen = block_sizes.gmm_block_sizes(row.N, row.E, K, J, NUM_SMS, widths=TILE_WIDTHS).block_n
        share = {columns: wanted(sizes, J, columns) for columns in TILE_WIDTHS}
        assert share[chosen] >= 0.999 * share[256], (chosen, share)
        if row.name not in SMALL:
            assert chosen == 256 and share[256] >= max(share.values()) - 0.05, "little is left for narrow tiles"


def test_widest_of_tiles_that_are_nearly_as_fast_is_chosen():
    for slower, chosen in ((-0.01, 256), (0.01, 128)):
        cycles = dict.fromkeys(TILE_WIDTHS, 200) | {128: 100, 256: 100 * (block_sizes.MIN_SPEEDUP + slower)}
        sizes = block_sizes._widest_fast(TILE_WIDTHS, 1, lambda sizes, cycles=cycles: cycles[sizes.block_n])
        assert sizes.block_n == chosen


def test_narrow_tiles_win_for_small_problems():
    row = workloads.get("grouped_matmul", "aot odd sizes")
    sizes = np.asarray(row.integer_inputs()["group_sizes"])
    assert block_sizes.gmm_block_sizes(row.N, row.E, row.M, row.F, NUM_SMS, widths=TILE_WIDTHS) == (64, 8)
    assert wanted(sizes, row.F, 64) == pytest.approx(4 * wanted(sizes, row.F, 256)) == pytest.approx(0.592, abs=1e-3)
    # Eight experts while one sequence is written: 448 tiles of 256 columns are 4 rounds, 896 of 128 are 7 of half.
    assert block_sizes.gmm_block_sizes(64, 8, 4096, 14336, NUM_SMS, widths=TILE_WIDTHS).block_n == 128
    even = np.full(8, 8)
    assert wanted(even, 14336, 128) / wanted(even, 14336, 256) == pytest.approx(8 / 7)


def test_chosen_tile_fits_shared_memory():
    fits = 227 * 1024 - 2048  # of an SM's shared memory, less what barriers and row sums take
    for widths, num_weights in ((TILE_WIDTHS, 1), ((256, 128), 1), ((256, 128), 2)):
        for N, E, K, J in ((1, 1, 64, 64), (8192, 8, 4096, 14336), (256, 128, 2048, 768), (300, 5, 640, 384)):
            tile = block_sizes.gmm_block_sizes(N, E, K, J, NUM_SMS, widths=widths, num_weights=num_weights)
            assert tile.block_n * num_weights in widths
            assert tile.stages & (tile.stages - 1) == 0
            stage = (block_sizes.BLOCK_M + tile.block_n * num_weights) * block_sizes.BLOCK_K * 2
            assert tile.stages * stage + 2 * 2 * block_sizes.WARPGROUP_ROWS * 64 * 2 <= fits
    assert block_sizes.tgmm_block_sizes(262144, 128, 4096, 1536, NUM_SMS, widths=(256, 128)).block_n == 256
    assert block_sizes.tgmm_block_sizes(1000, 5, 384, 640, NUM_SMS, widths=(256, 128)).block_n == 128


def test_cycle_estimate_counts_rounds_of_the_slowest_sm():
    def taken(visits: float, J: int, units: float = 2) -> float:
        return block_sizes.estimate_cycles(
            block_sizes.TileWork(visits, units, 4, 4096, J), block_sizes.block_sizes_of_width(256), 1, NUM_SMS
        )

    one = taken(132, 256)
    assert taken(133, 256) == 2 * one == taken(132, 512)
    # Reading 128 + 256 rows of 64 numbers from L2 takes longer than their 128 x 256 x 64 products at 2048 per clock;
    # where one half has no row, half as many products are left, and all the bytes.
    around = block_sizes.TILE_OVERHEAD_CYCLES + block_sizes.STORE_CYCLES_PER_COLUMN * 256
    from_l2 = 4096 * (128 + 256) * 2 / block_sizes.L2_BYTES
    assert from_l2 > 128 * 256 * 4096 / 2048
    assert one == pytest.approx(from_l2 + around)
    assert taken(132, 256, units=1) == pytest.approx(one)
    at_once = block_sizes.estimate_cycles(
        block_sizes.TileWork(132, 2, 4, 4096, 256), block_sizes.block_sizes_of_width(256), 1, NUM_SMS, l2_bytes=64
    )
    assert at_once == pytest.approx(128 * 256 * 4096 / 2048 + around)
