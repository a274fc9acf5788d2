"""The decode attention tutorial: what its program counts for TPU v6e, and its table."""

import json

import numpy as np
import pytest

from bench.tutorial import __main__ as program
from bench.tutorial import common
from bench.tutorial import decode_attention as bench

B, C, K, D = bench.WORKLOAD.B, bench.WORKLOAD.C, bench.WORKLOAD.K, bench.WORKLOAD.D
PASSES = {  # blocks of 256 slots, counted by hand: 100, 1000, 4000 and 8500 tokens, 16 blocks, a window of 4 blocks
    "read_everything": 4 * 16,
    "visible_blocks": 1 + 4 + 16 + 16,
    "ring_buffer": 1 + 4 + 5 + 5,
    "append_in_kernel": 1 + 4 + 5 + 5,
    "eight_bit_cache": 1 + 4 + 5 + 5,
    "pallas": 1 + 4 + 5 + 5,
    "pallas, int8": 1 + 4 + 5 + 5,
}


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.sampled(2)
def test_slots_and_bytes_match_the_visible_blocks(name):
    reads = bench.cache_reads(name)
    vector = D + 4 if bench.workload_of(name).kv_dtype else 2 * D
    assert reads.block == 256 and reads.slots == 256 * PASSES[name]
    assert reads.bytes == 2 * reads.slots * K * vector
    grids = {"read_everything": 4 * 16, "visible_blocks": 4 * 16, "pallas": 15, "pallas, int8": 15}
    assert reads.steps == grids.get(name, 4 * 5)


def test_visible_slots_match_a_count_of_the_tokens():
    assert bench.num_visible_slots() == 101 + 1001 + 1024 + 1024
    assert bench.cache_reads("xla") is None and bench.count_read("xla, int8") == {"slots": B * C}


def test_whens_are_counted_in_the_steps_that_take_them():
    taken = {name: bench.times_taken(name, bench.cache_reads(name)) for name in ("ring_buffer", "pallas")}
    # Blocks with 256 visible old tokens: 3 of 1000 tokens, 3 of 4000 (2977 to 4000), 3 of 8500 (3381 to 308).
    assert taken == {"ring_buffer": [4, 15, 4], "pallas": [4, 9, 6, 4, 4]}
    for block in (16, 100, 256):
        counts = bench.visible_tokens_per_block(block)
        assert sum(counts.values()) == bench.num_visible_slots() - B and max(counts.values()) <= block


def test_table_has_a_row_per_step_and_baseline():
    document = common.load_committed("decode_attention")
    assert [*document["rows"]] == [*bench.IDEAS, *bench.BASELINES] and not bench.wrong(document)
    lines = bench.table(document).splitlines()
    assert len(lines) == 2 + len(document["rows"]) and len({line.count("|") for line in lines}) == 1
    broken = {"rows": {"ring_buffer": {"refused": "no room"}, "xla": {"error": np.nan}}, "visible_slots": 1}
    assert bench.wrong(broken) == ["xla"]
    del broken["rows"]["xla"]
    assert "`ring_buffer` | no room |" in bench.table(broken)


@pytest.mark.slow
def test_run_checks_times_and_writes_each_step(tmp_path, capsys):
    arguments = ["decode_attention", "--no-compile", "--budget", "0.1", "--out", str(tmp_path)]
    assert program.main(arguments) == 0
    rows = json.loads((tmp_path / "cpu" / common.file_name("decode_attention")).read_text())["rows"]
    assert [*rows] == [*bench.IDEAS, *bench.BASELINES]
    assert all(row["error"] < 1e-5 and row["seconds"] > 0 for row in rows.values())
    assert "`eight_bit_cache`" in capsys.readouterr().out
