"""Bundles that a grouped matmul executes: the parts of a schedule times the number of times each is taken."""

import numpy as np
import pytest

from bench import hardware
from bench.aot import gmm_bundles, tables, tpu_schedule
from bench.aot.tpu_schedule import Part
from dantinox.kernels import workloads
from dantinox.kernels.dispatch import Device
from dantinox.kernels.ops.grouped_matmul.group_metadata import make_group_metadata
from dantinox.kernels.ops.grouped_matmul.pallas_tpu import block_sizes
from dantinox.kernels.workloads import types as workload_types
from tests import numpy_interpreter

V6E = hardware.get("v6e")


@pytest.fixture
def schedule(monkeypatch):
    """100 bundles: a grid's loop of 90, in it a body of 80 with a part of 10, and one of 50 whose loop of 40 has a loop
    of 20 in it; behind the body 5 that copy blocks out."""
    parts = [
        Part(5, 95, True),
        Part(8, 88, False),
        Part(10, 20, False),
        Part(25, 75, False),
        Part(30, 70, True),
        Part(40, 60, True),
        Part(89, 94, False),
    ]
    monkeypatch.setattr(tpu_schedule, "parts", lambda text: (100, parts))
    monkeypatch.setattr(gmm_bundles, "LARGE", 10)


def test_each_part_is_counted_as_often_as_it_is_taken(schedule):
    work = gmm_bundles.Work(7, [gmm_bundles.Part(3), gmm_bundles.Part(4, trips=(16, 32))])
    # Behind the grid's loop, before it; what is in every step; the first part; the second without its loops; the loops.
    assert gmm_bundles.executed("", work) == 10 + 7 * (90 - 60) + 3 * 10 + 4 * 10 + 16 * 20 + 32 * 20


def test_schedule_of_unknown_form_is_not_counted(schedule):
    assert gmm_bundles.executed("", gmm_bundles.Work(7, [gmm_bundles.Part(3)])) is None
    assert gmm_bundles.executed("", gmm_bundles.Work(7, [gmm_bundles.Part(3), gmm_bundles.Part(4, (16,))])) is None
    of_large = gmm_bundles.Work(7, [gmm_bundles.Part(4, (16, 32))], least=20)
    assert gmm_bundles.executed("", of_large) == 10 + 7 * (90 - 50) + 4 * 10 + 16 * 20 + 32 * 20


def test_branches_inside_a_part_are_counted_separately(monkeypatch):
    parts = [Part(5, 95, True), Part(8, 88, False), Part(10, 60, False), Part(20, 30, False), Part(35, 55, False)]
    monkeypatch.setattr(tpu_schedule, "parts", lambda text: (100, [*parts, Part(40, 50, True)]))
    monkeypatch.setattr(gmm_bundles, "LARGE", 10)
    inner = gmm_bundles.Part(3), gmm_bundles.Part(2, (8,))
    work = gmm_bundles.Work(7, [gmm_bundles.Part(4, inner=inner)])
    assert gmm_bundles.executed("", work) == 10 + 7 * (90 - 50) + 4 * (50 - 30) + 3 * 10 + 2 * 10 + 8 * 10


@pytest.mark.parametrize("skew", ["uniform", "zipf", "one", "empty"])
@pytest.mark.parametrize("name", ["Qwen3-30B-A3B uniform", "dante-moe", "aot odd sizes"])
def test_taken_parts_match_the_visited_tiles(name, skew):
    spec = workloads.get("grouped_matmul", name)
    sizes = workload_types.spread(spec.N, spec.E, skew)
    tile = block_sizes.gmm_block_sizes(
        Device(V6E.platform, V6E.kind),
        spec.N,
        spec.E,
        spec.M,
        spec.F,
        num_x=1,
        num_w=1,
        num_matrices=1,
        transposed=False,
        itemsize=2,
        has_epilogue=False,
    )
    plan = numpy_interpreter.run(lambda sizes: make_group_metadata(sizes, spec.N, tile.block_m), sizes)
    count = int(plan.count)
    (work,) = gmm_bundles.candidates(spec, "pallas", "grouped_matmul.1", V6E, sizes)
    across, strips = spec.F // tile.block_n, tile.block_n // tile.block_n_sub
    assert work.steps == across * count
    owner = np.repeat(np.arange(spec.E), sizes)
    chunks, whole, spoils = [], 0, 0
    for group, row, low in zip(plan.group[:count], plan.row[:count], plan.row_start[:count], strict=True):
        mine = [
            (owner[at : at + tile.block_m_sub] == group).any()
            for at in range(row, row + tile.block_m, tile.block_m_sub)
        ]
        if mine[-1] and low <= row and len(mine) > 1:
            whole += 1
        else:
            chunks.append(sum(mine))
            spoils += low > row
    parts = work.parts
    if tile.block_m_sub < tile.block_m:
        all_, rest = parts
        assert (all_.taken, rest.taken) == (across * whole, across * (count - whole))
        parts = rest.inner
    saved, *some, restored = parts
    assert saved == restored and saved.taken == across * spoils
    assert len(some) == tile.max_chunks
    assert sum(part.trips[0] * size for part, size in zip(some, range(tile.max_chunks, 0, -1))) == across * sum(chunks)
    assert all(part.trips[1:] == ((part.trips[0] * strips,) if strips > 1 else ()) for part in some)


def test_baseline_runs_a_tile_for_each_group_in_it():
    spec = workloads.get("grouped_matmul", "Qwen3-30B-A3B uniform")
    even, odd = np.full(128, 512), np.r_[513, np.full(126, 512), 511]
    for kernel in ("pallas_tpu_ragged_dot_gmm.1", "pallas_tpu_ragged_dot_gmm_transpose_rhs.1"):
        for sizes, steps in ((even, 128), (odd, 128 + 127)):
            works = gmm_bundles.candidates(spec, "tokamax_512", kernel, V6E, sizes)
            assert [work.steps for work in works] == [steps, steps]
    deep = gmm_bundles.candidates(spec, "megablox", "gmm.1", V6E, even)[-1]
    assert (deep.steps, [part.taken for part in deep.parts]) == (256, [128, 128, 128])
    assert gmm_bundles.candidates(spec, "lax", "gmm.1", V6E, even) == []


def test_moe_kernel_visits_match_grouped_matmul_of_its_shape():
    spec = workloads.get("moe_mlp", "Qwen3-30B-A3B uniform")
    rows = spec.N * spec.k
    for name in gmm_bundles.EXPERTS:
        assert tables.product_of("moe_mlp", f"experts_{name}.1") == name
    assert tables.product_of("moe_mlp", "grouped_matmul.1") == ""
    assert gmm_bundles.experts_candidates(spec, "grouped_matmul.1", V6E, "zipf", save_residuals=True) == []
    plain = workloads.get("grouped_matmul", "Qwen3-30B-A3B uniform")
    assert (rows, spec.M, spec.F, spec.E) == (plain.N, plain.M, plain.F, plain.E)
    sizes = workload_types.spread(rows, spec.E, "zipf")
    for name, product in (("up", "grouped_matmul.1"), ("dx", "grouped_matmul_dx.1"), ("dw_up", "grouped_matmul_dw.1")):
        (ours,) = gmm_bundles.experts_candidates(spec, f"experts_{name}.1", V6E, "zipf", save_residuals=True)
        (work,) = gmm_bundles.candidates(plain, "pallas", product, V6E, sizes)
        assert [part.taken for part in ours.parts][1:3] == [part.taken for part in work.parts][1:3]
        assert ours.steps == work.steps
