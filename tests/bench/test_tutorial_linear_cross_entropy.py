"""The linear cross-entropy tutorial: what its program counts for TPU v6e, and its tables."""

import json

import numpy as np
import pytest

from bench.tutorial import __main__ as program
from bench.tutorial import common
from bench.tutorial import linear_cross_entropy as bench
from dantinox.kernels.tutorial.linear_cross_entropy import STEPS

TILE = 512 * 512 * 2  # bytes of 512 rows of w in bfloat16


def test_steps_and_fetches_match_the_grid():
    # 2048 rows in tiles of 256, the last one without targets; 4000 words in tiles of 512.
    assert bench.num_tiles() == (8, 7, 8)
    counts = {name: bench.count_work(name) for name in STEPS}
    assert [row["steps"] for row in counts.values()] == [64] * 5
    assert [row["w_bytes"] for row in counts.values()] == [64 * TILE] * 2 + [56 * TILE] * 3
    assert [row["logit_bytes"] for row in counts.values()] == [2048 * 4000 * 4, 0, 0, 0, 0]


def test_each_branch_counts_in_the_grid_steps_that_take_it():
    # Of 56 active tiles, 49 are inside the vocabulary.
    assert bench.times_taken("tile_skipping") == [8, 49, 7]
    assert bench.times_taken("dh") == [8, 49, 7, 8] and bench.times_taken("dw") == [8, 56, 8]
    assert bench.executed_bundles("all_logits", 100, []) == 64 * 100
    assert bench.executed_bundles("online_logsumexp", 100, [10]) == 64 * 90 + 8 * 10
    assert bench.executed_bundles("tile_skipping", 100, [10, 30, 40]) == 64 * 20 + 8 * 10 + 49 * 30 + 7 * 40
    sizes = [10, 20, 30, 25, 35]
    expected = 128 * (200 - 120) + 8 * 10 + 49 * (20 + 30) + 7 * (25 + 35)
    assert bench.executed_bundles("three_products", 200, sizes) == expected
    assert bench.executed_bundles("three_products", 200, [10]) is None


def test_tables_have_a_line_per_row():
    document = common.load_committed("linear_cross_entropy")
    forward, gradients = (part.splitlines() for part in bench.table(document).split("\n\n")[::2])
    assert {*document["rows"]} == {*STEPS, *bench.BASELINES}
    assert {*document["gradients"]} == {*bench.WITH_GRADIENTS, *bench.BASELINES}
    for lines, rows in ((forward, document["rows"]), (gradients, document["gradients"])):
        assert len(lines) == 2 + len(rows) and len({line.count("|") for line in lines}) == 1
    refused = {"rows": {"all_logits": {"refused": "no room"}}, "gradients": {}}
    assert "| 1 `all_logits` | no room |" in bench.table(refused)


def test_wrong_gradients_are_wrong_rows():
    rows = {"all_logits": {"error": 1.0}, "backward": {"error": 0}}
    assert bench.wrong({"rows": rows, "gradients": {"backward": {"error": np.nan}}}) == ["all_logits", "backward"]


@pytest.mark.slow
def test_run_checks_times_and_writes_each_step(tmp_path, capsys):
    arguments = ["linear_cross_entropy", "--no-compile", "--budget", "0.1", "--out", str(tmp_path)]
    assert program.main(arguments) == 0
    document = json.loads((tmp_path / "cpu" / common.file_name("linear_cross_entropy")).read_text())
    assert [*document["rows"]] == [*STEPS, *bench.BASELINES]
    for rows in (document["rows"], document["gradients"]):
        assert all(row["error"] < 1e-5 and row["seconds"] > 0 for row in rows.values() if "refused" not in row)
    assert "`three_products`" in capsys.readouterr().out
