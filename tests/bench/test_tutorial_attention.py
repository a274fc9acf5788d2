"""The tutorial program: what it counts, and the tables that it writes."""

import json

import pytest

from bench.aot.tpu import vliw_schedule
from bench.tutorial import __main__ as program
from bench.tutorial import attention, common
from dantinox.kernels.tutorial.attention import STEPS

FINAL = """\
     0   :  { %s1 = smov 0 }
   0x1   : > { %20 = sbr.rel (%p1) target = $region16 }
   0x2   : > { %21 = sbr.rel (!%p2) target = $region20 }
   0x7 PF: > { %s3 = sadd.s32 1, %s1 } /* Start/End empty region 20 :: Start/End empty region 16 :: Start region 21 */
   0x8   : > { %22 = sbr.rel (%p3) target = $region69  ;;  %s2 = sshll.u32 %s7, 8 }
   0xa   : > { %23 = sbr.rel (%p4) target = $region77 }
  0x10 PF: > { %s4 = sand.u32 4, %s5 } /* Start/End empty region 77 :: Start region 78 */
  0x11   : > { %24 = sbr.rel (%p5) target = $region81 }
  0x31 PF: > { %s6 = sadd.s32 1, %s1 } /* Start/End empty region 81 :: End region 82 */
  0x40 PF: > { %s8 = sadd.s32 1, %s1 } /* Start/End empty region 69 */
  0x41   :  { %29 = sbr.rel (!%p6) target = $region171 }
"""


def test_conditional_parts_of_a_kernel_body_are_found():
    assert vliw_schedule.branch_sizes(FINAL) == [0x10 - 0xB, 0x31 - 0x12]
    assert vliw_schedule.branch_sizes("     0   :  { %s1 = smov 0 }\n") == []


def test_steps_pairs_and_fetches_match_the_grid():
    S, tile = 2048, 256
    counts = [attention.count_visited(name) for name in STEPS]
    assert [row["steps"] for row in counts] == [8, 8 * 8, 8 * 8 * 8, 8 * 15, *[2 * 30] * 4]
    assert [row["pairs"] for row in counts] == [8 * S * S] * 3 + [8 * 15 * tile**2] * 5
    # k and v in bfloat16: once per key head, then per query tile of a query head, then only where the tile changes.
    head = 2 * S * 64 * 2
    assert [row["kv_bytes"] for row in counts[:4]] == [2 * head, 2 * head, 8 * 8 * head, 8 * head]
    assert attention.num_visible_pairs() == 8 * sum(min(t + 1, 256) for t in range(S))


def test_branch_bundles_count_only_in_steps_that_take_it():
    assert attention.executed_bundles("naive", 100, []) == 8 * 100
    assert attention.executed_bundles("online_softmax", 100, [10, 20]) == 512 * 70 + 64 * 10 + 64 * 20
    # 8 query tiles per head: the first sees one tile, the others two; with a window of one tile all are masked.
    assert attention.executed_bundles("tile_skipping", 100, [10, 30, 20, 5]) == 120 * 35 + 64 * 10 + 120 * 30 + 64 * 5
    assert attention.executed_bundles("tile_skipping", 100, [10]) is None
    # Two key heads, 30 tiles of 128 queries of 4 heads each; the branches of the phases are taken in every step.
    sizes = [10, 20, 30, 5, 5, 7]
    expected = 60 * 23 + 32 * 10 + 60 * (20 + 5 + 5) + 60 * 30 + 32 * 7
    assert attention.executed_bundles("phases", 100, sizes) == expected
    kernel = {"name": "transpose_jvp_dkv_", "bundles": 100}  # 8 key tiles, each seen by queries of 2 or 4 tiles
    assert (
        attention._bundles_with_gradients("backward", kernel, [10, 30, 20, 5]) == 60 * 35 + 16 * 10 + 60 * 30 + 16 * 5
    )


def test_wrong_gradients_are_wrong_rows():
    document = {"rows": {"tiled": {"error": 1.0}, "backward": {"error": 0}}, "gradients": {"backward": {"error": 1.0}}}
    assert attention.wrong(document) == ["tiled", "backward"]


def test_table_is_written_between_its_markers():
    text = "before\n" + attention.MARKS[0] + "old\n" + attention.MARKS[1] + "\nafter\n"
    document = common.load_committed("attention")
    new = common.update_readme(text, attention, document)
    assert new.startswith("before\n") and new.endswith("\nafter\n") and "old" not in new
    assert common.update_readme(new, attention, document) == new
    refused = {"rows": {"naive": {"refused": "no room"}}, "gradients": {}, "visible_pairs": 1}
    assert "| 1 `naive` | no room |" in attention.table(refused)
    with pytest.raises(ValueError, match="not one"):
        common.update_readme("nothing", attention, document)


def test_wrong_rows_are_named():
    rows = {
        "naive": {"error": 1e-7},
        "tiled": {"error": 1e-3},
        "xla": {"refused": "no room"},
        "nan": {"error": float("nan")},
    }
    assert common.wrong({"rows": rows}) == ["tiled", "nan"]


@pytest.mark.slow
def test_run_checks_times_and_writes_each_step(tmp_path, capsys):
    assert program.main(["attention", "--no-compile", "--budget", "0.1", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "cpu" / common.file_name("attention")).read_text())["rows"]
    assert [*rows] == [*STEPS, *attention.BASELINES]
    assert all(row["error"] < 1e-5 and row["seconds"] > 0 for row in rows.values() if "refused" not in row)
    assert "`packed_gqa_gate`" in capsys.readouterr().out
