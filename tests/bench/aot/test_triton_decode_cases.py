"""The rows of the Triton decode attention that are compiled, and the table that was written of them."""

import pytest

from bench.aot import hardware
from bench.aot.gpu import triton_decode_cases as cases
from bench.aot.gpu import triton_rows
from bench.aot.gpu.triton_cases import Kernel


def test_rows_have_every_head_dim_ring_and_dtype():
    for position, expected in enumerate((cases.HEAD_DIMS, cases.RINGS, triton_rows.DTYPES, cases.FEATURES)):
        assert {row[position] for row in cases.ROWS} == set(expected)
    assert len(set(cases.ROWS)) == len(cases.ROWS)


def test_kernel_that_combines_the_splits_needs_no_tensor_cores():
    combine = Kernel("combine", registers=32, spill_bytes=0, smem_bytes=0, tensor_core_instructions=0)
    target = hardware.get("rtx4090")
    assert triton_rows.problems(cases.SUITE, target, "bfloat16", combine) == []
    found = triton_rows.problems(cases.SUITE, target, "bfloat16", combine._replace(name="split"))
    assert found == ["0 tensor core instructions for 2 products"]


def test_committed_table_has_the_short_rows_of_every_card():
    lines = cases.SUITE.file.read_text("utf-8").splitlines()
    cards = [target.name for target in hardware.TARGETS.values() if isinstance(target, hardware.Gpu)]
    starts = [f"| {' | '.join((card, *row))} |" for card in cards for row in cases.SUITE.short]
    assert [start for start in starts if not any(line.startswith(start) for line in lines)] == []


def test_unknown_card_is_named(capsys):
    with pytest.raises(SystemExit):
        triton_rows.main(cases.SUITE, cases.HEADS, ["v6e"])
    assert "'v6e'" in capsys.readouterr().err
