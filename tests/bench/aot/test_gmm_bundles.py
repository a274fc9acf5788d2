"""Bundles that a grouped matmul executes: the parts of a schedule times the number of times each is taken."""

import numpy as np
import pytest

from bench import numpy_interpreter
from bench.aot import hardware
from bench.aot.tpu import gmm_bundles, vliw_schedule
from bench.aot.tpu.vliw_schedule import Region
from dantinox.kernels import workloads
from dantinox.kernels.dispatch import Device
from dantinox.kernels.ops.grouped_matmul.group_metadata import make_group_metadata
from dantinox.kernels.ops.grouped_matmul.pallas_tpu import block_sizes
from dantinox.kernels.workloads import types as workload_types

V6E = hardware.get("v6e")


@pytest.fixture
def schedule(monkeypatch):
    """100 bundles: a grid's loop of 90, in it a body of 80 with a part of 10, and one of 50 whose loop of 40 has a loop
    of 20 in it; behind the body 5 that copy blocks out."""
    regions = [
        Region(5, 95, True),
        Region(8, 88, False),
        Region(10, 20, False),
        Region(25, 75, False),
        Region(30, 70, True),
        Region(40, 60, True),
        Region(89, 94, False),
    ]
    monkeypatch.setattr(vliw_schedule, "regions", lambda text: (100, regions))
    monkeypatch.setattr(gmm_bundles, "LARGE", 10)


def test_each_part_is_counted_as_often_as_it_is_taken(schedule):
    steps = gmm_bundles.KernelSteps(7, [gmm_bundles.Branch(3), gmm_bundles.Branch(4, trips=(16, 32))])
    # Behind the grid's loop, before it; what is in every step; the first part; the second without its loops; the loops.
    assert gmm_bundles.count_bundles("", steps) == 10 + 7 * (90 - 60) + 3 * 10 + 4 * 10 + 16 * 20 + 32 * 20


def test_schedule_of_unknown_form_is_not_counted(schedule):
    assert gmm_bundles.count_bundles("", gmm_bundles.KernelSteps(7, [gmm_bundles.Branch(3)])) is None
    assert (
        gmm_bundles.count_bundles("", gmm_bundles.KernelSteps(7, [gmm_bundles.Branch(3), gmm_bundles.Branch(4, (16,))]))
        is None
    )
    of_large = gmm_bundles.KernelSteps(7, [gmm_bundles.Branch(4, (16, 32))], min_bundles=20)
    assert gmm_bundles.count_bundles("", of_large) == 10 + 7 * (90 - 50) + 4 * 10 + 16 * 20 + 32 * 20


def test_branches_inside_a_part_are_counted_separately(monkeypatch):
    regions = [
        Region(5, 95, True),
        Region(8, 88, False),
        Region(10, 60, False),
        Region(20, 30, False),
        Region(35, 55, False),
    ]
    monkeypatch.setattr(vliw_schedule, "regions", lambda text: (100, [*regions, Region(40, 50, True)]))
    monkeypatch.setattr(gmm_bundles, "LARGE", 10)
    inner = gmm_bundles.Branch(3), gmm_bundles.Branch(2, (8,))
    steps = gmm_bundles.KernelSteps(7, [gmm_bundles.Branch(4, inner=inner)])
    assert gmm_bundles.count_bundles("", steps) == 10 + 7 * (90 - 50) + 4 * (50 - 30) + 3 * 10 + 2 * 10 + 8 * 10


@pytest.mark.parametrize("skew", ["uniform", "zipf", "one", "empty"])
@pytest.mark.parametrize("name", ["Qwen3-30B-A3B uniform", "dante-moe", "aot odd sizes"])
def test_taken_parts_match_the_visited_tiles(name, skew):
    workload = workloads.get("grouped_matmul", name)
    sizes = workload_types.spread(workload.N, workload.E, skew)
    tile = block_sizes.gmm_block_sizes(
        Device(V6E.platform, V6E.kind),
        workload.N,
        workload.E,
        workload.M,
        workload.F,
        num_x=1,
        num_w=1,
        num_matrices=1,
        transposed=False,
        itemsize=2,
        has_epilogue=False,
    )
    metadata = numpy_interpreter.run(lambda sizes: make_group_metadata(sizes, workload.N, tile.block_m), sizes)
    count = int(metadata.count)
    (work,) = gmm_bundles.gmm_candidates(workload, "pallas", "grouped_matmul.1", V6E, sizes)
    across, strips = workload.F // tile.block_n, tile.block_n // tile.block_n_sub
    assert work.steps == across * count
    owner = np.repeat(np.arange(workload.E), sizes)
    chunk_counts, num_full, overwrites = [], 0, 0
    for group, row, row_start in zip(
        metadata.group[:count], metadata.row[:count], metadata.row_start[:count], strict=True
    ):
        has_rows = [
            (owner[start : start + tile.block_m_sub] == group).any()
            for start in range(row, row + tile.block_m, tile.block_m_sub)
        ]
        if has_rows[-1] and row_start <= row and len(has_rows) > 1:
            num_full += 1
        else:
            chunk_counts.append(sum(has_rows))
            overwrites += row_start > row
    parts = work.branches
    if tile.block_m_sub < tile.block_m:
        full, partial = parts
        assert (full.taken, partial.taken) == (across * num_full, across * (count - num_full))
        parts = partial.inner
    saved, *branches_by_size, restored = parts
    assert saved == restored and saved.taken == across * overwrites
    assert len(branches_by_size) == tile.max_chunks
    assert sum(
        part.trips[0] * size for part, size in zip(branches_by_size, range(tile.max_chunks, 0, -1))
    ) == across * sum(chunk_counts)
    assert all(part.trips[1:] == ((part.trips[0] * strips,) if strips > 1 else ()) for part in branches_by_size)


def test_baseline_runs_a_tile_for_each_group_in_it():
    workload = workloads.get("grouped_matmul", "Qwen3-30B-A3B uniform")
    even, odd = np.full(128, 512), np.r_[513, np.full(126, 512), 511]
    for kernel in ("pallas_tpu_ragged_dot_gmm.1", "pallas_tpu_ragged_dot_gmm_transpose_rhs.1"):
        for sizes, steps in ((even, 128), (odd, 128 + 127)):
            works = gmm_bundles.gmm_candidates(workload, "tokamax_512", kernel, V6E, sizes)
            assert [work.steps for work in works] == [steps, steps]
    deep = gmm_bundles.gmm_candidates(workload, "megablox", "gmm.1", V6E, even)[-1]
    assert (deep.steps, [part.taken for part in deep.branches]) == (256, [128, 128, 128])
    assert gmm_bundles.gmm_candidates(workload, "lax", "gmm.1", V6E, even) == []
