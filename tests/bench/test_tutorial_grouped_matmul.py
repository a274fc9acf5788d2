"""The grouped matmul tutorial: what it counts, and the table that it writes."""

import json

import numpy as np
import pytest

from bench.tutorial import __main__ as program
from bench.tutorial import common
from bench.tutorial import grouped_matmul as tutorial
from dantinox.kernels.tutorial.grouped_matmul import STEPS

WEIGHT = 512 * 1024 * 2  # bytes in bfloat16
# 2048 rows in tiles of 128: all groups but the empty third and the last end inside a tile.
TILES, TASKS, PADDED_TILES = 16, 22, 19


def test_steps_pairs_and_fetches_match_the_grid():
    counts = {name: tutorial.count_work(name) for name in (*STEPS, tutorial.TWICE)}
    assert [row["steps"] for row in counts.values()] == [8, TILES * 8, PADDED_TILES, TASKS, TASKS, 2 * TASKS]
    ratios = [8, TASKS / TILES, PADDED_TILES / TILES, *[TASKS / TILES] * 3]
    np.testing.assert_allclose([row["pairs_ratio"] for row in counts.values()], ratios, atol=1e-3)
    # All weights, all weights once per tile, those of groups with rows, two weights.
    weights = [8, 8 * TILES, 7, 7, 14, 14]
    assert [row["weight_bytes"] for row in counts.values()] == [n * WEIGHT for n in weights]
    x, y = 2048 * 512 * 2, 2048 * 1024 * 2
    assert counts["swiglu"]["row_bytes"] == counts["dense"]["row_bytes"] == x + y
    assert counts[tutorial.TWICE]["row_bytes"] == 2 * x + 5 * y
    assert counts["group_metadata"]["row_bytes"] > 3 * (x + y)


def test_each_branch_counts_in_the_steps_that_take_it():
    assert tutorial.times_taken("dense") == [1]
    assert tutorial.times_taken("row_tiles") == [TILES, TASKS]
    assert tutorial.times_taken("group_metadata") == [PADDED_TILES]
    # 700, 300, 0, 417, 65, 256, 250, 60 rows cover 5, 1, 0, 3, 0, 1, 1, 0 tiles; no row is unassigned.
    assert tutorial.times_taken("masked_edges") == tutorial.times_taken("swiglu") == [11, 11, 0]


def test_work_of_the_pallas_kernel_is_that_of_its_chunks():
    for name, num_weights in (("pallas", 1), (tutorial.EXPERTS_UP, 2)):
        row = tutorial.count_pallas_work(tutorial.OURS[name])
        assert row["weight_bytes"] == 7 * num_weights * WEIGHT and row["steps"] < TASKS, name
        assert row["pairs_ratio"] == TASKS / TILES, name


def test_table_has_a_line_per_row():
    document = common.load_committed("grouped_matmul")
    lines = tutorial.table(document).splitlines()
    assert {*document["rows"]} == {*STEPS, *tutorial.BASELINES, *tutorial.COMPILED}
    assert len(lines) == 2 + len(document["rows"])
    assert len({line.count("|") for line in lines}) == 1
    assert "| 1 `dense` | no room |" in tutorial.table({"rows": {"dense": {"refused": "no room"}}})


@pytest.mark.slow
def test_run_checks_times_and_writes_each_step(tmp_path, capsys):
    assert program.main(["grouped_matmul", "--no-compile", "--budget", "0.1", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "cpu" / common.file_name("grouped_matmul")).read_text())["rows"]
    assert {*rows} == {*STEPS, *tutorial.BASELINES}
    assert all(row["error"] < 1e-5 and row["seconds"] > 0 for row in rows.values() if "refused" not in row)
    assert "`swiglu`" in capsys.readouterr().out
